"""Scoring ahead: what a row says is judged as soon as it ends, while the other rows of its wave still decode.

Only for rewards that say that they wait for somebody else (``waits``): one that computes on the same cores would take
from decoding what it gains, and judge in smaller batches.
"""

from __future__ import annotations

import json
from asyncio import AbstractEventLoop
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor

from langchain_aisp.futures import gather, settle
from langchain_aisp.types import Chat, Response, Reward, Rollouts, Ticket, parts_of

T = TypeVar("T")


def waits(reward: Reward) -> bool:
    """Whether a reward says that its scores mostly wait for somebody else, such as a server; or all its parts do."""
    return all(getattr(part, "waits", False) for part in parts_of(reward))


def identity(response: Response) -> Hashable:
    """What makes two responses the same to a reward; tool calls are dicts, so they are compared as text."""
    tool_calls = json.dumps([response.tool_calls, response.invalid_tool_calls], default=repr)
    return (response.text, response.finish_reason, response.reasoning, tool_calls)


class Ahead:
    """The reward of one search, asked before the search asks.

    One batch is under way at a time, and what ends meanwhile makes the next one: so batches grow with the time that the
    reward takes, and it is not asked about hundreds of rows one by one. When the search asks, nothing waits any longer,
    so then there may be two. Each response is asked about once. Reached from the caller's thread, the engine's and the
    reward's.
    """

    def __init__(self, reward: Reward, chat: Chat, loop: AbstractEventLoop | None) -> None:
        """Score responses to ``chat`` for a caller with this running loop; to be made where the caller is.

        Tracing and callbacks hang on the context, which follows each call of the reward.
        """
        self._reward, self._chat, self._loop = reward, chat, loop
        self._context = copy_context()
        self._lock = Lock()
        self._scores: dict[Hashable, Future[float]] = {}
        self._waiting: list[tuple[Response, Future[float]]] = []
        self._batches = 0  # that are under way, one of them perhaps not yet known by its ticket
        self._tickets: list[Ticket[Tensor]] = []
        self._abandoned = False

    def tell(self, responses: Sequence[Response]) -> None:
        """Some rows have said this; from the engine's thread, which must not be held up and may get no error."""
        self._note(responses)
        if not self._batches:
            self._ask()

    def during(self, ticket: Ticket[Rollouts]) -> Ticket[Rollouts]:
        """The ticket of a wave, whose failing abandons the scores, too."""
        return Ticket(self._watched(ticket.future), ticket.cancel)

    def submit(self, pairs: Sequence[tuple[Chat, Response]]) -> Ticket[Tensor]:
        """The scores [len(pairs)] float32 that a search asks for, most of which may be there."""
        futures = self._note([response for _, response in pairs])
        self._ask()
        return Ticket(self._watched(gather(futures, partial(torch.tensor, dtype=torch.float32)).future))

    def _watched(self, future: Future[T]) -> Future[T]:
        """The future; if it is cancelled or fails, so does the search, and nobody wants scores any more."""

        def ended(future: Future[T]) -> None:
            if not future.cancelled() and future.exception() is None:
                return
            with self._lock:
                self._abandoned = True
                tickets = list(self._tickets)
            for ticket in tickets:
                ticket.cancel()

        future.add_done_callback(ended)
        return future

    def _note(self, responses: Sequence[Response]) -> list[Future[float]]:
        """Where the scores of the responses will be; those that are new wait to be asked about."""
        keys = [identity(response) for response in responses]
        with self._lock:
            for key, response in zip(keys, responses, strict=True):
                if key not in self._scores:
                    self._scores[key] = Future()
                    self._waiting.append((response, self._scores[key]))
            return [self._scores[key] for key in keys]

    def _ask(self) -> None:
        """Send off what waits."""
        with self._lock:
            batch, self._waiting = self._waiting, []
            if not batch or self._abandoned:
                return
            self._batches += 1
        ticket = self._start([response for response, _ in batch])
        with self._lock:
            self._tickets.append(ticket)
            abandoned = self._abandoned
        if abandoned:
            ticket.cancel()
        ticket.future.add_done_callback(partial(self._arrived, ticket, [future for _, future in batch]))

    def _start(self, batch: Sequence[Response]) -> Ticket[Tensor]:
        """Ask the reward; what it raises at once is its answer, too."""
        pairs = [(self._chat, response) for response in batch]
        try:
            return self._context.copy().run(self._reward.submit, pairs, loop=self._loop)
        except Exception as error:
            failed: Future[Tensor] = Future()
            failed.set_exception(error)
            return Ticket(failed)

    def _arrived(self, ticket: Ticket[Tensor], futures: Sequence[Future[float]], answer: Future[Tensor]) -> None:
        with self._lock:
            self._batches -= 1
            self._tickets.remove(ticket)
        for row, future in enumerate(futures):
            settle(future, partial(_score, answer, row, len(futures)))
        self._ask()


def _score(answer: Future[Tensor], row: int, rows: int) -> float:
    scores = answer.result()
    assert scores.shape == (rows,), f"{rows} pairs got rewards of shape {tuple(scores.shape)}"
    return float(scores[row])
