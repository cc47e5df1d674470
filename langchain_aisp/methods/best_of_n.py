"""Best-of-N: plain samples of the model, of which the best is kept; the yardstick for every other search."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from langchain_aisp.noise import wave_keys
from langchain_aisp.types import Info, Problem, Rollouts, Wave, require


@dataclass(frozen=True)
class BestOfNState:
    """What is being answered, and how many samples are drawn."""

    problem: Problem
    drawn: int


@dataclass(frozen=True)
class BestOfN:
    """Draw independent samples and keep the best.

    A sample's noise depends on its number only: the first 32 of ``BestOfN(64)`` are those of ``BestOfN(32)``, and the
    size of the waves changes nothing but speed.

    Attributes:
        samples: Responses in all.
        temperature: Sampling temperature; None takes the request's.
        top_p: Nucleus mass; None takes the request's.
        samples_per_wave: Responses decoded together.
    """

    samples: int = 256
    temperature: float | None = None
    top_p: float | None = None
    samples_per_wave: int = 32

    def __post_init__(self) -> None:
        """Reject settings that draw nothing, now rather than at the first request."""
        require(self.samples >= 1, f"samples must be at least 1, got {self.samples}")
        temperature, top_p = self.temperature, self.top_p
        require(temperature is None or temperature >= 0, f"temperature must not be negative, got {temperature}")
        require(top_p is None or 0 < top_p <= 1, f"top_p must be in (0, 1], got {top_p}")
        require(self.samples_per_wave >= 1, f"samples_per_wave must be at least 1, got {self.samples_per_wave}")

    @property
    def name(self) -> str:
        """Short name for tables and metadata."""
        return "best_of_n"

    @property
    def iterations(self) -> int:
        """Waves that the samples take."""
        return math.ceil(self.samples / self.samples_per_wave)

    def init(self, problem: Problem) -> BestOfNState:
        """Settle the sampling once; nothing is drawn yet."""
        asked = problem.sampling
        sampling = replace(
            asked,
            temperature=asked.temperature if self.temperature is None else self.temperature,
            top_p=asked.top_p if self.top_p is None else self.top_p,
        )
        return BestOfNState(replace(problem, sampling=sampling), drawn=0)

    def propose(self, state: BestOfNState) -> Wave:
        """The next samples, from scratch and unsteered."""
        prompt, sampling = state.problem.prompt, state.problem.sampling
        numbers = torch.arange(state.drawn, min(state.drawn + self.samples_per_wave, self.samples))
        keys = wave_keys(prompt.key, 0, numbers, sampling.max_tokens)
        return Wave(prompt, torch.zeros_like(keys), torch.zeros_like(numbers), keys, sampling)

    def update(self, state: BestOfNState, wave: Wave, rollouts: Rollouts, rewards: Tensor) -> tuple[BestOfNState, Info]:
        """Nothing is learned; every sample weighs the same."""
        return replace(state, drawn=state.drawn + len(wave)), {"ess": float(len(wave)), "control_kl": 0.0}
