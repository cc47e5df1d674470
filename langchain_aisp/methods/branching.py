"""The tree of responses: its members, the branches that leave them, and what each branch weighs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from langchain_aisp.methods.weights import complete_first, importance_weights, temperature_for_ess
from langchain_aisp.noise import fold
from langchain_aisp.types import Sampling

_BASE = 0x9E3779B97F4A7C15  # of the hashes of texts: odd, so that it has an inverse modulo 2**64

_LOW_BITS = 0xFFFF  # of hashes, enough to tell most of them apart

Standing: TypeAlias = tuple[bool, float]
"""Whether a response is complete, and its reward; the greater one is better."""


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
        alternatives: [M, L, K] int32, the model's likeliest tokens per position.
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
        return int(self.rewards.shape[0])  # a fifth of the time that len() of a tensor takes

    def weights(self, effective: float) -> Tensor:
        """Importance weights [M] with this effective sample size, at least 1, where that can be had."""
        rewards = complete_first(self.rewards, self.complete)
        return importance_weights(rewards, temperature_for_ess(rewards, effective))

    def take(self, rows: Tensor | slice) -> Population:
        """The members with these indices [r]; of a slice, as views."""
        fields = (getattr(self, name) for name in self.__dataclass_fields__)
        if isinstance(rows, slice):
            return Population(*(field[rows] for field in fields))
        return Population(*(field.index_select(0, rows) for field in fields))

    def judged(self, rewards: Tensor, complete: Tensor) -> Population:
        """The same members with their rewards [M] and whether they are complete [M]."""
        return replace(self, rewards=rewards, complete=complete)

    def join(self, other: Population) -> Population:
        """The members of both."""
        return Population(
            *(torch.cat([getattr(self, name), getattr(other, name)]) for name in self.__dataclass_fields__)
        )

    def copy(self, other: Population, rows: Tensor, sources: Tensor, counts: Tensor) -> None:
        """Take over, in place, what other members saw at their first positions.

        Args:
            other: These members.
            rows: [r] int64, members that see it now, too.
            sources: [r] int64, of the others one for each.
            counts: [r] int64, how many positions.
        """
        length = self.tokens.shape[1]
        which, place = (torch.arange(length) < counts[:, None]).nonzero(as_tuple=True)
        origin, target = sources[which] * length + place, rows[which] * length + place
        for name in ("alternatives", "logprobs", "scores"):
            found = getattr(other, name).flatten(0, 1).index_select(0, origin)
            getattr(self, name).flatten(0, 1).index_copy_(0, target, found)

    def within(self, allowed: Callable[[Tensor, Tensor], Tensor]) -> Population:
        """The members with alternatives that a grammar allows; ``allowed`` is asked about those not checked yet."""
        rows = (~self.checked).nonzero().squeeze(1)
        if not len(rows):
            return self
        kept = allowed(self.tokens[rows], self.alternatives[rows])
        logprobs = self.logprobs.index_put((rows,), self.logprobs[rows].masked_fill(~kept, -torch.inf))
        return replace(self, logprobs=logprobs, checked=torch.ones_like(self.checked))

    def least(self, count: int) -> Standing | None:
        """What another one has to be better than to be among ``count`` members; None if there is room for it."""
        return None if len(self) < count else (bool(self.complete[-1]), float(self.rewards[-1]))

    def best(self, count: int) -> Population:
        """At most so many of the best distinct members, see ``best_distinct``."""
        rows = best_distinct(self.nodes, self.lengths, self.rewards, self.complete, count)
        return self if rows == [*range(len(self))] else self.take(torch.tensor(rows, dtype=torch.int64))

    def shortened(self) -> Population:
        """The members without the positions that none of them fills."""
        length = int(self.lengths.max())
        fields = (getattr(self, name) for name in self.__dataclass_fields__)
        return Population(*(field[:, :length] if field.dim() > 1 else field for field in fields))


def best_distinct(
    nodes: Tensor, lengths: Tensor, rewards: Tensor, complete: Tensor, count: int, above: Standing | None = None
) -> list[int]:
    """Which rows are the best distinct ones: complete before cut off, then by reward, then the earlier one.

    Args:
        nodes: [N, L] int64, see ``Population``.
        lengths: [N] int64.
        rewards: [N] float32.
        complete: [N] bool.
        count: How many at most.
        above: Only better ones than this.
    """
    last = nodes.gather(1, (lengths - 1).clamp(min=0)[:, None]).squeeze(1).tolist()
    standing = list(zip(complete.tolist(), rewards.tolist(), strict=True))
    better = (row for row in range(len(last)) if above is None or standing[row] > above)
    order = sorted(better, key=lambda row: standing[row], reverse=True)
    distinct = {last[row]: row for row in reversed(order)}
    return [row for row in order if distinct[last[row]] == row][:count]


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
    logprobs = (population.logprobs / (sampling.temperature or 1.0)).log_softmax(dim=-1)
    positions = torch.arange(logprobs.shape[1])
    possible = population.alternatives != population.tokens.int()[..., None]
    possible &= (positions < population.lengths[:, None])[..., None]
    if sampling.top_p < 1 or sampling.top_k > 0:
        possible &= _allowed(logprobs, sampling)
    logprobs.masked_fill_(~possible, -torch.inf)
    share = logprobs.flatten(1).log_softmax(dim=1).view_as(logprobs)
    share.masked_fill_(~possible, -torch.inf)  # nan where a parent has no branches at all
    share += weights.log()[:, None, None]
    return share if cuts is None else share + cuts[..., None]


def _allowed(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """Which of the alternatives, the likeliest first, the request's top-k and top-p would let through."""
    before = logprobs.exp().cumsum(dim=-1) - logprobs.exp()
    ranks = torch.arange(logprobs.shape[-1])
    return (before < sampling.top_p) & (ranks < (sampling.top_k or logprobs.shape[-1]))


def path_nodes(tokens: Tensor, key: int) -> Tensor:
    """Hashes [N, L] of the tokens [N, L] up to each position: equal exactly where the texts so far are equal.

    A polynomial in the positions, whose coefficients are the tokens' own hashes: what a run of tokens adds elsewhere is
    what it adds here, times ``moved``.
    """
    return key + token_nodes(tokens, torch.arange(tokens.shape[1]), key).cumsum(dim=1)  # wraps around


def token_nodes(tokens: Tensor, positions: Tensor, key: int) -> Tensor:
    """What tokens at some positions, of shapes that can be broadcast, add to the hash of a text."""
    reach = 1 << (int(tokens.max()) + 1 if tokens.numel() else 0).bit_length()
    return _hashes(key, reach)[tokens + 1] * moved(positions)


@lru_cache(maxsize=16)
def _hashes(key: int, reach: int) -> Tensor:
    """Hashes of the tokens from -1 to ``reach - 2``: texts have many more tokens than there are different ones."""
    return fold(key, torch.arange(-1, reach - 1))


def moved(by: Tensor) -> Tensor:
    """By what a run of tokens is multiplied in the hash of a text that has it so many positions later, of any shape."""
    reach = 1 << (int(by.abs().max()) if by.numel() else 0).bit_length()  # in few sizes, so that few are kept
    return _powers(reach)[by + reach]


@lru_cache
def _powers(reach: int) -> Tensor:
    """The base of the hashes to the powers from ``-reach`` to ``reach``, modulo 2**64."""
    base = np.uint64(_BASE)
    with np.errstate(over="ignore"):
        ahead, behind = (np.cumprod(np.full(reach, each)) for each in (base, np.uint64(pow(_BASE, -1, 1 << 64))))
    return torch.from_numpy(np.concatenate([behind[::-1], np.ones(1, dtype=np.uint64), ahead]).view(np.int64))


def distinct_branches(
    population: Population, log_weights: Tensor, visited: Tensor, key: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All branches of the parents that no response has gone through, each once.

    Parents that begin alike have the same alternatives there, so their branches are one choice with the sum of their
    weights; it counts for the first of these parents.

    Args:
        population: M possible parents.
        log_weights: [M, L', K] of their branches; L' may be shorter than L.
        visited: [S] int64, nodes that a response has gone through, sorted; those of the parents are among them.
        key: Of the prompt.

    Returns:
        Of B branches the places [B] in [M, L, K] laid flat, nodes [B] int64 and log-weights [B] float64.
    """
    length, width = population.alternatives.shape[1:]
    member, position = (torch.arange(length) < population.lengths[:, None]).nonzero(as_tuple=True)
    places = member * length + position
    before = torch.cat([torch.full((len(population), 1), key), population.nodes[:, : length - 1]], dim=1)
    distinct, group, first = _groups(before.flatten().index_select(0, places))
    weights = log_weights[member, position].double().exp_()
    sums = torch.zeros(len(distinct), width, dtype=weights.dtype).index_add_(0, group, weights).log_().flatten()
    places, position = places[first], position[first]
    tokens = population.alternatives.flatten(0, 1).index_select(0, places)
    nodes = (distinct[:, None] + token_nodes(tokens, position[:, None], key)).flatten()
    alike = _alike(nodes, visited)
    sums[alike[_among(nodes[alike], visited)]] = -torch.inf
    new = sums.isfinite().nonzero().squeeze(1)
    return (places[:, None] * width + torch.arange(width)).flatten()[new], nodes[new], sums[new]


def new_nodes(nodes: Tensor, log_weights: Tensor, visited: Tensor) -> Tensor:
    """Log-weights [B] of nodes that are each one choice, and of those visited none.

    The first of equal nodes bears the sum of their weights and the others, like those visited, ``-inf``.

    Args:
        nodes: [B] int64.
        log_weights: [B].
        visited: [S] int64, sorted.
    """
    distinct, group, first = _groups(nodes)
    sums = torch.zeros(len(distinct), dtype=log_weights.dtype).scatter_add(0, group, log_weights.exp()).log()
    sums.masked_fill_(_among(distinct, visited), -torch.inf)
    return torch.full_like(log_weights, -torch.inf).index_put((first,), sums)


def merged(visited: Tensor, nodes: Tensor) -> Tensor:
    """Nodes visited [S], sorted, and others [B] in one row, sorted [S + B]."""
    both = np.concatenate([visited.numpy(), np.sort(nodes.numpy())])
    both.sort(kind="stable")  # which merges two sorted runs, in a third of the time that sorting anew takes
    return torch.from_numpy(both)


def _groups(nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of nodes [B] the distinct ones [G], for each which of these it is [B], and where each of these is first [G]."""
    distinct, group = nodes.unique(return_inverse=True)
    first = torch.full_like(distinct, len(nodes)).scatter_reduce_(0, group, torch.arange(len(nodes)), "amin")
    return distinct, group, first


def _among(nodes: Tensor, visited: Tensor) -> Tensor:
    """[B] bool, which of the nodes [B] are among those visited [S], which are sorted."""
    if not len(visited):
        return torch.zeros_like(nodes, dtype=torch.bool)
    return visited[torch.searchsorted(visited, nodes).clamp_(max=len(visited) - 1)] == nodes


def _alike(nodes: Tensor, visited: Tensor) -> Tensor:
    """Where of the nodes [B] those [F] are that may be among the ones visited [S]: others need no search."""
    low = torch.zeros(_LOW_BITS + 1, dtype=torch.bool)
    low[visited & _LOW_BITS] = True
    return low[nodes & _LOW_BITS].nonzero().squeeze(1)


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
