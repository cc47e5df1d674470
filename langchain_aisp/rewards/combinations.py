"""A weighted sum of rewards, and the joining of what several rewards answer, which every combination uses."""

from __future__ import annotations

import math
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from langchain_aisp.futures import gather
from langchain_aisp.rewards.base import check_scores
from langchain_aisp.rewards.callable import as_reward
from langchain_aisp.rewards.fingerprint import digest
from langchain_aisp.rewards.partial import is_partial
from langchain_aisp.types import Chat, Response, Reward, Ticket, require


class WeightedSum:
    """The sum of weight times reward over the parts.

    Raises:
        ValueError: Without parts, or for a weight that is not a finite number.
        TypeError: For a part that is no reward and cannot be made one.
    """

    def __init__(self, parts: Mapping[Any, float] | Iterable[tuple[Any, float]]) -> None:
        """Take ``{reward: weight, …}`` or ``[(reward, weight), …]``; functions become rewards by ``as_reward``."""
        given = list(parts.items()) if isinstance(parts, Mapping) else list(parts)
        require(len(given) > 0, "WeightedSum needs at least one part, such as [(reward, 1.0)]")
        self.rewards: tuple[Reward, ...] = tuple(as_reward(reward) for reward, _ in given)
        self.weights: tuple[float, ...] = tuple(float(weight) for _, weight in given)
        require(all(map(math.isfinite, self.weights)), f"weights must be finite numbers, got {self.weights}")

    @property
    def name(self) -> str:
        """Weights and names of the parts."""
        terms = zip(self.weights, self.rewards, strict=True)
        return " + ".join(f"{weight:g}·{reward.name}" for weight, reward in terms)

    @property
    def fingerprint(self) -> str:
        """From the weights and fingerprints of the parts."""
        return digest("weighted sum", *map(repr, self.weights), *(reward.fingerprint for reward in self.rewards))

    @property
    def partial(self) -> bool:
        """Whether all parts understand unfinished texts."""
        return all(map(is_partial, self.rewards))

    def submit(
        self, pairs: Sequence[tuple[Chat, Response]], *, loop: AbstractEventLoop | None = None
    ) -> Ticket[Tensor]:
        """Ask all parts at once; the result is [len(pairs)] float32, an error that of the first part to fail."""
        return submit_all(self.name, self.rewards, self._add, pairs, loop)

    def _add(self, scores: Tensor) -> Tensor:
        return torch.einsum("p,pn->n", torch.tensor(self.weights, dtype=torch.float64), scores)


def submit_all(
    name: str,
    rewards: Sequence[Reward],
    combine: Callable[[Tensor], Tensor],
    pairs: Sequence[tuple[Chat, Response]],
    loop: AbstractEventLoop | None,
) -> Ticket[Tensor]:
    """Ask all parts at once and combine their scores [P, n] to [n]."""
    texts = [response.text for _, response in pairs]
    checks = [partial(check_scores, reward.name, responses=texts) for reward in rewards]

    def joined(answers: list[Tensor]) -> Tensor:
        scores = torch.stack([check(scores=answer) for check, answer in zip(checks, answers, strict=True)])
        return check_scores(name, combine(scores.double()), texts)

    return gather([reward.submit(pairs, loop=loop).future for reward in rewards], joined)
