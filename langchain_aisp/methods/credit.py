"""Credit per position: what a response earns after each of its tokens, told by what its beginnings earn by themselves.

A reward that understands unfinished texts gives every beginning of a response a value, and the steps between them sum
to the whole reward. So what follows position t earns the whole reward less that of the first t tokens, and a response
is best cut where others have earned most more from there on than it has.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from langchain_aisp.methods.branching import Population
from langchain_aisp.methods.weights import temperature_for_ess
from langchain_aisp.types import Problem, Wave

_CHECKPOINTS = 8  # beginnings of one response that are scored at most: the calls of the reward stay bounded
_CUT_SHARE = 0.2  # of all positions: the effective number of those where cuts fall
_LEAST = -50.0  # log-weight: such a cut is made only when no better one is left, but it is not lost to rounding


def checkpoints(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The beginnings to be scored of responses with these lengths [M].

    They end at multiples of a power of two, so that a longer answer, or a child of a known one, has many in common
    with it: what is known already is not scored again.

    Returns:
        Response [B] and kept tokens [B], from one token on and short of the whole.
    """
    longest = int(lengths.max())
    step = 1
    while longest > step * _CHECKPOINTS:
        step *= 2
    grid = torch.arange(step, max(longest, step), step)
    member, column = (grid < lengths[:, None]).nonzero().unbind(dim=1)
    return member, grid[column]


def beginnings(population: Population, problem: Problem) -> Wave:
    """The members' beginnings as a wave in which nothing is decoded; no rows if all members are too short."""
    member, kept = checkpoints(population.lengths)
    return spelled(population.tokens[member], kept, problem)


def spelled(tokens: Tensor, kept: Tensor, problem: Problem) -> Wave:
    """Texts of tokens [B, L], of which ``kept`` [B] count, as a wave in which nothing is decoded."""
    prefix = tokens.masked_fill(torch.arange(tokens.shape[1]) >= kept[:, None], -1)
    sampling = replace(problem.sampling, grammar=None)  # nothing is drawn
    return Wave(problem.prompt, prefix, kept, torch.zeros_like(prefix), sampling, forced=True)


def rewards_to_go(population: Population, values: Tensor) -> Tensor:
    """What each member earns after its first t tokens.

    Between checkpoints earnings are spread evenly. What no token at all earns is not asked, since some rewards fail on
    an empty text; it is the same for all members and taken to be the least that any first beginning earns.

    Args:
        population: M members.
        values: [B] rewards of their beginnings, see ``checkpoints``.

    Returns:
        [M, L] float32, 0 from a member's end on.
    """
    member, kept = checkpoints(population.lengths)
    first = values[kept == kept.min()].min() if len(kept) else population.rewards.min()
    positions = torch.arange(population.tokens.shape[1])
    earned = [
        _interpolated(
            torch.cat([torch.zeros(1, dtype=torch.int64), kept[member == row], population.lengths[row : row + 1]]),
            torch.cat([first[None], values[member == row], population.rewards[row : row + 1]]),
            positions,
        )
        for row in range(len(population))
    ]
    return population.rewards[:, None] - torch.stack(earned)


def _interpolated(points: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """Values [L] at the places ``at`` [L], linear between rising points [P], constant beyond the last one."""
    right = torch.searchsorted(points, at, right=True).clamp(max=len(points) - 1)
    left = (right - 1).clamp(min=0)
    share = (at - points[left]) / (points[right] - points[left]).clamp(min=1)
    return torch.lerp(values[left], values[right], share.clamp(max=1))


def cut_log_weights(population: Population, to_go: Tensor) -> Tensor:
    """How much more than elsewhere a cut is worth at each position [M, L]; log-weights, 0 where it is worth most.

    A cut keeps what the member has earned so far, and at best earns what the best member earns from there on. That gain
    over what the member earns by itself is divided by a temperature at which so many positions as ``_CUT_SHARE`` says
    stay in play, so a reward's scale does not matter.
    """
    possible = torch.arange(to_go.shape[1]) < population.lengths[:, None]
    if not bool(possible.any()):  # time was up before the first token
        return torch.zeros_like(to_go)
    gains = to_go.amax(dim=0) - to_go
    seen = gains[possible]
    temperature = temperature_for_ess(seen, max(1.0, _CUT_SHARE * len(seen)))
    return ((gains - seen.max()) / temperature).clamp(min=_LEAST).where(possible, 0)
