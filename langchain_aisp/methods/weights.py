"""From rewards to importance weights, and from a wanted effective sample size to a reward temperature."""

from __future__ import annotations

import math
from bisect import bisect_left
from operator import mul

import torch
from torch import Tensor

from langchain_aisp.noise import gumbel
from langchain_aisp.types import require

_DECADES = 9.0
"""How far, in powers of ten, a reward temperature may lie from the spread of the rewards."""
_STEPS = 4096
"""How many steps that range has; between two of them the effective sample size is nearly straight."""


def importance_weights(rewards: Tensor, reward_temperature: float, cost: Tensor | float = 0.0) -> Tensor:
    """Self-normalised weights ``softmax(rewards / reward_temperature - cost)``.

    Args:
        rewards: [N]; ``-inf`` gives weight 0.
        reward_temperature: λ > 0 in units of the reward; small values keep only the best.
        cost: [N] or a number, in nats.

    Returns:
        [N] float32 weights that sum to one.
    """
    best = rewards.max()  # subtracted before the division, so that adding a constant to the rewards costs no digits
    return ((rewards - best).double() / reward_temperature - cost).softmax(dim=0).float()


def effective_sample_size(weights: Tensor) -> float:
    """How many equally weighted rows the weights [N] are worth, ``1 / Σ w²``: between 1 and N; 0 of none."""
    squares = sum(weight * weight for weight in weights.tolist())
    return 1.0 / squares if squares > 0 else 0.0


def temperature_for_ess(rewards: Tensor, target: float) -> float:
    """The reward temperature at which the weights have a wanted effective sample size.

    The effective sample size grows with the temperature from the number of rows tied for the best to the number of
    finite rewards; a target outside that range gives the nearest end. Equal rewards give equal weights at any
    temperature, and 1 is returned.

    Args:
        rewards: [N]; rows with ``-inf`` do not count.
        target: The wanted effective sample size, at least 1.

    Returns:
        λ > 0, for ``importance_weights``.
    """
    require(target >= 1, f"the target effective sample size must be at least 1, got {target}")
    given = [reward for reward in rewards.tolist() if math.isfinite(reward)]
    best = max(given)
    behind = [reward - best for reward in given]
    spread = -min(behind)
    if spread == 0:
        return 1.0

    def ess(power: float) -> float:
        temperature = spread * 10.0**power
        weights = [math.exp(reward / temperature) for reward in behind]
        squares: float = sum(map(mul, weights, weights))
        return sum(weights) ** 2 / squares

    width = 2 * _DECADES / _STEPS
    after = 1 + bisect_left(range(1, _STEPS), target, key=lambda step: ess(width * step - _DECADES))
    low = width * (after - 1) - _DECADES
    below, above = ess(low), ess(low + width)
    share = (target - below) / (above - below) if above > below else 0.0
    return float(spread * 10.0 ** (low + width * min(max(share, 0.0), 1.0)))


def complete_first(rewards: Tensor, complete: Tensor) -> Tensor:
    """Rewards [N] in which a cut-off row counts as ``-inf``, unless every row is cut off."""
    return rewards.masked_fill(~complete, -torch.inf) if bool(complete.any()) else rewards


def drawn_without_replacement(log_weights: Tensor, keys: Tensor, count: int) -> Tensor:
    """Indices [n] of at most ``count`` items by their log-weights [B], ``-inf`` for never, with noise keys [B].

    Gumbel top-k: Kool et al. 2019, arXiv 1903.06059.
    """
    possible = int(log_weights.isfinite().sum())
    return (log_weights + gumbel(keys)).topk(min(count, possible)).indices
