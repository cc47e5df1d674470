"""MISVO: a policy gradient in pre-logit space, in the model's own (Fisher) metric, held to the model by a KL penalty.

Known to us by name, its two settings (η = 0.1, λ = 1) and its family: "score-function update with a Fisher-metric KL
penalty". Paper and code are not public in what we could read, so the update below is the plainest member of the family.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from langchain_aisp.methods.weights import complete_first
from langchain_aisp.noise import wave_keys
from langchain_aisp.types import Info, Observable, Problem, Rollouts, Wave, require

_FLOOR = 0.1  # of the Fisher matrix's mean eigenvalue: directions that few samples have shown are not trusted


@dataclass(frozen=True)
class PositionSteering:
    """Adds a control to each position t < T, the same for all rows, and nothing from T on.

    Attributes:
        controls: [T, D] float32.
    """

    controls: Tensor

    @property
    def open_loop(self) -> bool:
        """Controls do not depend on the model's pre-logits."""
        return True

    def offset(self, rows: Tensor, positions: Tensor, keys: Tensor, hidden: Tensor | None) -> Tensor:
        """Controls [r, D] of some rows at their positions [r]; see ``Steering``."""
        horizon = len(self.controls)
        controls = self.controls[positions.clamp(max=horizon - 1)]
        return controls.masked_fill((positions >= horizon).unsqueeze(1), 0.0)


@dataclass(frozen=True)
class MISVOState:
    """What is being answered, and what is known of the controls.

    Attributes:
        problem: What to answer.
        iteration: The next iteration.
        controls: U [T, D].
        fisher: [D, D], the sum over all decoded tokens of score times score.
        tokens: How many tokens that were.
    """

    problem: Problem
    iteration: int
    controls: Tensor
    fisher: Tensor
    tokens: int


@dataclass(frozen=True)
class MISVO:
    """Controls that follow the score function: iterations of samples, each a natural-gradient step of their rewards.

    With scores ``s_t = ∇_h log p(y_t)`` of the sampled tokens, advantages a and the Fisher matrix ``F = E[s sᵀ]``, the
    objective ``E[a] - λ Σ_t u_t·F u_t / 2`` (the second term is the KL divergence to second order) has the gradient
    ``g_t - λ F u_t`` with ``g_t = E[a s_t]``, and the step in F's metric is ``u_t ← u_t + η (F⁻¹ g_t - λ u_t)``. The
    rest point is the control whose log-odds are advantages over λ. Tokens are sampled, under ``u_t`` added to the
    pre-logits; the best response of all is the answer. The first wave is that of ``BestOfN`` with the same seed, so the
    answer is never worse than that wave's best.

    Given are η = 0.1, λ = 1, the score-function update and the Fisher-metric KL penalty. Ours are: the step in F's
    metric (a plain step would depend on the scale of the head); one control per position, shared by the samples; one F
    for all positions, from all tokens so far, its eigenvalues raised by a tenth of their mean; advantages in standard
    deviations of the wave's rewards, centred among the rows that reach a position; scores under the unsteered model,
    which the centring makes right to first order; samples per iteration and iterations, as of those who compare it
    with AISP.

    A control learns nothing at temperature 0, where all rows are the same.

    Attributes:
        samples_per_iteration: n.
        iterations: κ.
        learning_rate: η.
        kl_penalty: λ, in standard deviations of the reward per nat.
        horizon: T; None controls all of ``max_tokens``.
    """

    samples_per_iteration: int = 32
    iterations: int = 32
    learning_rate: float = 0.1
    kl_penalty: float = 1.0
    horizon: int | None = None

    def __post_init__(self) -> None:
        """Reject settings that learn nothing or run away."""
        count, rate, penalty = self.samples_per_iteration, self.learning_rate, self.kl_penalty
        require(count >= 1, f"samples_per_iteration must be at least 1, got {count}")
        require(self.iterations >= 1, f"iterations must be at least 1, got {self.iterations}")
        require(rate > 0, f"learning_rate must be positive, got {rate}")
        require(penalty >= 0, f"kl_penalty must not be negative, got {penalty}; 0 forgets the model")
        require(
            rate * penalty <= 1,
            f"learning_rate times kl_penalty must be at most 1, or steps overshoot the model; got {rate * penalty:g}",
        )
        require(self.horizon is None or self.horizon >= 1, f"horizon must be at least 1, got {self.horizon}")

    @property
    def name(self) -> str:
        """Short name for tables and metadata."""
        return "misvo"

    def init(self, problem: Problem) -> MISVOState:
        """Start from the model itself."""
        width, most = problem.head.width, problem.sampling.max_tokens
        controls = torch.zeros(min(self.horizon or most, most), width)
        return MISVOState(problem, 0, controls, torch.zeros(width, width), 0)

    def propose(self, state: MISVOState) -> Wave:
        """Samples from scratch under the controls."""
        prompt, sampling = state.problem.prompt, state.problem.sampling
        rows = torch.arange(self.samples_per_iteration)
        keys = wave_keys(prompt.key, state.iteration, rows, sampling.max_tokens)
        steering = PositionSteering(state.controls) if state.iteration > 0 else None
        observe: frozenset[Observable] = frozenset(("scores",))
        return Wave(prompt, torch.zeros_like(keys), torch.zeros_like(rows), keys, sampling, steering, observe)

    def update(self, state: MISVOState, wave: Wave, rollouts: Rollouts, rewards: Tensor) -> tuple[MISVOState, Info]:
        """Take a step along the wave's scores."""
        written = torch.arange(wave.keys.shape[1]) < rollouts.lengths[:, None]
        scores = rollouts.observed["scores"].where(written[..., None], 0)
        seen = scores[written]
        fisher, tokens = state.fisher + seen.T @ seen, state.tokens + len(seen)
        slopes = slopes_of(scores, advantages(rewards, rollouts.complete, written))[: len(state.controls)]
        rise = _solve(fisher / max(tokens, 1), slopes)
        controls = state.controls + self.learning_rate * (rise - self.kl_penalty * state.controls)
        nats = torch.einsum("td,de,te->", controls, fisher / max(tokens, 1), controls) / 2
        after = replace(state, iteration=state.iteration + 1, controls=controls, fisher=fisher, tokens=tokens)
        return after, {"ess": float(len(wave)), "control_kl": max(0.0, float(nats))}


def advantages(rewards: Tensor, complete: Tensor, written: Tensor) -> Tensor:
    """How much better than the others of its position each row did, in standard deviations of the wave's rewards.

    A cut-off row counts as the worst complete one.

    Args:
        rewards: [N] float32.
        complete: [N] bool.
        written: [N, L] bool, which positions a row has reached.

    Returns:
        [N, L] float32; 0 where nothing is written, and everywhere when all rewards are equal.
    """
    rewards = complete_first(rewards - rewards.max(), complete)  # the difference: a constant must cost no digits
    rewards = rewards.clamp(min=float(rewards[rewards.isfinite()].min()))
    deviation = rewards.std(correction=0)
    if deviation == 0:
        return torch.zeros(written.shape)
    counts = written.sum(dim=0).clamp(min=1)
    means = torch.einsum("n,nt->t", rewards, written.float()) / counts
    return ((rewards[:, None] - means) / deviation).where(written, 0)


def slopes_of(scores: Tensor, advantages: Tensor) -> Tensor:
    """``g_t = E[a s_t]`` [L, D] from scores [N, L, D] and advantages [N, L]."""
    return torch.einsum("nt,ntd->td", advantages, scores) / len(scores)


def _solve(fisher: Tensor, slopes: Tensor) -> Tensor:
    """``F⁻¹ g_t`` [T, D] of the slopes [T, D]; none where no token has shown anything."""
    mean = fisher.diagonal().mean()
    if mean == 0:
        return torch.zeros_like(slopes)
    floored = fisher + _FLOOR * mean * torch.eye(len(fisher))
    solved: Tensor = torch.linalg.solve(floored, slopes.T).T
    return solved
