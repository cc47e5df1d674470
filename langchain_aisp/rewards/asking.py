"""Rewards that ask someone else: settings that are never edited, and one procedure for threads and event loops."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor

from langchain_aisp.rewards.callable import CallableReward
from langchain_aisp.rewards.foreign import is_of_this_process
from langchain_aisp.types import Chat, Response, Ticket, aanswered, answered

Scoring: TypeAlias = Generator[Any, Any, Sequence[float]]
"""Yields questions, is sent their answers, returns one score per response."""


class Settled:
    """A dataclass of settings that are never edited: a copy is the same object, a pickle holds the settings only."""

    def __copy__(self) -> Any:
        """The same object."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The same object."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings; threads, counters, caches and the per-process identity are made anew."""
        settings = {each.name: getattr(self, each.name) for each in fields(self) if each.init}  # type: ignore[arg-type]
        if is_of_this_process(settings["fingerprint"]):
            del settings["fingerprint"]
        return partial(type(self), **settings), ()


class Asking:
    """A scoring procedure that works for callers in threads and for callers on event loops.

    The procedure is a generator, written once; only how its questions are answered differs.
    """

    def __init__(
        self,
        scoring: Callable[[Chat, Sequence[Response]], Scoring],
        ask: Callable[[Any], Any],
        aask: Callable[[Any], Awaitable[Any]] | None,
        *,
        name: str,
        timeout: float | None,
    ) -> None:
        """Set up both ways; without ``aask`` a caller's event loop is served from a thread, too."""
        self._scoring, self._ask, self._aask = scoring, ask, aask
        options: dict[str, Any] = {"name": name, "timeout": timeout, "sees": "response"}
        self._in_thread = CallableReward(self._scores, **options)
        self._on_loop = self._in_thread if aask is None else CallableReward(self._scores_async, **options)

    def submit(self, pairs: Sequence[tuple[Chat, Response]], loop: AbstractEventLoop | None) -> Ticket[Tensor]:
        """Start scoring; the procedure runs once per distinct conversation."""
        return (self._in_thread if loop is None else self._on_loop).submit(pairs, loop=loop)

    def _scores(self, chat: Chat, responses: Sequence[Response]) -> Sequence[float]:
        return answered(self._scoring(chat, responses), self._ask)

    async def _scores_async(self, chat: Chat, responses: Sequence[Response]) -> Sequence[float]:
        assert self._aask is not None
        return await aanswered(self._scoring(chat, responses), self._aask)
