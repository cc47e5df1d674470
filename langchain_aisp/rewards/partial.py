"""Rewards that understand unfinished texts: whole ones that say so, and those that tell what each piece is worth.

Such a reward has an attribute ``partial`` that is True. It lets a search ask what the beginnings of a response earn, so
that it cuts where a response loses, and commit an answer block by block.
"""

from __future__ import annotations

import math
from asyncio import AbstractEventLoop
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from langchain_aisp.rewards.base import RewardError, shorten
from langchain_aisp.rewards.fingerprint import digest
from langchain_aisp.types import Chat, Response, Reward, Ticket

Span: TypeAlias = tuple[int, int, float]
"""Start and end of a piece of a text, in characters as in ``text[start:end]``, and what the piece is worth."""

_SPANS = "Return for every response a list of (start, end, value), with 0 <= start <= end <= len(text)."


def is_partial(reward: Reward) -> bool:
    """Whether a reward says that it understands unfinished texts."""
    return bool(getattr(reward, "partial", False))


@dataclass(frozen=True)
class PartialReward:
    """Another reward, with the promise that it understands texts that stop anywhere; see ``as_reward``.

    Attributes:
        reward: Scores, whole texts and beginnings alike.
    """

    reward: Reward

    @property
    def partial(self) -> bool:
        """It understands unfinished texts."""
        return True

    @property
    def rewards(self) -> tuple[Reward]:
        """The reward, so that what it sees is known."""
        return (self.reward,)

    @property
    def name(self) -> str:
        """That of the reward."""
        return self.reward.name

    @property
    def fingerprint(self) -> str:
        """Another one than the reward's: a search that may ask for beginnings finds another answer."""
        return digest("partial", self.reward.fingerprint)

    def submit(
        self, pairs: Sequence[tuple[Chat, Response]], *, loop: AbstractEventLoop | None = None
    ) -> Ticket[Tensor]:
        """Start scoring; see ``Reward``."""
        return self.reward.submit(pairs, loop=loop)


def check_spans(reward: str, answer: object, texts: Sequence[str]) -> list[list[Span]]:
    """Turn what a reward of pieces answered into spans, or say what is wrong with it.

    Args:
        reward: Name of the reward, for the message.
        answer: For each text its spans, see ``Span``, in any order; what no span covers is worth nothing.
        texts: [n] the texts that were scored.

    Raises:
        RewardError: For another shape, a piece outside its text, or a value that is not a finite number.
    """
    lists = _listed(reward, answer, None)
    if len(lists) != len(texts):
        raise RewardError(reward, f"answered {len(lists)} lists of spans for {len(texts)} responses", _SPANS)
    return [
        [_span(reward, each, text) for each in _listed(reward, spans, text)]
        for spans, text in zip(lists, texts, strict=True)
    ]


def _listed(reward: str, answer: object, text: str | None) -> list[Any]:
    if isinstance(answer, str | bytes | Mapping | Set) or not isinstance(answer, Iterable):
        problem = f"answered {type(answer).__name__} ({shorten(repr(answer))}) where a list was expected"
        raise RewardError(reward, problem, _SPANS, text)
    return list(answer)


def _span(reward: str, answer: Any, text: str) -> Span:
    try:
        start, end, value = answer
        place, worth = (int(start), int(end)), float(value)
    except (TypeError, ValueError) as error:
        raise RewardError(reward, f"answered {shorten(repr(answer))} for a span", _SPANS, text) from error
    if not 0 <= place[0] <= place[1] <= len(text):
        raise RewardError(reward, f"answered the span {place} of {len(text)} characters", _SPANS, text)
    if not math.isfinite(worth):
        raise RewardError(reward, f"answered {worth} for the span {place}", "Return a finite number.", text)
    return (*place, worth)


def sum_up_to(spans: Iterable[Span], end: int) -> float:
    """What the first ``end`` characters of a text are worth: a piece counts once it is there to its end."""
    return math.fsum(value for _, last, value in spans if last <= end)


def asked_for(responses: Sequence[Response]) -> list[int]:
    """For each response the number of the one whose spans tell what it is worth.

    A cut-off text that another one goes on from is told by that one's spans, so a search that asks for the beginnings
    of a response has it read once. A whole text is always told by its own.
    """
    order = sorted(range(len(responses)), key=lambda row: responses[row].text)
    owners = list(range(len(responses)))
    for row, following in zip(reversed(order[:-1]), reversed(order), strict=False):
        one, other = responses[row], responses[following]
        if not one.complete and other.text.startswith(one.text):
            owners[row] = owners[following]
    return owners
