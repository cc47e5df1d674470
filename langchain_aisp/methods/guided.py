"""A text written token by token, as its beginnings earn: a parent of a kind that plain samples hardly bring.

With a reward that understands unfinished texts, a text can be led to what it wants at every token. Such a text earns
much and is often odd; as one of the parents it lends its words to the others and is mended by branches of its own.

Source: the rule by which the text is written is ARGS, arXiv 2402.01694; a weight in units of the rewards' spread, and
the text as a parent of a search, are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from langchain_aisp.methods.args import ARGS, ARGSState
from langchain_aisp.methods.branching import Population, path_nodes
from langchain_aisp.methods.lookahead import Branches
from langchain_aisp.noise import wave_keys
from langchain_aisp.types import Problem, Rollouts, Wave

CANDIDATES = 10  # tokens that are judged at each position, as published for ARGS
_KEYS = -1  # an iteration below all others: no row has noise of the same keys


@dataclass(frozen=True)
class Guided:
    """Such a text under way, and what the model would have said in its place.

    Attributes:
        args: Chooses the tokens.
        writing: How far the text is.
        alternatives: The model's likeliest tokens [K] at each of its positions.
        logprobs: Their log-probabilities [K].
    """

    args: ARGS
    writing: ARGSState
    alternatives: tuple[Tensor, ...] = ()
    logprobs: tuple[Tensor, ...] = ()

    @classmethod
    def begun(cls, problem: Problem, weight: float, candidates: int = CANDIDATES) -> Guided:
        """Before the first token.

        Args:
            problem: What is answered.
            weight: Nats that a unit of the reward is worth.
            candidates: Tokens that are judged at each position.
        """
        args = ARGS(weight=weight, candidates=candidates)
        return cls(args, args.init(problem))

    @property
    def wave(self) -> Wave | None:
        """Beginnings that are to be scored next; None once the text has ended."""
        return None if self.writing.finished else self.args.propose(self.writing)

    def told(self, rollouts: Rollouts, rewards: Tensor) -> Guided:
        """With what the wave said and earned [N]."""
        wave = self.wave
        assert wave is not None, "a text that has ended asks for nothing"
        writing, _ = self.args.update(self.writing, wave, rollouts, rewards)
        if not wave.observe:
            return replace(self, writing=writing)
        alternatives, logprobs = (
            rollouts.observed[name][0, wave.cut[0]] for name in ("alternatives", "alternative_logprobs")
        )
        return replace(
            self,
            writing=writing,
            alternatives=(*self.alternatives, alternatives),
            logprobs=(*self.logprobs, logprobs),
        )

    @property
    def tokens(self) -> tuple[int, ...]:
        """The text; empty as long as it has not ended."""
        return self.writing.chains[0].tokens if self.writing.finished else ()

    def beside(self, population: Population) -> Population:
        """The members, and after them the text with a reward of 0, if it has ended."""
        size = len(self.tokens)
        if size == 0:
            return population
        one = population.take(torch.tensor([0]))
        tokens, alternatives = torch.full_like(one.tokens, -1), torch.zeros_like(one.alternatives)
        logprobs = torch.zeros_like(one.logprobs)
        tokens[0, :size] = torch.tensor(self.tokens)
        alternatives[0, :size] = torch.stack(self.alternatives[:size])
        logprobs[0, :size] = torch.stack(self.logprobs[:size])
        key = self.writing.problem.prompt.key
        text = replace(
            one,
            tokens=tokens,
            keys=wave_keys(key, _KEYS, torch.arange(1), tokens.shape[1]),
            lengths=torch.tensor([size]),
            nodes=path_nodes(tokens, key),
            rewards=torch.zeros(1),
            alternatives=alternatives,
            logprobs=logprobs,
            scores=torch.zeros_like(one.scores),
        )
        return population.join(text)

    def before(self, branches: Branches, population: Population) -> Branches:
        """The text as a branch of itself that keeps all of it, and then the branches; ``population`` is ``beside``."""
        if not self.tokens:
            return branches
        last, end = len(population) - 1, len(self.tokens) - 1
        own = Branches(*(torch.tensor([value]) for value in (last, end, self.tokens[end], population.nodes[last, end])))
        return own.join(branches)
