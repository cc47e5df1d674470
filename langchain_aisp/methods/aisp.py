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
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from langchain_aisp.methods.branching import (
    Population,
    best_distinct,
    branch_log_weights,
    distinct_branches,
    merged,
    parents_of,
    path_nodes,
)
from langchain_aisp.methods.credit import beginnings, cut_log_weights, rewards_to_go
from langchain_aisp.methods.crossing import Crossings, crossings
from langchain_aisp.methods.guided import CANDIDATES, Guided
from langchain_aisp.methods.lookahead import Branches, best_looking, gains, looks
from langchain_aisp.methods.published import PublishedAISP
from langchain_aisp.methods.weights import drawn_without_replacement, effective_sample_size
from langchain_aisp.noise import fold, wave_keys
from langchain_aisp.types import Info, Observable, Problem, Rollouts, Sampling, Wave, require

_ROWS = 32  # of an iteration, at most: more of them would decode before anything is learnt from them
_FEWEST = 8  # iterations, where there are so many samples: a search that adapts too rarely is Best-of-N
_ESS = (
    3.2,
    1.0,
)  # parents that the weights are worth, at the beginning and at the end: some first, then the best alone
_LOOKED = 1  # tells the noise of this choice from that of the draw
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
class Flight:
    """Rows that are still being decoded while others take the places of those that have ended.

    Attributes:
        rows: [C] what is known of them so far.
        temperatures: [C] float32, at which they are drawn.
        held: What the engine remembers of them.
    """

    rows: Population
    temperatures: Tensor
    held: Any

    def __len__(self) -> int:
        """Number of rows C."""
        return len(self.rows)


@dataclass(frozen=True)
class AISPState:
    """What is being answered, and what the next wave is drawn from.

    Attributes:
        problem: What to answer.
        ends: How many responses there are at the end of each iteration.
        waves: Waves so far; an iteration has several of them when rows take the places of others.
        drawn: Responses decoded so far.
        flight: Rows that have not ended.
        goes_on: Whether more belongs to the present iteration.
        population: Possible parents, None before the first wave.
        weights: [M] importance weights of the population.
        visited: [S] int64, nodes (see ``Population``) that a response has gone through, sorted.
        evidence: What is known about a shared control.
        next_rows: New rows of the next wave.
        looked_at: Branches whose beginnings are scored before these rows are chosen; 0 for none.
        cuts: [M, L] log-weights of the positions at which parents are cut; None without credit, see ``credited``.
        branches: What the next rows begin with, once it has been chosen by ``credited``.
        guided: A text that ``credited`` is told how to write.
        nats: What a unit of the reward is worth in it; 0 where none is written.
        crossable: How many crossings of the parents may be said next.
    """

    problem: Problem
    ends: tuple[int, ...]
    waves: int
    drawn: int
    flight: Flight | None
    goes_on: bool
    population: Population | None
    weights: Tensor
    visited: Tensor
    evidence: Evidence
    next_rows: int = 0
    looked_at: int = 0
    cuts: Tensor | None = None
    branches: Branches | None = None
    guided: Guided | None = None
    nats: float = 0.0
    crossable: int = 0

    @property
    def flying(self) -> int:
        """Number of rows that have not ended."""
        return 0 if self.flight is None else len(self.flight)

    @property
    def exhausted(self) -> bool:
        """Whether all responses are there."""
        return self.drawn >= self.ends[-1]

    @property
    def beginnings(self) -> Wave | None:
        """Unfinished texts of which ``credited`` wants the rewards; None if there are none.

        Asked for when the reward understands such texts: those of a text that it leads, those of the parents, and those
        of branches.
        """
        if self.population is None:
            return None
        if self.guided is not None:
            return self.guided.wave
        if self.branches is not None:
            return None
        if self.cuts is None:
            wave = beginnings(self.population, self.problem)
            return wave if len(wave) else None
        return looks(self.population, self._candidates, self.problem) if len(self._candidates) else None

    def credited(self, rollouts: Rollouts, rewards: Tensor) -> AISPState:
        """With one more token, with credit per position, or with branches chosen, from the beginnings' rewards."""
        assert self.population is not None, "without parents there are no beginnings to have been scored"
        if self.guided is not None:
            return self._with(self.guided.told(rollouts, rewards))
        if self.cuts is None:
            return replace(self, cuts=cut_log_weights(self.population, rewards_to_go(self.population, rewards)))
        branches, gained = self._candidates, gains(self.population, self._candidates, rewards)
        keys = fold(fold(fold(self.problem.prompt.key, self.waves), _LOOKED), branches.nodes)
        guided = self.unled()
        if guided is None or len(branches) == 1:
            return replace(self, branches=best_looking(branches, gained, keys, self.next_rows))
        best = int(gained.argmax())
        others = torch.arange(len(branches)) != best
        return replace(
            self,
            branches=best_looking(branches.take(others), gained[others], keys[others], self.next_rows - 1),
            guided=guided.after(
                self.population, branches.take(slice(best, best + 1)), ended=rollouts.responses[best].complete
            ),
        )

    @cached_property
    def led(self) -> Guided | None:
        """The first of the next rows, if the reward has led it."""
        return self.guided if self.guided is not None and self.guided.finished else None

    @cached_property
    def crossing(self) -> Crossings | None:
        """What the next wave says, where it has nothing to decode; with credit, branches are better founded."""
        credited = self.cuts is not None or self.branches is not None or self.led is not None
        if self.crossable == 0 or credited or self.population is None:
            return None
        key, branches = self.problem.prompt.key, self.branch_log_weights
        return crossings(self.population, branches, self.weights, self.visited, key, self.waves, self.crossable)

    @cached_property
    def branch_log_weights(self) -> Tensor:
        """Log-weights [M, L', K] of all branches of the parents, up to the L' positions of the longest one."""
        assert self.population is not None, "without parents there are no branches"
        members = self.population.shortened()
        cuts = None if self.cuts is None else self.cuts[:, : members.tokens.shape[1]]
        return branch_log_weights(members, self.weights, self.problem.sampling, cuts)

    @cached_property
    def sources(self) -> Population:
        """What the next rows may keep the beginnings of: the parents, and after them a text that was led."""
        assert self.population is not None, "without parents there is nothing to keep"
        return self.population if self.led is None else self.led.beside(self.population)

    def _with(self, guided: Guided) -> AISPState:
        """With another token of the text that is led; one from scratch is an iteration of its own."""
        if self.branches is not None or not guided.finished:
            return replace(self, guided=guided)
        then = self.drawn + 1
        before, after = [end for end in self.ends if end < then], [end for end in self.ends if end > then]
        return replace(self, guided=guided, ends=(*before, then, *after))

    def unled(self) -> Guided | None:
        """A text that is to be led, for no more reward calls than the looks at branches take; None for none."""
        most = self.looked_at // CANDIDATES
        if self.nats == 0 or most == 0:
            return None
        length = self.problem.sampling.max_tokens
        [keys] = wave_keys(self.problem.prompt.key, -1 - self.waves, torch.arange(1), length)  # no row has these
        return Guided(self.problem, self.nats, most, keys)

    @cached_property
    def _candidates(self) -> Branches:
        """Branches to be looked at."""
        return draw_branches(self, self.looked_at)


def draw_branches(state: AISPState, count: int) -> Branches:
    """At most so many branches of the state's parents that no response has gone through."""
    assert state.population is not None, "without parents there are no branches"
    key = state.problem.prompt.key
    place, node, weight = distinct_branches(state.population, state.branch_log_weights, state.visited, key)
    chosen = drawn_without_replacement(weight, fold(fold(key, state.waves), node), count)
    place, (length, width) = place[chosen], state.population.alternatives.shape[1:]
    tokens = state.population.alternatives.flatten()[place].long()
    return Branches(place // (length * width), place // width % length, tokens, node[chosen])


@dataclass(frozen=True)
class AISP:
    """Adaptive importance sampling over branches, crossings and pre-logit controls; the default.

    The first wave is plain samples, the same as those of ``BestOfN`` with the same seed, so the answer is never worse
    than Best-of-n of that wave. With a reward that understands unfinished texts, each position of a parent is credited
    with what follows it, and parents are cut where they lose, see ``methods.credit``; and branches are chosen by what
    their first token gains, see ``methods.lookahead``; and one of each wave's texts, the first of them from scratch, is
    led by the reward at every token, see ``methods.guided``.

    Attributes:
        samples: Responses in all, as in ``BestOfN``: so many are scored, and no more than that decoded.
        iterations: Parts of the search with equal shares of them, the first of plain samples; more parts adapt more
            often and decode fewer rows at once. By default 8, or as many as leave each part 32 samples.
        population: M, how many of the best responses may become parents, and crossed; most of the weight is on fewer.
        cooling: Temperature of what follows a branch, as a factor of the request's: the branches bring the variety.
        control_kl: Length of the shared control in nats per token; 0 uses none.
        overlap: Iterations whose rows decode at once. With more than 1, rows need not wait for the slowest ones: others
            take the places of those that have ended. 1 decodes whole waves, as do rewards that understand unfinished
            texts or wait for somebody else, and controls: these are asked for once per wave.
        refill: Share of the rows at once that have to end before others take their places.
        lookahead: With a reward that understands unfinished texts, how many branches are looked at for each that is
            decoded: their beginnings are scored up to the branching token, and what gains by it is decoded. 0 looks at
            none.
        guidance: With such a reward, how many nats a standard deviation of the first wave's rewards is worth at each
            token of the texts that it leads, ten calls of it per token, up to as many calls as the wave's looks at
            branches take. 0 leads none, nor are any led where rewards do not differ.
        crossings: How many crossings of the parents are said for each response that was decoded, where there are so
            many, see ``methods.crossing``. They are samples as others, and nothing is decoded for them. 0 says none;
            none are said where a reward understands unfinished texts or a grammar has to be obeyed.
    """

    samples: int = 256
    iterations: int = None  # type: ignore[assignment]  # a number from __post_init__ on
    population: int = 16
    cooling: float = 0.25
    control_kl: float = 0.0
    overlap: int = 2
    refill: float = 0.5
    lookahead: int = 8
    guidance: float = 32.0
    crossings: float = 1.0

    def __post_init__(self) -> None:
        """Reject settings that leave nothing to search."""
        require(self.samples >= 1, f"samples must be at least 1, got {self.samples}")
        if self.iterations is None:
            object.__setattr__(self, "iterations", min(self.samples, max(_FEWEST, math.ceil(self.samples / _ROWS))))
        require(
            1 <= self.iterations <= self.samples,
            f"iterations must be between 1 and samples = {self.samples}, got {self.iterations}",
        )
        require(self.population >= 1, f"population must be at least 1, got {self.population}")
        require(self.cooling >= 0, f"cooling must not be negative, got {self.cooling}; 1 keeps the temperature")
        require(self.control_kl >= 0, f"control_kl must not be negative, got {self.control_kl}; 0 uses no control")
        require(self.overlap >= 1, f"overlap must be at least 1, got {self.overlap}; 1 decodes whole waves")
        require(0 <= self.refill <= 1, f"refill must be between 0 and 1, got {self.refill}")
        require(self.lookahead >= 0, f"lookahead must not be negative, got {self.lookahead}; 0 looks at no branches")
        require(self.guidance >= 0, f"guidance must not be negative, got {self.guidance}; 0 writes no text by it")
        require(self.crossings >= 0, f"crossings must not be negative, got {self.crossings}; 0 says none")

    @staticmethod
    def published(**settings: Any) -> PublishedAISP:
        """The search in the form of the paper; settings as for ``PublishedAISP``."""
        return PublishedAISP(**settings)

    @property
    def name(self) -> str:
        """Short name for tables and metadata."""
        return "aisp"

    def wave_size(self, state: AISPState) -> int:
        """New rows of the next wave: as many as decode at once, less those that have not ended."""
        at_once, left = self._places(state)
        return max(0, min(at_once - state.flying, left))

    def init(self, problem: Problem) -> AISPState:
        """Nothing seen yet."""
        width = problem.head.width if self.control_kl > 0 else 0
        nothing = torch.empty(0, dtype=torch.int64)
        return AISPState(
            problem,
            self._ends(problem),
            waves=0,
            drawn=0,
            flight=None,
            goes_on=False,
            population=None,
            weights=torch.empty(0),
            visited=nothing,
            evidence=Evidence.none(width),
        )

    @torch.inference_mode()
    def propose(self, state: AISPState) -> Wave:
        """Plain samples first, then branches of the best responses, beside the rows that have not ended; or crossings.

        Crossings leave those rows where they are, since nothing has to be decoded.
        """
        problem = state.problem
        if state.crossing is not None:
            texts = state.crossing
            return Wave(problem.prompt, texts.tokens.clamp(min=0), texts.lengths, texts.keys, problem.sampling)
        flight, count = state.flight, self.wave_size(state)
        observe: set[Observable] = {"alternatives" if problem.allowed is None else "unchecked_alternatives"}
        if self.control_kl > 0:
            observe.add("scores")
        length = problem.sampling.max_tokens
        keys = wave_keys(problem.prompt.key, state.waves, torch.arange(count), length)
        prefix, cut = torch.zeros_like(keys), torch.zeros(count, dtype=torch.int64)
        if state.population is not None and count > 0:
            branches = self._branches(state, count)
            before = torch.arange(length) < branches.positions[:, None]
            found = len(branches)  # fewer than asked when the tree is nearly exhausted; plain samples fill up
            keys[:found] = torch.where(before, state.sources.keys[branches.parents], keys[:found])
            prefix[:found] = torch.where(before, state.sources.tokens[branches.parents], 0)
            prefix[torch.arange(found), branches.positions] = branches.tokens
            cut[:found] = branches.positions + 1
        sampling = problem.sampling if state.population is None else self._cooled(problem.sampling)
        wave = Wave(
            problem.prompt,
            prefix,
            cut,
            keys,
            sampling,
            self._steering(state),
            frozenset(observe),
            enough=self._enough(state, count),
        )
        return wave if flight is None else _beside(flight, wave)

    @torch.inference_mode()
    def update(self, state: AISPState, wave: Wave, rollouts: Rollouts, rewards: Tensor) -> tuple[AISPState, Info]:
        """Let the wave's responses join the population, and learn a control from their scores."""
        ended, complete, crossed = rollouts.ended, rollouts.complete, state.crossing
        rows: Decoded | Crossings
        if crossed is None:
            rows = Decoded(state, wave, rollouts)
        else:  # a budget may have left no room for some
            rows = crossed if len(crossed) == len(wave) else crossed.where(ended)

        least = None if state.population is None else state.population.least(self.population)
        nodes, lengths = rows.nodes[ended], rows.lengths[ended]
        best = torch.tensor(best_distinct(nodes, lengths, rewards, complete, self.population, least), dtype=torch.int64)
        taken = rows.take(torch.cat([ended[best], rollouts.going]))
        population = taken.take(slice(len(best))).judged(rewards[best], complete[best])
        if state.population is not None:
            population = state.population.join(population).best(self.population) if len(best) else state.population
        if state.problem.allowed is not None:
            population = population.within(state.problem.allowed)
        positions = torch.arange(rows.tokens.shape[1])
        written = positions < rows.lengths[:, None]
        entered = written & (positions >= self._branching(state, wave)[:, None])
        drawn, evidence = state.drawn + len(ended), state.evidence
        weights = self._weights(population, drawn)
        if self.control_kl > 0:
            decoded = written & (positions >= wave.cut[:, None])
            evidence = evidence.add(rows.take(ended).judged(rewards, complete), decoded[ended])
        flight = state.flight
        if crossed is None:
            flight = _flight(wave, rollouts, taken.take(slice(len(best), None)))
        after = replace(
            state,
            waves=state.waves + 1,
            drawn=drawn,
            flight=flight,
            goes_on=not any(state.drawn < end <= drawn for end in state.ends),
            population=population,
            weights=weights,
            cuts=None,
            branches=None,
            guided=None,
            nats=self._nats(rewards) if state.population is None else state.nats,
            visited=merged(state.visited, rows.nodes[entered]),
            evidence=evidence,
        )
        count, crossable = self.wave_size(after), 0 if crossed is not None else self._crossable(after, len(ended))
        after = replace(after, next_rows=count, looked_at=count * self.lookahead, crossable=crossable)
        if state.population is None and count > 0:
            after = replace(after, guided=after.unled())
        return after, {"ess": effective_sample_size(weights), "control_kl": self.control_kl}

    def _crossable(self, state: AISPState, decoded: int) -> int:
        """How many crossings may be said after so many decoded responses."""
        if state.problem.allowed is not None or state.population is None or len(state.population) < 2:
            return 0
        return min(round(self.crossings * decoded), self._places(state)[1])

    def _enough(self, state: AISPState, count: int) -> int | None:
        """How many rows have to end before others take their places; None when there are no others, or may not be."""
        at_once, left = self._places(state)
        if self.overlap == 1 or self.control_kl > 0 or left == count:
            return None
        return max(1, math.ceil(self.refill * at_once))

    def _places(self, state: AISPState) -> tuple[int, int]:
        """How many rows decode at once, and how many are left to begin.

        Those of the iteration to which the next row belongs; and of others, once there are rows that go on. So where
        ``enough`` is not heeded, waves are iterations.
        """
        begun, starts = state.drawn + state.flying, (0, *state.ends)
        now = next((i for i, end in enumerate(state.ends) if begun < end), len(state.ends) - 1)
        share = state.ends[now] - starts[now]
        return share * (self.overlap if state.flight is not None else 1), state.ends[-1] - begun

    def _ends(self, problem: Problem) -> tuple[int, ...]:
        """How many responses there are at the end of each iteration: equal shares, the larger ones first.

        Argmax decoding has one plain response, so at temperature 0 the first wave is that one.
        """
        ends = [1 if problem.sampling.temperature == 0 else math.ceil(self.samples / self.iterations)]
        for remaining in range(self.iterations - 1, 0, -1):
            ends.append(ends[-1] + math.ceil((self.samples - ends[-1]) / remaining))
        return tuple(ends)

    def _cooled(self, sampling: Sampling) -> Sampling:
        return replace(sampling, temperature=sampling.temperature * self.cooling)

    def _weights(self, population: Population, drawn: int) -> Tensor:
        """Importance weights [M] of the parents after so many responses: the search narrows as it goes on."""
        broad, narrow = _ESS
        return population.weights(narrow + (broad - narrow) * max(0.0, 1 - drawn / self.samples))

    def _nats(self, rewards: Tensor) -> float:
        """What a unit of the reward is worth where it leads a text, by the first wave's rewards [N]; 0 for nothing."""
        spread = float(rewards.std()) if len(rewards) > 1 else 0.0
        return self.guidance / spread if spread > 0 else 0.0

    def _branches(self, state: AISPState, count: int) -> Branches:
        """What so many new rows begin with, at most, in ``state.sources``: first the text that the reward has led."""
        branches = draw_branches(state, count) if state.branches is None else state.branches
        if state.led is not None and state.led.tokens:
            branches = state.led.branch(state.sources).join(branches)
        return branches.take(slice(count))

    def _branching(self, state: AISPState, wave: Wave) -> Tensor:
        """Where the rows [N] leave what was there before: at their branching tokens."""
        if state.crossing is not None:
            return state.crossing.begun[: len(wave)]
        places = wave.cut - 1
        if state.led is not None and state.flying < len(wave):
            places[state.flying] = state.led.begun - 1
        return places

    def _steering(self, state: AISPState) -> SharedSteering | None:
        if self.control_kl == 0 or state.population is None:
            return None
        return SharedSteering(state.evidence.control(self.control_kl))


@dataclass(frozen=True)
class Decoded:
    """The N rows of a wave, some of which may become members or go on.

    Attributes:
        state: Before the wave.
        wave: What was asked for.
        rollouts: What came of it.
    """

    state: AISPState
    wave: Wave
    rollouts: Rollouts

    @property
    def tokens(self) -> Tensor:
        """[N, L] int64, -1 after what has been said."""
        return self.rollouts.tokens

    @property
    def lengths(self) -> Tensor:
        """[N] int64."""
        return self.rollouts.lengths

    @cached_property
    def nodes(self) -> Tensor:
        """[N, L] int64, hashes of the texts up to each position."""
        return path_nodes(self.tokens, self.wave.prompt.key)

    def take(self, rows: Tensor) -> Population:
        """Those with these indices [r], with rewards of 0.

        What they kept was seen before: of rows in flight by themselves, of others by a parent, as it depends on tokens
        only.
        """
        seen, unknown = self.rollouts.observed, torch.zeros(len(rows))
        alternatives, logprobs = (seen[name].index_select(0, rows) for name in ("alternatives", "alternative_logprobs"))
        scores = seen["scores"][rows] if "scores" in seen else logprobs[..., :0]
        nodes, cut, flying = self.nodes[rows], self.wave.cut[rows], self.state.flying
        taken = Population(
            self.tokens[rows],
            self.wave.keys[rows],
            self.lengths[rows],
            nodes,
            unknown,
            unknown.bool(),
            alternatives,
            logprobs,
            unknown.bool(),
            scores,
        )
        if self.state.population is None:
            return taken
        flown = rows < flying
        if self.state.flight is not None:
            taken.copy(self.state.flight.rows, flown.nonzero().squeeze(1), rows[flown], cut[flown])
        others, sources = (~flown).nonzero().squeeze(1), self.state.sources
        taken.copy(sources, others, parents_of(sources, nodes[others], cut[others]), cut[others])
        branched = cut > 0  # no score is known of the branching token, and it was chosen rather than drawn
        scores[branched, cut[branched] - 1] = 0
        return taken


def _beside(flight: Flight, wave: Wave) -> Wave:
    """The wave with the rows that have not ended before its own."""
    rows = flight.rows
    fresh = torch.full((len(wave),), wave.sampling.temperature)
    return replace(
        wave,
        prefix=torch.cat([rows.tokens, wave.prefix]),
        cut=torch.cat([rows.lengths, wave.cut]),
        keys=torch.cat([rows.keys, wave.keys]),
        temperatures=torch.cat([flight.temperatures, fresh]),
        resumed=len(flight),
        held=flight.held,
    )


def _flight(wave: Wave, rollouts: Rollouts, rows: Population) -> Flight | None:
    """The rows of a wave that have not ended, with what is known of them."""
    if len(rows) == 0:
        return None
    temperatures = wave.temperatures
    if temperatures is None:
        temperatures = torch.full((len(wave),), wave.sampling.temperature)
    return Flight(rows, temperatures[rollouts.going], rollouts.held)
