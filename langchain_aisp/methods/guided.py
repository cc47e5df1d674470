"""A text led by the reward at every token: a parent of a kind that plain samples hardly bring.

With a reward that understands unfinished texts, a text can be led to what it wants token by token. Such a text earns
much and may be odd; as one of the parents it lends its words to the others and is mended by branches of its own.

Source: the rule by which tokens are chosen is that of ARGS-greedy, arXiv 2402.01694; a weight in units of the rewards'
spread, going on from branches, and the texts as parents of a search, are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from langchain_aisp.methods.branching import Population, path_nodes
from langchain_aisp.methods.credit import spelled
from langchain_aisp.methods.lookahead import Branches
from langchain_aisp.types import Problem, Rollouts, Wave

CANDIDATES = 10  # tokens that are judged at each position, as published


@dataclass(frozen=True)
class Guided:
    """A text under way, and what the model would have said in its place.

    Every token takes two waves: the model says its own, which shows the likeliest ones and is forgotten; then these are
    judged.

    Attributes:
        problem: What is answered.
        weight: Nats that a unit of the reward is worth.
        most: Tokens that the text is led by at most; from there on it is an unfinished text like others.
        keys: [L] int64 noise keys.
        tokens: The text so far.
        begun: How many tokens it began with.
        alternatives: The model's likeliest tokens [K] at each position, and at the next one once they are known.
        logprobs: Their log-probabilities [K].
        ended: Whether the text is complete, or has no room for more.
        held: What the engine remembers of the text.
    """

    problem: Problem
    weight: float
    most: int
    keys: Tensor
    tokens: tuple[int, ...] = ()
    begun: int = 0
    alternatives: tuple[Tensor, ...] = ()
    logprobs: tuple[Tensor, ...] = ()
    ended: bool = False
    held: Any = None

    @property
    def finished(self) -> bool:
        """Whether it is led no further."""
        return self.ended or len(self.tokens) - self.begun >= self.most

    @property
    def wave(self) -> Wave | None:
        """What is to be looked at next; None once it is led no further."""
        if self.finished:
            return None
        return self._judging() if self._asked else self._asking()

    def after(self, population: Population, branch: Branches, *, ended: bool) -> Guided:
        """Going on from a branch [1] of a parent instead, which is all of the text if that has ``ended``."""
        parent, position = int(branch.parents), int(branch.positions)
        before = torch.arange(len(self.keys)) < position
        return replace(
            self,
            keys=torch.where(before, population.keys[parent], self.keys),
            tokens=(*population.tokens[parent, :position].tolist(), int(branch.tokens)),
            begun=position + 1,
            alternatives=tuple(population.alternatives[parent, : position + 1]),
            logprobs=tuple(population.logprobs[parent, : position + 1]),
            ended=ended,
        )

    def told(self, rollouts: Rollouts, rewards: Tensor) -> Guided:
        """With what the wave showed or, if it judged candidates, with the best of these by their rewards [k]."""
        if self._asked:
            possible, logprobs = self._possible
            best = int((logprobs + self.weight * (rewards - rewards.max())).argmax())
            tokens = (*self.tokens, int(possible[best]))
            ended = rollouts.responses[best].complete or len(tokens) == len(self.keys)
            return replace(self, tokens=tokens, ended=ended)
        place = len(self.tokens)
        if int(rollouts.lengths[0]) == place:  # there is no room for more
            return replace(self, ended=True)
        alternatives, logprobs = (rollouts.observed[name][0, place] for name in _SHOWN)
        return replace(
            self,
            alternatives=(*self.alternatives, alternatives),
            logprobs=(*self.logprobs, logprobs),
            held=rollouts.held if self.problem.sampling.grammar is None else None,  # it has heard another token
        )

    def beside(self, population: Population) -> Population:
        """The members, and after them the text with a reward of 0."""
        one, size = population.take(torch.tensor([0])), len(self.tokens)
        tokens, alternatives = torch.full_like(one.tokens, -1), torch.zeros_like(one.alternatives)
        logprobs = torch.zeros_like(one.logprobs)
        if size > 0:
            tokens[0, :size] = torch.tensor(self.tokens)
            alternatives[0, :size], logprobs[0, :size] = torch.stack(self.alternatives), torch.stack(self.logprobs)
        text = replace(
            one,
            tokens=tokens,
            keys=self.keys[None],
            lengths=torch.tensor([size]),
            nodes=path_nodes(tokens, self.problem.prompt.key),
            rewards=torch.zeros(1),
            alternatives=alternatives,
            logprobs=logprobs,
            scores=torch.zeros_like(one.scores),
        )
        return population.join(text)

    def branch(self, sources: Population) -> Branches:
        """The text as a branch [1] of itself that keeps all of it; ``sources`` is ``beside`` some population."""
        last, end = len(sources) - 1, len(self.tokens) - 1
        places = (last, end, self.tokens[end], int(sources.nodes[last, end]))
        return Branches(*(torch.tensor([place]) for place in places))

    @property
    def _asked(self) -> bool:
        """Whether it is known what the model would say next."""
        return len(self.alternatives) > len(self.tokens)

    @property
    def _possible(self) -> tuple[Tensor, Tensor]:
        """Tokens [k] that may come next, and their log-probabilities."""
        tokens, logprobs = self.alternatives[-1][:CANDIDATES], self.logprobs[-1][:CANDIDATES]
        return tokens[logprobs.isfinite()], logprobs[logprobs.isfinite()]

    def _asking(self) -> Wave:
        """One more token of the model's own."""
        prefix = torch.zeros_like(self.keys)
        prefix[: len(self.tokens)] = torch.tensor(self.tokens, dtype=torch.int64)
        return Wave(
            self.problem.prompt,
            prefix[None],
            torch.tensor([len(self.tokens)]),
            self.keys[None],
            replace(self.problem.sampling, temperature=0.0),
            observe=frozenset(("alternatives",)),
            enough=0,
            held=self.held,
        )

    def _judging(self) -> Wave:
        """The text with each of the tokens that may come next."""
        possible, _ = self._possible
        texts = torch.empty(len(possible), len(self.tokens) + 1, dtype=torch.int64)
        texts[:, :-1], texts[:, -1] = torch.tensor(self.tokens, dtype=torch.int64), possible
        return spelled(texts, torch.full((len(texts),), texts.shape[1]), self.problem)


_SHOWN = ("alternatives", "alternative_logprobs")
