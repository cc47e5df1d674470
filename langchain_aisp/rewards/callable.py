"""Any Python function as a reward: sync ones run in worker threads, async ones on an event loop."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import uuid
from asyncio import AbstractEventLoop
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Timer, current_thread
from typing import Any, Generic, Literal, TypeVar, cast

import torch
from torch import Tensor

from langchain_aisp.futures import fail, gather, settle
from langchain_aisp.rewards.base import RewardError, check_scores
from langchain_aisp.rewards.fingerprint import stable_fingerprint
from langchain_aisp.rewards.partial import PartialReward, Span, asked_for, check_spans, is_partial, sum_up_to
from langchain_aisp.rewards.threads import Workers, background_loop
from langchain_aisp.types import Chat, Response, Reward, Ticket, require

Sees = Literal["text", "response"]

T = TypeVar("T")

_THREADS = 4


def as_reward(
    fn: Callable[..., Any] | Reward,
    *,
    name: str | None = None,
    timeout: float | None = None,
    sees: Sees = "text",
    fingerprint: str | None = None,
    partial: bool = False,
    spans: bool = False,
    waits: bool | None = None,
) -> Reward:
    """Make a reward of a function; a reward is returned as it is.

    Args:
        fn: Called as ``fn(chat, responses)``, sync or async, with the conversation as a list of dicts and n candidates;
            it returns n finite numbers, higher is better. A sync function runs in up to four threads at once, an
            async one on the caller's event loop.
        name: For error messages; the function's own name unless given.
        timeout: Most seconds one call may take, counted from its start; None sets no limit.
        sees: ``"text"`` passes the candidates as strings, ``"response"`` as ``Response`` records.
        fingerprint: Identity for cache keys. Unless given, it is derived from the code, see ``CallableReward``.
        partial: The promise that a candidate may stop anywhere, also amid a word, and that the scores of its beginnings
            are worth comparing. ``AISP`` then asks for many of them, to cut responses where they lose and to lead
            others where they gain, and ``commit_every`` is possible. A reward can be promised this, too.
        spans: ``fn`` returns for each candidate what its pieces are worth instead of one number: a list of
            ``(start, end, value)``, in characters of its text. The score is their sum, and ``partial`` is understood.
        waits: Whether ``fn`` mostly waits for somebody else, such as a server. Then candidates are scored as soon as
            they end, in several batches, while others still decode. Unless given, that is so for an async function.

    Raises:
        TypeError: If ``fn`` cannot be called with two positional arguments.
        ValueError: For options next to something that is a reward already, or values out of range.
    """
    if isinstance(fn, type):
        raise TypeError(f"a reward must be a function or an object, got the class {fn.__name__}; pass an instance")
    if _is_reward(fn):
        given = (name, timeout, fingerprint, waits) != (None, None, None, None) or sees != "text" or spans
        options = "name, timeout, sees, fingerprint, spans or waits"
        require(not given, f"{name_of(fn)} is a reward already and takes no {options} here")
        reward = cast(Reward, fn)
        return PartialReward(reward) if partial and not is_partial(reward) else reward
    fn = cast(Callable[..., Any], fn)
    waits = is_async(fn) if waits is None else waits
    return CallableReward(fn, name or name_of(fn), timeout, sees, fingerprint, partial or spans, spans, waits)


@dataclass(frozen=True, eq=False)
class CallableReward:
    """A function ``(chat, responses) -> scores`` as a reward; made by ``as_reward``, which tells more.

    Attributes:
        fn: The function, sync or async.
        name: For error messages.
        timeout: Most seconds one call may take; None sets no limit.
        sees: What the function gets: texts or ``Response`` records.
        explicit_fingerprint: Identity for cache keys, or None to derive it.
        partial: Whether the function understands unfinished texts.
        spans: Whether it tells what the pieces of a text are worth.
        waits: Whether it mostly waits for somebody else.
    """

    fn: Callable[..., Any]
    name: str
    timeout: float | None = None
    sees: Sees = "text"
    explicit_fingerprint: str | None = None
    partial: bool = False
    spans: bool = False
    waits: bool = False
    _workers: Workers = field(default_factory=lambda: Workers(_THREADS, "aisp-reward"), init=False, repr=False)
    _unique: str = field(default_factory=lambda: f"process-{uuid.uuid4().hex}", init=False, repr=False)

    def __post_init__(self) -> None:
        """Reject what could only fail later, in the middle of a search."""
        check_signature(self.fn, self.name, ("chat", "responses"), "one number per response")
        require(self.timeout is None or self.timeout > 0, f"timeout must be positive or None, got {self.timeout}")
        require(self.sees in ("text", "response"), f"sees must be 'text' or 'response', got {self.sees!r}")
        require(self.explicit_fingerprint != "", "fingerprint must not be empty; leave it out to derive it")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings; threads and the per-process identity are made anew."""
        named = (self.name, self.timeout, self.sees, self.explicit_fingerprint)
        return CallableReward, (self.fn, *named, self.partial, self.spans, self.waits)

    def __deepcopy__(self, memo: dict[int, Any]) -> CallableReward:
        """The same object: nothing in it is ever edited."""
        return self

    @property
    def fingerprint(self) -> str:
        """The explicit one, or the function's ``fingerprint`` attribute, or a hash of its code and values, or unique.

        The hash covers bytecode, constants, defaults, closure and the globals it reads. A function that depends on
        anything without a stable description (a list, an object, a bound method, code of an unversioned module)
        gets a fingerprint of this process: caches miss, but never return another reward's answer.
        """
        own = self.explicit_fingerprint or stable_fingerprint(self.fn) or self._unique
        own = own if self.sees == "text" else f"{own}:{self.sees}"
        return f"{own}:{'spans' if self.spans else 'partial'}" if self.partial else own

    def submit(
        self, pairs: Sequence[tuple[Chat, Response]], *, loop: AbstractEventLoop | None = None
    ) -> Ticket[Tensor]:
        """Start scoring; the function is called once per distinct conversation.

        Args:
            pairs: Conversations and candidates.
            loop: The caller's running loop, on which an async function runs; otherwise the package's own.

        Returns:
            A ticket for [len(pairs)] float32. Its errors are ``RewardError``.
        """
        groups = _by_chat(pairs)
        answers = [self._ask(pairs[rows[0]][0], [pairs[row][1] for row in rows], loop) for rows in groups]
        return gather(answers, lambda scores: scatter(scores, groups, len(pairs)))

    def _ask(self, chat: Chat, responses: list[Response], loop: AbstractEventLoop | None) -> Future[Tensor]:
        """The scores of some responses to one conversation."""
        ask = self._ask_for_spans if self.spans else self._ask_for_scores
        return ask(chat, responses, loop)

    def _ask_for_scores(self, chat: Chat, responses: list[Response], loop: AbstractEventLoop | None) -> Future[Tensor]:
        return self._call(chat, responses, check_scores, loop)

    def _ask_for_spans(self, chat: Chat, responses: list[Response], loop: AbstractEventLoop | None) -> Future[Tensor]:
        """The sums of what the pieces are worth; a beginning of another response is told by that one's pieces."""
        owners = asked_for(responses)
        asked = sorted(set(owners))
        told = self._call(chat, [responses[row] for row in asked], check_spans, loop)

        def sums(answers: list[list[list[Span]]]) -> Tensor:
            spans = dict(zip(asked, answers[0], strict=True))
            texts = [response.text for response in responses]
            scores = [sum_up_to(spans[owner], len(text)) for owner, text in zip(owners, texts, strict=True)]
            return check_scores(self.name, scores, texts)

        return gather([told], sums).future

    def _call(
        self,
        chat: Chat,
        responses: list[Response],
        check: Callable[[str, object, Sequence[str]], T],
        loop: AbstractEventLoop | None,
    ) -> Future[T]:
        """One call of the function; its answer as ``check`` reads it."""
        texts = [response.text for response in responses]
        shown = texts if self.sees == "text" else responses
        ask = functools.partial(self.fn, [dict(message) for message in chat], list(shown))
        call = _Call(self, ask, check, texts)
        if is_async(self.fn):
            call.start_on(loop or background_loop())
        else:
            context = contextvars.copy_context()  # tracing and callbacks follow the call into its thread
            self._workers.start(lambda: context.run(call.run_here, self._workers, loop))
        return call.answer


class _Call(Generic[T]):
    """One call in flight: its answer, and its clock."""

    def __init__(
        self,
        reward: CallableReward,
        ask: Callable[[], Any],
        check: Callable[[str, object, Sequence[str]], T],
        texts: list[str],
    ) -> None:
        self.answer: Future[T] = Future()
        self._reward, self._ask, self._check, self._texts = reward, ask, check, texts

    def run_here(self, workers: Workers, loop: AbstractEventLoop | None) -> None:
        """Make the call in this worker thread, unless it was cancelled while it was queued."""
        if not self.answer.done():
            thread = current_thread()
            self._start_clock(lambda: workers.retire(thread))
            settle(self.answer, lambda: self._scores(loop))

    def start_on(self, loop: AbstractEventLoop) -> None:
        """Make the call as a task of an event loop; it is cancelled with the answer."""
        task = asyncio.run_coroutine_threadsafe(self._scores_async(), loop)
        self.answer.add_done_callback(lambda _: task.cancel())
        task.add_done_callback(self._arrived)

    def _scores(self, loop: AbstractEventLoop | None) -> T:
        try:
            scores = self._ask()
            if inspect.isawaitable(scores):  # a lambda around an async function does not look async before
                task = asyncio.run_coroutine_threadsafe(_wait_for(scores), loop or background_loop())
                self.answer.add_done_callback(lambda _: task.cancel())
                scores = task.result()
        except RewardError:
            raise
        except BaseException as error:  # also SystemExit: it would end this thread and leave the caller waiting
            raise self._failure(error) from error
        return self._check(self._reward.name, scores, self._texts)

    async def _scores_async(self) -> T:
        self._start_clock(lambda: None)
        try:
            scores = await self._ask()
        except RewardError:
            raise
        except Exception as error:
            raise self._failure(error) from error
        return self._check(self._reward.name, scores, self._texts)

    def _arrived(self, task: Future[T]) -> None:
        if task.cancelled():
            fail(self.answer, self._error("was cancelled before it answered", "Keep its event loop running."))
        else:
            settle(self.answer, task.result)

    def _start_clock(self, on_expiry: Callable[[], None]) -> None:
        timeout = self._reward.timeout
        if timeout is None:
            return

        def expire() -> None:
            problem = f"did not answer within {timeout:g} seconds for {len(self._texts)} responses"
            fail(self.answer, self._error(problem, "Make it faster, or pass a larger timeout."))
            on_expiry()

        clock = Timer(timeout, expire)
        clock.daemon = True
        clock.start()
        self.answer.add_done_callback(lambda _: clock.cancel())

    def _failure(self, error: BaseException) -> BaseException:
        if isinstance(error, RewardError):
            return error
        return self._error(f"raised {type(error).__name__}: {error}", "The traceback above shows where it failed.")

    def _error(self, problem: str, remedy: str) -> RewardError:
        return RewardError(self._reward.name, problem, remedy, self._texts[0])


async def _wait_for(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _by_chat(pairs: Sequence[tuple[Chat, Response]]) -> list[list[int]]:
    """Rows of the pairs that share a conversation, in order of appearance."""
    groups: list[list[int]] = []
    known: dict[int, list[int]] = {}  # by identity first: comparing long conversations is slow
    for row, (chat, _) in enumerate(pairs):
        group = known.get(id(chat)) or next((group for group in groups if pairs[group[0]][0] == chat), None)
        if group is None:
            groups.append(group := [])
        group.append(row)
        known[id(chat)] = group
    return groups


def scatter(scores: Sequence[Tensor], groups: Sequence[Sequence[int]], rows: int) -> Tensor:
    """Scores by group back in the order of the pairs."""
    flat = torch.empty(rows, dtype=torch.float32)
    for group, values in zip(groups, scores, strict=True):
        flat[list(group)] = values
    return flat


def _is_reward(value: object) -> bool:
    """Looks without evaluating properties: a fingerprint may read files."""
    return all(inspect.getattr_static(value, verb, None) is not None for verb in ("name", "fingerprint", "submit"))


def is_async(fn: Callable[..., Any]) -> bool:
    """Whether a call of it is awaited, as far as one can see before."""
    inner = _unwrapped(fn)
    call = inspect.getattr_static(type(inner), "__call__", None)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(call)


def _unwrapped(fn: Any) -> Any:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn


def name_of(fn: Any) -> str:
    """The name of a reward, function, partial or object, for error messages."""
    inner = _unwrapped(fn)
    own = inspect.getattr_static(inner, "name", None)
    return own if isinstance(own, str) else getattr(inner, "__name__", type(inner).__name__)


def check_signature(fn: object, name: str, arguments: Sequence[str], returns: str) -> None:
    """Reject what cannot be called with two or three positional arguments, as far as Python can tell."""
    listed = ", ".join(arguments)
    expected = f"a reward must be callable as fn({listed}) and return {returns}"
    if not callable(fn):
        raise TypeError(f"{expected}, got {type(fn).__name__}; pass a function, or a reward object with submit")
    try:
        signature = inspect.signature(fn)
    except ValueError:
        return  # some built-in functions do not tell
    try:
        signature.bind(*arguments)
    except TypeError as error:
        count = {2: "two", 3: "three"}[len(arguments)]
        message = f"{expected}, but {name}{signature} cannot take {count} positional arguments ({error})"
        raise TypeError(f"{message}; wrap it, for example: lambda {listed}: ...") from error
