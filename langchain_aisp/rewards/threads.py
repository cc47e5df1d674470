"""Threads that never hold up the interpreter's exit for long: a small pool for blocking calls and one event loop."""

from __future__ import annotations

import asyncio
import atexit
import time
from collections import deque
from collections.abc import Callable
from threading import Condition, Lock, Thread, current_thread
from weakref import WeakSet

_LINGER_SECONDS = 10.0
_EXIT_SECONDS = 2.0  # for jobs under way: a thread that is killed inside torch takes the process down with it


class Workers:
    """At most ``count`` daemon threads that run jobs in order; idle ones end after some seconds.

    The standard pool joins its threads at exit, so that one hanging call would keep the process alive.
    """

    def __init__(self, count: int, name: str) -> None:
        """Set the limit; threads start with the first job."""
        self._count, self._name = count, name
        self._jobs: deque[Callable[[], None]] = deque()
        self._changed = Condition()
        self._live: set[Thread] = set()
        self._idle: set[Thread] = set()
        _pools.add(self)

    def start(self, job: Callable[[], None]) -> None:
        """Run a job, which must not raise, as soon as a thread is free."""
        with self._changed:
            self._jobs.append(job)
            self._provide()

    def retire(self, thread: Thread) -> None:
        """Stop counting a thread that hangs in its job, so that others can take the waiting jobs."""
        with self._changed:
            self._live.discard(thread)
            self._provide()

    def finish(self, deadline: float) -> None:
        """Drop the waiting jobs and wait until the monotonic clock shows ``deadline`` for those under way."""
        with self._changed:
            self._jobs.clear()
            busy = self._live - self._idle
        for thread in busy:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _provide(self) -> None:
        """Wake or start a thread for the waiting jobs; those that a fork left behind are not alive."""
        self._live = {thread for thread in self._live if thread.is_alive()}
        self._idle &= self._live
        self._changed.notify()
        if len(self._jobs) > len(self._idle) and len(self._live) < self._count:
            thread = Thread(target=self._run, name=self._name, daemon=True)
            thread.start()  # it waits for the lock that we hold
            self._live.add(thread)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            job()

    def _next(self) -> Callable[[], None] | None:
        """The next job; None when there was none for a while or this thread was retired."""
        me = current_thread()
        with self._changed:
            if me not in self._live:
                return None
            self._idle.add(me)
            self._changed.wait_for(lambda: self._jobs, timeout=_LINGER_SECONDS)
            self._idle.discard(me)
            if self._jobs:
                return self._jobs.popleft()
            self._live.discard(me)
            return None


_pools: WeakSet[Workers] = WeakSet()


@atexit.register
def _finish_all() -> None:
    deadline = time.monotonic() + _EXIT_SECONDS
    for pool in list(_pools):
        pool.finish(deadline)


_loop_lock = Lock()
_loop: tuple[Thread, asyncio.AbstractEventLoop] | None = None


def background_loop() -> asyncio.AbstractEventLoop:
    """The package's own event loop, running in one daemon thread, for async rewards of callers without a loop."""
    global _loop
    with _loop_lock:
        if _loop is None or not _loop[0].is_alive():  # after a fork the thread is gone
            loop = asyncio.new_event_loop()
            thread = Thread(target=loop.run_forever, name="aisp-async-rewards", daemon=True)
            thread.start()
            _loop = thread, loop
        return _loop[1]
