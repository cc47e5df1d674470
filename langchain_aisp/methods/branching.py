"""The tree of responses: its members, the branches that leave them, and what each branch weighs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from langchain_aisp.methods.weights import complete_first, importance_weights, temperature_for_ess
from langchain_aisp.noise import fold
from langchain_aisp.types import Sampling


@dataclass(frozen=True)
class Population:
    """Decoded responses that may become parents; M of them, the best first.

    Attributes:
        tokens: [M, L] int64, -1 after the end.
        keys: [M, L] int64 noise keys.
        lengths: [M] int64.
        nodes: [M, L] int64, a hash of the tokens up to and including each position.
        rewards: [M] float32.
        complete: [M] bool.
        alternatives: [M, L, K] int64, the model's likeliest tokens per position.
        logprobs: [M, L, K] float32, their unsteered log-probabilities; ``-inf`` for those found to break the grammar.
        checked: [M] bool, whether that was looked for.
        scores: [M, L, D] float32, gradients of each token's log-probability by the pre-logits, 0 for branching tokens;
            D is 0 without control.
    """

    tokens: Tensor
    keys: Tensor
    lengths: Tensor
    nodes: Tensor
    rewards: Tensor
    complete: Tensor
    alternatives: Tensor
    logprobs: Tensor
    checked: Tensor
    scores: Tensor

    def __len__(self) -> int:
        """Number of members M."""
        return len(self.rewards)

    def weights(self, effective: float) -> Tensor:
        """Importance weights [M] with this effective sample size, at least 1, where that can be had."""
        rewards = complete_first(self.rewards, self.complete)
        return importance_weights(rewards, temperature_for_ess(rewards, effective))

    def take(self, rows: Tensor) -> Population:
        """The members with these indices [r]."""
        return Population(*(getattr(self, name).index_select(0, rows) for name in self.__dataclass_fields__))

    def join(self, other: Population) -> Population:
        """The members of both."""
        return Population(
            *(torch.cat([getattr(self, name), getattr(other, name)]) for name in self.__dataclass_fields__)
        )

    def within(self, allowed: Callable[[Tensor, Tensor], Tensor]) -> Population:
        """The members with alternatives that a grammar allows; ``allowed`` is asked about those not checked yet."""
        rows = (~self.checked).nonzero().squeeze(1)
        if not len(rows):
            return self
        kept = allowed(self.tokens[rows], self.alternatives[rows])
        logprobs = self.logprobs.index_put((rows,), self.logprobs[rows].masked_fill(~kept, -torch.inf))
        return replace(self, logprobs=logprobs, checked=torch.ones_like(self.checked))

    def best(self, count: int, among: Sequence[int] | None = None) -> Population:
        """The best distinct members: complete before cut off, then by reward, then the earlier one.

        Args:
            count: How many at most.
            among: Which members may be chosen; None for all.
        """
        last = self.nodes.gather(1, (self.lengths - 1).clamp(min=0)[:, None]).squeeze(1).tolist()
        standing = list(zip(self.complete.tolist(), self.rewards.tolist(), strict=True))
        order = sorted(range(len(self)) if among is None else among, key=lambda row: standing[row], reverse=True)
        distinct = {last[row]: row for row in reversed(order)}
        chosen = [row for row in order if distinct[last[row]] == row][:count]
        return self.take(torch.tensor(chosen, dtype=torch.int64))

    def shortened(self) -> Population:
        """The members without the positions that none of them fills."""
        length = int(self.lengths.max())
        fields = (getattr(self, name) for name in self.__dataclass_fields__)
        return Population(*(field[:, :length] if field.dim() > 1 else field for field in fields))


def branch_log_weights(
    population: Population, weights: Tensor, sampling: Sampling, cuts: Tensor | None = None
) -> Tensor:
    """Log-weights [M, L, K] of all branches: parent's weight times the token's share of all branches of the parent.

    Args:
        population: The possible parents.
        weights: [M] of them.
        sampling: How tokens are drawn.
        cuts: [M, L] log-weights of the positions, see ``methods.credit``; None if all are alike.
    """
    logprobs = population.logprobs / (sampling.temperature or 1.0)
    logprobs = logprobs - logprobs.logsumexp(dim=-1, keepdim=True)
    positions = torch.arange(logprobs.shape[1])
    possible = (positions < population.lengths[:, None])[..., None] & _allowed(logprobs, sampling)
    possible &= population.alternatives != population.tokens[..., None]
    logprobs = logprobs.masked_fill(~possible, -torch.inf)
    share = logprobs - logprobs.flatten(1).logsumexp(dim=1)[:, None, None]
    share = share.masked_fill(~possible, -torch.inf)  # nan where a parent has no branches at all
    found = weights.log()[:, None, None] + share
    return found if cuts is None else found + cuts[..., None]


def _allowed(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """Which of the alternatives, the likeliest first, the request's top-k and top-p would let through."""
    before = logprobs.exp().cumsum(dim=-1) - logprobs.exp()
    ranks = torch.arange(logprobs.shape[-1])
    return (before < sampling.top_p) & (ranks < (sampling.top_k or logprobs.shape[-1]))


def path_nodes(tokens: Tensor, key: int) -> Tensor:
    """Hashes [N, L] of the tokens [N, L] up to each position: equal exactly where the texts so far are equal."""
    return key + token_nodes(tokens, key).cumsum(dim=1)  # wraps around; order enters by position


def token_nodes(tokens: Tensor, key: int) -> Tensor:
    """What tokens [N, L] at their positions add to the hash of a text, [N, L]."""
    return fold(fold(key, torch.arange(tokens.shape[1])), tokens)


def branch_nodes(population: Population, key: int) -> Tensor:
    """Hashes [M, L, K] of the texts that the branches begin with."""
    root = torch.full((len(population), 1), key)
    before = torch.cat([root, population.nodes[:, :-1]], dim=1)
    positions = torch.arange(population.nodes.shape[1])
    return before[..., None] + fold(fold(key, positions)[:, None], population.alternatives)


def new_nodes(nodes: Tensor, log_weights: Tensor, visited: Tensor) -> Tensor:
    """Log-weights [B] of nodes that are each one choice, and of those visited none.

    Parents that begin alike offer the same branches: the first of equal nodes bears the sum of their weights and the
    others, like those visited, ``-inf``.

    Args:
        nodes: [B] int64.
        log_weights: [B].
        visited: [S] int64, sorted.
    """
    distinct, group = nodes.unique(return_inverse=True)
    first = torch.full_like(distinct, len(nodes)).scatter_reduce(0, group, torch.arange(len(nodes)), "amin")
    sums = torch.zeros(len(distinct), dtype=log_weights.dtype).scatter_add(0, group, log_weights.exp()).log()
    if len(visited):
        nearest = visited[torch.searchsorted(visited, distinct).clamp(max=len(visited) - 1)]
        sums.masked_fill_(nearest == distinct, -torch.inf)
    return torch.full_like(log_weights, -torch.inf).index_put((first,), sums)


def parents_of(parents: Population, nodes: Tensor, cut: Tensor) -> Tensor:
    """For each row, which has kept ``cut`` [N] tokens, a member that begins with them, but for the last one.

    What is known of those tokens depends on nothing else, so any such member will do.

    Args:
        parents: The members.
        nodes: [N, L] int64, of the rows, see ``Population``.
        cut: [N] int64.
    """
    last = (cut - 2).clamp(min=0)
    same = nodes.gather(1, last[:, None]) == parents.nodes[:, last].T
    return torch.where(cut > 1, same.int().argmax(dim=1), 0)
