"""A text written token by token, as its beginnings earn: a parent of a kind that plain samples hardly bring.

With a reward that understands unfinished texts, a text can be led to what it wants at every token. Such a text earns
much and is often odd; as one of the parents it lends its words to the others and is mended by branches of its own.

Source: the rule by which the text is written is that of ARGS-greedy, arXiv 2402.01694; a weight in units of the
rewards' spread, and the text as a parent of a search, are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from langchain_aisp.methods.branching import Population, path_nodes
from langchain_aisp.methods.credit import spelled
from langchain_aisp.noise import wave_keys
from langchain_aisp.types import Observable, Problem, Rollouts, Wave

CANDIDATES = 10  # tokens that are judged at each position, as published
_KEYS = -1  # an iteration below all others: no row has noise of the same keys


@dataclass(frozen=True)
class Guided:
    """Such a text under way, and what the model would have said in its place.

    Every token takes two waves: the model says its own, which shows the likeliest ones and is forgotten; then these are
    judged.

    Attributes:
        problem: What is answered.
        weight: Nats that a unit of the reward is worth.
        candidates: Tokens that are judged at each position.
        tokens: The text so far.
        alternatives: The model's likeliest tokens [K] at each of its positions, and at the next one once it is known.
        logprobs: Their log-probabilities [K].
        held: What the engine remembers of the text.
        finished: Whether it has ended.
    """

    problem: Problem
    weight: float
    candidates: int = CANDIDATES
    tokens: tuple[int, ...] = ()
    alternatives: tuple[Tensor, ...] = ()
    logprobs: tuple[Tensor, ...] = ()
    held: Any = None
    finished: bool = False

    @property
    def wave(self) -> Wave | None:
        """What is to be looked at next; None once the text has ended."""
        if self.finished:
            return None
        return self._wave if len(self.alternatives) == len(self.tokens) else self._judging()

    def told(self, rollouts: Rollouts, rewards: Tensor) -> Guided:
        """With what the wave showed and, if it judged candidates, with the best of these by their rewards [k]."""
        place = len(self.tokens)
        if len(self.alternatives) == place:
            shown = (rollouts.observed[name][0, place] for name in ("alternatives", "alternative_logprobs"))
            alternatives, logprobs = shown
            return replace(
                self,
                alternatives=(*self.alternatives, alternatives),
                logprobs=(*self.logprobs, logprobs),
                held=rollouts.held if self.problem.sampling.grammar is None else None,  # it has heard another token
                finished=int(rollouts.lengths[0]) == place,  # no room is left
            )
        best = int((self.logprobs[-1][: len(rewards)] + self.weight * (rewards - rewards.max())).argmax())
        tokens = (*self.tokens, int(self.alternatives[-1][best]))
        ends = rollouts.responses[best].complete or len(tokens) == self.problem.sampling.max_tokens
        return replace(self, tokens=tokens, finished=ends)

    def saying(self, observe: frozenset[Observable]) -> Wave:
        """The whole text as a response, of which nothing is left to decode."""
        return replace(self._wave, observe=observe, enough=None, held=None)

    def beside(self, population: Population) -> Population:
        """The members, and after them the text, which is ended, with a reward of 0."""
        one, size = population.take(torch.tensor([0])), len(self.tokens)
        tokens, alternatives = torch.full_like(one.tokens, -1), torch.zeros_like(one.alternatives)
        logprobs = torch.zeros_like(one.logprobs)
        tokens[0, :size] = torch.tensor(self.tokens)
        alternatives[0, :size] = torch.stack(self.alternatives[:size])
        logprobs[0, :size] = torch.stack(self.logprobs[:size])
        text = replace(
            one,
            tokens=tokens,
            keys=self._keys,
            lengths=torch.tensor([size]),
            nodes=path_nodes(tokens, self.problem.prompt.key),
            rewards=torch.zeros(1),
            alternatives=alternatives,
            logprobs=logprobs,
            scores=torch.zeros_like(one.scores),
        )
        return population.join(text)

    @property
    def _wave(self) -> Wave:
        """One row that goes on from the text so far with tokens of the model's own."""
        prefix = torch.zeros(1, self.problem.sampling.max_tokens, dtype=torch.int64)
        prefix[0, : len(self.tokens)] = torch.tensor(self.tokens, dtype=torch.int64)
        return Wave(
            self.problem.prompt,
            prefix,
            torch.tensor([len(self.tokens)]),
            self._keys,
            replace(self.problem.sampling, temperature=0.0),
            observe=frozenset(("alternatives",)),
            enough=0,
            held=self.held,
        )

    def _judging(self) -> Wave:
        """The text with each of the likeliest tokens that may come next."""
        possible = self.alternatives[-1][: self.candidates][self.logprobs[-1][: self.candidates].isfinite()]
        texts = torch.full((len(possible), len(self.tokens) + 1), -1)
        texts[:, :-1], texts[:, -1] = torch.tensor(self.tokens, dtype=torch.int64), possible
        return spelled(texts, torch.full((len(possible),), texts.shape[1]), self.problem)

    @property
    def _keys(self) -> Tensor:
        return wave_keys(self.problem.prompt.key, _KEYS, torch.arange(1), self.problem.sampling.max_tokens)
