"""One response of likeliest tokens: what the model says by itself, and how likely that is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from langchain_aisp.noise import wave_keys
from langchain_aisp.types import Info, Observable, Problem, Rollouts, Wave


@dataclass(frozen=True)
class Greedy:
    """Take the likeliest token at every position (argmax decoding), once; the reward has no say.

    The info's ``base_logprob`` is the natural logarithm of the response's probability under the model at temperature 1,
    among what a grammar allows.
    """

    @property
    def name(self) -> str:
        """Short name for tables and metadata."""
        return "greedy"

    @property
    def iterations(self) -> int:
        """One wave."""
        return 1

    def init(self, problem: Problem) -> Problem:
        """Nothing to remember but what is asked."""
        return replace(problem, sampling=replace(problem.sampling, temperature=0.0))

    def propose(self, state: Problem) -> Wave:
        """One row without noise."""
        keys = wave_keys(state.prompt.key, 0, torch.arange(1), state.sampling.max_tokens)
        start = torch.zeros(1, dtype=torch.int64)
        observe: frozenset[Observable] = frozenset(("base_logprobs",))
        return Wave(state.prompt, torch.zeros_like(keys), start, keys, state.sampling, observe=observe)

    def update(self, state: Problem, wave: Wave, rollouts: Rollouts, rewards: Tensor) -> tuple[Problem, Info]:
        """Nothing is learned."""
        written = torch.arange(rollouts.tokens.shape[1]) < rollouts.lengths[:, None]
        logprob = rollouts.observed["base_logprobs"].where(written, 0).sum()
        return state, {"ess": 1.0, "control_kl": 0.0, "base_logprob": float(logprob)}
