"""The default search: importance-weighted parents, branches drawn without replacement, one shared pre-logit control.

The responses seen so far form a tree. Every wave, all branches of the best responses (keep a parent up to a position,
put another token there, go on freely) compete at once: a branch weighs as much as its parent's importance weight times
the model's own probability of the branching token, so cuts fall where the model was undecided, and Gumbel top-k draws
the whole wave without replacement, so no branch is tried twice. The control is a natural-gradient step of the expected
reward in pre-logit space, the same at all positions, its length given in nats of KL divergence per token.

Sources: importance weights and controls, arXiv 2510.26219; Gumbel top-k, Kool et al. 2019, arXiv 1903.06059; branching,
weights by effective sample size and the shared control are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from langchain_aisp.methods.published import PublishedAISP
from langchain_aisp.methods.weights import (
    complete_first,
    effective_sample_size,
    importance_weights,
    temperature_for_ess,
)
from langchain_aisp.noise import fold, gumbel, wave_keys
from langchain_aisp.types import Info, Observable, Problem, Rollouts, Sampling, Wave, require

_ESS_SHARE = 0.6  # of the population: most weight on the best, several parents in every wave
_FISHER_FLOOR = 0.01  # of the mean eigenvalue: directions that no sample has shown are not trusted


@dataclass(frozen=True)
class SharedSteering:
    """Adds the same control to every position that a row decodes.

    Attributes:
        control: [D] float32.
    """

    control: Tensor

    @property
    def open_loop(self) -> bool:
        """The control does not depend on the model's pre-logits."""
        return True

    def offset(self, rows: Tensor, positions: Tensor, keys: Tensor, hidden: Tensor | None) -> Tensor:
        """Controls [r, D] of some rows; see ``Steering``."""
        return self.control.expand(len(rows), -1)


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
        logprobs: [M, L, K] float32, their unsteered log-probabilities.
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
    scores: Tensor

    def __len__(self) -> int:
        """Number of members M."""
        return len(self.rewards)

    def take(self, rows: Tensor) -> Population:
        """The members with these indices [r]."""
        return Population(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def join(self, other: Population) -> Population:
        """The members of both."""
        return Population(
            *(torch.cat([getattr(self, name), getattr(other, name)]) for name in self.__dataclass_fields__)
        )

    def best(self, count: int) -> Population:
        """The best distinct members: complete before cut off, then by reward, then the earlier one."""
        last = self.nodes.gather(1, (self.lengths - 1).clamp(min=0)[:, None]).squeeze(1).tolist()
        standing = list(zip(self.complete.tolist(), self.rewards.tolist(), strict=True))
        order = sorted(range(len(self)), key=lambda row: standing[row], reverse=True)
        distinct = list({last[row]: row for row in reversed(order)}.values())
        return self.take(torch.tensor(sorted(distinct, key=order.index)[:count]))


@dataclass(frozen=True)
class Evidence:
    """What the samples so far say about a shared control.

    Attributes:
        features: [S, D], the gradient of each sample's log-probability by a control shared by its positions.
        rewards: [S] float32.
        fisher: [D, D], the sum over all decoded tokens of score times score.
        tokens: How many tokens that were.
    """

    features: Tensor
    rewards: Tensor
    fisher: Tensor
    tokens: int

    @classmethod
    def none(cls, width: int) -> Evidence:
        """Before the first wave."""
        return cls(torch.zeros(0, width), torch.zeros(0), torch.zeros(width, width), 0)

    def add(self, children: Population, decoded: Tensor) -> Evidence:
        """With a wave's samples, of which the positions ``decoded`` [N, L] are new."""
        written = torch.arange(decoded.shape[1]) < children.lengths[:, None]
        new = children.scores[decoded]
        return Evidence(
            torch.cat([self.features, children.scores.where(written[..., None], 0).sum(dim=1)]),
            torch.cat([self.rewards, children.rewards]),
            self.fisher + new.T @ new,
            self.tokens + len(new),
        )

    def control(self, kl: float) -> Tensor:
        """The control [D], at most ``kl`` nats per token long, along which the rewards rise.

        Ridge regression of the standardised rewards on the features in the Fisher metric: the penalty makes a weakly
        supported direction a natural-gradient step. The length is ``kl`` times the share of the rewards' variance that
        the regression foretells for samples it was not fitted on, so a control that is mere noise stays short.
        """
        if len(self.rewards) < 2 or self.rewards.min() == self.rewards.max() or self.fisher.trace() == 0:
            return torch.zeros(len(self.fisher))  # nothing varies, so nothing can be learned
        fisher = self.fisher / self.tokens
        floor = _FISHER_FLOOR * fisher.diagonal().mean() * torch.eye(len(fisher))
        whitened = torch.linalg.solve(fisher + floor, self.features.T)  # [D, S]
        kernel = self.features @ whitened
        ridge = kernel.diagonal().mean() * torch.eye(len(kernel))
        targets = (self.rewards - self.rewards.mean()) / self.rewards.std()
        inverse = torch.linalg.inv(kernel + ridge)
        dual = inverse @ targets
        left_out = (dual / inverse.diagonal()).square().mean()  # leave-one-out residuals, in closed form
        foretold = float((1 - left_out).clamp(min=0))
        direction: Tensor = whitened @ dual
        length = float(torch.einsum("d,de,e->", direction, fisher, direction)) / 2  # nats per token, to second order
        return direction * math.sqrt(kl * foretold / max(length, 1e-12))


@dataclass(frozen=True)
class AISPState:
    """What is being answered, and what the next wave is drawn from.

    Attributes:
        problem: What to answer.
        iteration: The next iteration.
        drawn: Responses decoded so far.
        population: Possible parents, None before the first wave.
        visited: [S] int64, nodes (see ``Population``) that a response has gone through.
        evidence: What is known about a shared control.
    """

    problem: Problem
    iteration: int
    drawn: int
    population: Population | None
    visited: Tensor
    evidence: Evidence


@dataclass(frozen=True)
class AISP:
    """Adaptive importance sampling over branches and pre-logit controls; the default.

    The first wave is plain samples, the same as those of ``BestOfN`` with the same seed, so the answer is never worse
    than Best-of-n of that wave.

    Attributes:
        samples: Responses in all, as in ``BestOfN``: equal numbers are equal cost.
        iterations: Waves that share them; more waves adapt more often, and decode fewer rows at once.
        population: M, how many of the best responses may become parents.
        cooling: Temperature of what follows a branch, as a factor of the request's: the branches bring the variety.
        control_kl: Length of the shared control in nats per token; 0 uses none.
    """

    samples: int = 256
    iterations: int = 8
    population: int = 8
    cooling: float = 0.25
    control_kl: float = 0.0

    def __post_init__(self) -> None:
        """Reject settings that leave nothing to search."""
        require(self.samples >= 1, f"samples must be at least 1, got {self.samples}")
        require(
            1 <= self.iterations <= self.samples,
            f"iterations must be between 1 and samples = {self.samples}, got {self.iterations}",
        )
        require(self.population >= 1, f"population must be at least 1, got {self.population}")
        require(self.cooling >= 0, f"cooling must not be negative, got {self.cooling}; 1 keeps the temperature")
        require(self.control_kl >= 0, f"control_kl must not be negative, got {self.control_kl}; 0 uses no control")

    @staticmethod
    def published(**settings: Any) -> PublishedAISP:
        """The search in the form of the paper; settings as for ``PublishedAISP``."""
        return PublishedAISP(**settings)

    @property
    def name(self) -> str:
        """Short name for tables and metadata."""
        return "aisp"

    def wave_size(self, state: AISPState) -> int:
        """Rows of the next wave: what is left of the samples in equal shares.

        Argmax decoding has one plain response, so at temperature 0 the first wave is that one.
        """
        if state.population is None and state.problem.sampling.temperature == 0:
            return 1
        return math.ceil((self.samples - state.drawn) / (self.iterations - state.iteration))

    def init(self, problem: Problem) -> AISPState:
        """Nothing seen yet."""
        width = problem.head.width if self.control_kl > 0 else 0
        return AISPState(problem, 0, 0, None, torch.empty(0, dtype=torch.int64), Evidence.none(width))

    def propose(self, state: AISPState) -> Wave:
        """Plain samples first, then branches of the best responses."""
        problem, count = state.problem, self.wave_size(state)
        length = problem.sampling.max_tokens
        keys = wave_keys(problem.prompt.key, state.iteration, torch.arange(count), length)
        prefix, cut = torch.zeros_like(keys), torch.zeros(count, dtype=torch.int64)
        if state.population is not None:
            parent, position, token = self._draw_branches(state, state.population, count)
            before = torch.arange(length) < position[:, None]
            found = len(parent)  # fewer than asked when the tree is nearly exhausted; plain samples fill up
            keys[:found] = torch.where(before, state.population.keys[parent], keys[:found])
            prefix[:found] = torch.where(before, state.population.tokens[parent], 0)
            prefix[torch.arange(found), position] = token
            cut[:found] = position + 1
        observe: set[Observable] = {"alternatives", "scores"} if self.control_kl > 0 else {"alternatives"}
        sampling = problem.sampling if state.population is None else self._cooled(problem.sampling)
        return Wave(problem.prompt, prefix, cut, keys, sampling, self._steering(state), frozenset(observe))

    def update(self, state: AISPState, wave: Wave, rollouts: Rollouts, rewards: Tensor) -> tuple[AISPState, Info]:
        """Let the wave's responses join the population, and learn a control from their scores."""
        children = self._children(state.population, wave, rollouts, rewards)
        everyone = children if state.population is None else state.population.join(children)
        population = everyone.best(self.population)
        weights = parent_weights(population)
        positions = torch.arange(children.tokens.shape[1])
        written = positions < children.lengths[:, None]
        after = replace(
            state,
            iteration=state.iteration + 1,
            drawn=state.drawn + len(wave),
            population=population,
            visited=torch.cat([state.visited, children.nodes[written]]).unique(),
            evidence=state.evidence.add(children, written & (positions >= wave.cut[:, None])),
        )
        return after, {"ess": effective_sample_size(weights), "control_kl": self.control_kl}

    def _cooled(self, sampling: Sampling) -> Sampling:
        return replace(sampling, temperature=sampling.temperature * self.cooling)

    def _steering(self, state: AISPState) -> SharedSteering | None:
        if self.control_kl == 0 or state.population is None:
            return None
        return SharedSteering(state.evidence.control(self.control_kl))

    def _draw_branches(self, state: AISPState, population: Population, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Parents [n], positions [n] and tokens [n] of the n ≤ count branches drawn."""
        nodes = branch_nodes(population, state.problem.prompt.key)
        weights = branch_log_weights(population, state.problem.sampling).masked_fill(
            torch.isin(nodes, state.visited), -torch.inf
        )
        merged = merge_equal(nodes.flatten(), weights.flatten().double())
        keys = fold(fold(state.problem.prompt.key, state.iteration), nodes.flatten())
        chosen = (merged + gumbel(keys)).topk(min(count, int(merged.isfinite().sum()))).indices
        parent, position, rank = torch.unravel_index(chosen, nodes.shape)
        return parent, position, population.alternatives[parent, position, rank]

    def _children(self, parents: Population | None, wave: Wave, rollouts: Rollouts, rewards: Tensor) -> Population:
        """The wave as possible parents; what was kept is known from the parents, since it depends on tokens only."""
        nodes = path_nodes(rollouts.tokens, wave.prompt.key)
        alternatives = rollouts.observed["alternatives"]
        logprobs = rollouts.observed["alternative_logprobs"]
        scores = rollouts.observed.get("scores", logprobs[..., :0])
        if parents is not None:
            source = _parents_of(parents, wave)
            kept = (torch.arange(nodes.shape[1]) < wave.cut[:, None])[..., None]
            alternatives = torch.where(kept, parents.alternatives[source], alternatives)
            logprobs = torch.where(kept, parents.logprobs[source], logprobs)
            scores = torch.where(kept, parents.scores[source], scores)
            branched = wave.cut > 0  # no score is known of the branching token, and it was chosen rather than drawn
            scores[branched, wave.cut[branched] - 1] = 0
        return Population(
            rollouts.tokens,
            wave.keys,
            rollouts.lengths,
            nodes,
            rewards,
            rollouts.complete,
            alternatives,
            logprobs,
            scores,
        )


def parent_weights(population: Population) -> Tensor:
    """Importance weights [M] of the members, their temperature set by the wanted effective sample size."""
    rewards = complete_first(population.rewards, population.complete)
    target = max(1.0, _ESS_SHARE * len(population))
    return importance_weights(rewards, temperature_for_ess(rewards, target))


def branch_log_weights(population: Population, sampling: Sampling) -> Tensor:
    """Log-weights [M, L, K] of all branches: parent's weight times the token's share of all branches of the parent."""
    logprobs = population.logprobs / (sampling.temperature or 1.0)
    logprobs = logprobs - logprobs.logsumexp(dim=-1, keepdim=True)
    positions = torch.arange(logprobs.shape[1])
    possible = (positions < population.lengths[:, None])[..., None] & _allowed(logprobs, sampling)
    possible &= population.alternatives != population.tokens[..., None]
    logprobs = logprobs.masked_fill(~possible, -torch.inf)
    share = logprobs - logprobs.flatten(1).logsumexp(dim=1)[:, None, None]
    share = share.masked_fill(~possible, -torch.inf)  # nan where a parent has no branches at all
    return parent_weights(population).log()[:, None, None] + share


def _allowed(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """Which of the alternatives, the likeliest first, the request's top-k and top-p would let through."""
    before = logprobs.exp().cumsum(dim=-1) - logprobs.exp()
    ranks = torch.arange(logprobs.shape[-1])
    return (before < sampling.top_p) & (ranks < (sampling.top_k or logprobs.shape[-1]))


def path_nodes(tokens: Tensor, key: int) -> Tensor:
    """Hashes [N, L] of the tokens [N, L] up to each position: equal exactly where the texts so far are equal."""
    node = torch.full((len(tokens),), key)
    nodes = []
    for column in tokens.T:
        node = fold(node, column)
        nodes.append(node)
    return torch.stack(nodes, dim=1)


def branch_nodes(population: Population, key: int) -> Tensor:
    """Hashes [M, L, K] of the texts that the branches begin with."""
    root = torch.full((len(population), 1), key)
    before = torch.cat([root, population.nodes[:, :-1]], dim=1)
    return fold(before[..., None], population.alternatives)


def merge_equal(nodes: Tensor, log_weights: Tensor) -> Tensor:
    """Log-weights [B] in which the first of equal nodes [B] bears the sum of their weights and the others none.

    Parents that begin alike offer the same branches; each is one branch.
    """
    distinct, group = nodes.unique(return_inverse=True)
    sums = torch.zeros(len(distinct), dtype=log_weights.dtype).scatter_add(0, group, log_weights.exp())
    order = torch.arange(len(nodes))
    first = torch.full_like(distinct, len(nodes)).scatter_reduce(0, group, order, "amin")
    return sums.log()[group].masked_fill(order != first[group], -torch.inf)


def _parents_of(parents: Population, wave: Wave) -> Tensor:
    """For each row [N] a member that shares the row's keys before the cut; any one does, see ``_children``."""
    last = (wave.cut - 2).clamp(min=0)
    same = path_nodes(wave.prefix, wave.prompt.key).gather(1, last[:, None]) == parents.nodes[:, last].T
    return torch.where(wave.cut > 1, same.int().argmax(dim=1), 0)
