"""AISP as published: one Gaussian over a sequence of pre-logit controls, its mean moved by importance sampling.

Source: "Adaptive importance sampling on pre-logits", arXiv 2510.26219. What the paper states stands here and nothing
else; what is not public (its default settings, and whether a token is drawn or taken by argmax) is an option.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from langchain_aisp.methods.weights import complete_first, effective_sample_size, importance_weights
from langchain_aisp.noise import normal, wave_keys
from langchain_aisp.types import Info, Problem, Rollouts, Wave, require

_CHUNK = 1 << 22
"""Numbers of regenerated noise held at once: 16 MiB."""


@dataclass(frozen=True)
class GaussianSteering:
    """Adds ``v_t = mean[t] + sigma * noise(key)`` to the pre-logits at positions t < T, and nothing from T on.

    Attributes:
        mean: [T, D] float32.
        sigma: Standard deviation of each component, in units of the pre-logits.
    """

    mean: Tensor
    sigma: float

    @property
    def open_loop(self) -> bool:
        """Controls do not depend on the model's pre-logits."""
        return True

    def offset(self, rows: Tensor, positions: Tensor, keys: Tensor, hidden: Tensor | None) -> Tensor:
        """Controls [r, D] of some rows at their positions [r] with their keys [r]; see ``Steering``."""
        horizon, width = self.mean.shape
        controls = self.mean[positions.clamp(max=horizon - 1)] + self.sigma * normal(keys, width)
        return controls.masked_fill((positions >= horizon).unsqueeze(1), 0.0)

    def sequences(self, keys: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The control sequences of all rows, regenerated from their keys [N, L]: a few rows and their [n, T, D]."""
        horizon, width = self.mean.shape
        size = max(1, _CHUNK // (horizon * width))
        for first in range(0, len(keys), size):
            rows = slice(first, first + size)
            yield rows, self.mean + self.sigma * normal(keys[rows, :horizon], width)


@dataclass(frozen=True)
class PublishedState:
    """What is being answered, which iteration comes next, and its mean control U [T, D]."""

    problem: Problem
    iteration: int
    mean: Tensor


@dataclass(frozen=True)
class PublishedAISP:
    """The published search: κ iterations of n responses under controls ``v_t ~ N(u_t, σ² I)``, t < T.

    With rewards r_i and control sequences V_i, the mean moves to ``U ← Σ_i w_i V_i``, where
    ``w_i = softmax_i(r_i / λ - ((1 - α) / σ²) Σ_t u_t · v_t^i)``. The best response of all is the answer. Unlike in
    the default method there is no wave of plain samples, and so no promise to match Best-of-N.

    The published form and its symbols are the paper's. The default values are ours, near those that others report for
    it (σ² = 0.5, α = 0.999, λ from 0.3 to 1, n = κ = 32). Beyond the paper, a response cut off by a limit gets weight
    0 where another one is complete.

    Attributes:
        samples_per_iteration: n.
        iterations: κ.
        sigma: σ, absolute, as in the paper: what it does depends on the scale of the model's pre-logits and head.
        reward_temperature: λ, in units of the reward.
        alpha: α; 1 ignores how far the controls are from the model's own, 0 charges the full KL divergence.
        horizon: T, the paper's window τ; None controls all of ``max_tokens``.
        decode: ``argmax`` makes the response a function of its controls; ``sample`` draws its tokens on top of them, as
            a budget of KL divergence needs it (``Budget.kl_budget``).
    """

    samples_per_iteration: int = 32
    iterations: int = 32
    sigma: float = 0.7071
    reward_temperature: float = 0.5
    alpha: float = 0.999
    horizon: int | None = None
    decode: Literal["argmax", "sample"] = "argmax"

    def __post_init__(self) -> None:
        """Reject settings for which the formula has no value."""
        count = self.samples_per_iteration
        require(count >= 1, f"samples_per_iteration must be at least 1, got {count}")
        require(self.iterations >= 1, f"iterations must be at least 1, got {self.iterations}")
        require(self.sigma > 0, f"sigma must be positive, got {self.sigma}")
        require(self.reward_temperature > 0, f"reward_temperature must be positive, got {self.reward_temperature}")
        require(0 <= self.alpha <= 1, f"alpha must be in [0, 1], got {self.alpha}")
        require(self.horizon is None or self.horizon >= 1, f"horizon must be at least 1, got {self.horizon}")
        require(self.decode in ("argmax", "sample"), f"decode must be 'argmax' or 'sample', got {self.decode!r}")

    @property
    def name(self) -> str:
        """Short name for tables and metadata."""
        return "published_aisp"

    def init(self, problem: Problem) -> PublishedState:
        """Start from the model itself: the mean control is zero."""
        sampling = replace(problem.sampling, temperature=0.0) if self.decode == "argmax" else problem.sampling
        horizon = min(self.horizon or sampling.max_tokens, sampling.max_tokens)
        return PublishedState(replace(problem, sampling=sampling), 0, torch.zeros(horizon, problem.head.width))

    def propose(self, state: PublishedState) -> Wave:
        """Responses from scratch under controls around the mean."""
        prompt, sampling = state.problem.prompt, state.problem.sampling
        rows = torch.arange(self.samples_per_iteration)
        keys = wave_keys(prompt.key, state.iteration, rows, sampling.max_tokens)
        steering = GaussianSteering(state.mean, self.sigma)
        return Wave(prompt, torch.zeros_like(keys), torch.zeros_like(rows), keys, sampling, steering)

    def update(
        self, state: PublishedState, wave: Wave, rollouts: Rollouts, rewards: Tensor
    ) -> tuple[PublishedState, Info]:
        """Move the mean to the importance-weighted average of the wave's controls."""
        rewards = complete_first(rewards, rollouts.complete)
        weights = self.weights(state.mean, wave.keys, rewards)
        mean = self.average(state.mean, wave.keys, weights)
        info = {
            "ess": effective_sample_size(weights),
            "control_kl": float(mean.square().sum()) / (2 * self.sigma**2),
        }
        return replace(state, iteration=state.iteration + 1, mean=mean), info

    def weights(self, mean: Tensor, keys: Tensor, rewards: Tensor) -> Tensor:
        """The weights w [N] of the controls that the keys [N, L] gave around the mean [T, D]."""
        sequences = GaussianSteering(mean, self.sigma).sequences(keys)
        products = torch.cat([torch.einsum("td,ntd->n", mean, controls) for _, controls in sequences])
        return importance_weights(rewards, self.reward_temperature, (1 - self.alpha) / self.sigma**2 * products)

    def average(self, mean: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
        """The average [T, D] of the controls that the keys [N, L] gave around the mean [T, D], weighted by [N]."""
        keys, weights = keys[weights > 0], weights[weights > 0]  # often few, and their noise need not be made again
        sequences = GaussianSteering(mean, self.sigma).sequences(keys)
        return sum(
            (torch.einsum("n,ntd->td", weights[rows], controls) for rows, controls in sequences),
            start=torch.zeros_like(mean),
        )
