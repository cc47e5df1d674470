"""Futures that several threads may complete or abandon, and the joining of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from threading import Lock
from typing import Any, TypeVar

from langchain_aisp.types import Ticket

T = TypeVar("T")
R = TypeVar("R")


def settle(future: Future[T], make: Callable[[], T]) -> None:
    """Complete a future with what ``make`` returns or raises; one that was cancelled or timed out stays as it is."""
    try:
        value = make()
    except BaseException as error:
        fail(future, error)
    else:
        _unless_done(lambda: future.set_result(value))


def fail(future: Future[Any], error: BaseException) -> None:
    """Complete a future with an error, unless it is done."""
    _unless_done(lambda: future.set_exception(error))


def _unless_done(complete: Callable[[], None]) -> None:
    try:
        complete()
    except InvalidStateError:
        return  # its owner has stopped waiting; futures offer no other way to set one without a race


def gather(futures: Sequence[Future[T]], combine: Callable[[list[T]], R]) -> Ticket[R]:
    """One ticket for several futures.

    Its result is ``combine`` of theirs, in order. The first error is its error. Whatever ends it early, an error,
    ``Ticket.cancel`` or the cancelling of its future, cancels the futures that are still open.
    """
    joined: Future[R] = Future()
    left, lock = len(futures), Lock()

    def arrived(future: Future[T]) -> None:
        nonlocal left
        if future.cancelled():
            joined.cancel()
        elif (error := future.exception()) is not None:
            fail(joined, error)
        else:
            with lock:
                left -= 1
                last = left == 0
            if last:
                settle(joined, lambda: combine([each.result() for each in futures]))

    # On the future, not on the ticket: an awaiting caller that is cancelled reaches the future only. The last ones
    # first: what waits for its turn must not get that of an earlier one that is cancelled.
    joined.add_done_callback(lambda _: [each.cancel() for each in reversed(futures)])
    for future in futures:
        future.add_done_callback(arrived)
    if not futures:
        settle(joined, lambda: combine([]))
    return Ticket(joined)
