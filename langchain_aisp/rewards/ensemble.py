"""Several rewards that judge the same thing, as one: what they agree on is harder to fool than any of them."""

from __future__ import annotations

import math
from asyncio import AbstractEventLoop
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from langchain_aisp.rewards.callable import as_reward
from langchain_aisp.rewards.combinations import submit_all
from langchain_aisp.rewards.fingerprint import digest
from langchain_aisp.rewards.partial import is_partial
from langchain_aisp.types import Chat, Response, Reward, Ticket, require

Aggregate: TypeAlias = Literal["mean", "minimum", "lower_bound"]


class EnsembleReward:
    """The mean of some rewards, their minimum, or a lower confidence bound. Bring the members to one scale.

    The lower bound is the mean minus ``deviations`` times the standard deviation over the members (of the population,
    so that a single member is its own bound). A search drifts to where one member errs; there the members disagree,
    and the bound falls.

    Raises:
        ValueError: Without members, for an unknown aggregate, or for deviations that are negative or not finite.
        TypeError: For a member that is no reward and cannot be made one.
    """

    def __init__(self, rewards: Iterable[Any], aggregate: Aggregate = "mean", *, deviations: float = 1.0) -> None:
        """Take rewards; functions become rewards by ``as_reward``.

        Args:
            rewards: The members.
            aggregate: ``"mean"``, ``"minimum"`` or ``"lower_bound"``.
            deviations: Standard deviations below the mean; of use with ``"lower_bound"`` only.
        """
        self.rewards: tuple[Reward, ...] = tuple(as_reward(reward) for reward in rewards)
        self.aggregate: Aggregate = aggregate
        self.deviations = float(deviations)
        require(len(self.rewards) > 0, f"{type(self).__name__} needs at least one part")
        require(aggregate in get_args(Aggregate), f"aggregate is one of {get_args(Aggregate)}, got {aggregate!r}")
        fits = 0 <= self.deviations < math.inf
        require(fits, f"deviations must be a finite number from 0 on, got {deviations}; 0 gives the mean")
        unused = aggregate != "lower_bound" and self.deviations != 1.0
        require(not unused, f"deviations only counts with aggregate='lower_bound', got {aggregate!r}")

    @property
    def name(self) -> str:
        """Names of the members and what is made of them."""
        names = ", ".join(reward.name for reward in self.rewards)
        shown = {"mean": "mean", "minimum": "min", "lower_bound": f"lower bound {self.deviations:g}"}
        return f"{shown[self.aggregate]}({names})"

    @property
    def fingerprint(self) -> str:
        """From the settings and the fingerprints of the members."""
        settings = repr((self.aggregate, self.deviations))
        return digest("ensemble", settings, *(reward.fingerprint for reward in self.rewards))

    @property
    def partial(self) -> bool:
        """Whether all members understand unfinished texts."""
        return all(map(is_partial, self.rewards))

    def submit(
        self, pairs: Sequence[tuple[Chat, Response]], *, loop: AbstractEventLoop | None = None
    ) -> Ticket[Tensor]:
        """Ask all members at once; the result is [len(pairs)] float32, an error that of the first member to fail."""
        return submit_all(self.name, self.rewards, self._combine, pairs, loop)

    def _combine(self, scores: Tensor) -> Tensor:
        """Scores [P, n] of the members as one [n]."""
        if self.aggregate == "minimum":
            return scores.amin(dim=0)
        if self.aggregate == "mean":
            return scores.mean(dim=0)
        return scores.mean(dim=0) - self.deviations * scores.std(dim=0, correction=0)


class Minimum(EnsembleReward):
    """The lowest of the parts' rewards: a candidate is as good as its weakest side. Bring the parts to one scale.

    Raises:
        ValueError: Without parts.
        TypeError: For a part that is no reward and cannot be made one.
    """

    def __init__(self, parts: Iterable[Any]) -> None:
        """Take rewards; functions become rewards by ``as_reward``."""
        super().__init__(parts, "minimum")
