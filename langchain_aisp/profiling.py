"""Where the time of one request goes. Every moment of its wall time belongs to one part, so the parts sum to it.

The parts are timed from outside, by wrapping what engine, reward and method offer publicly; the request runs as ever.
Meant for a request that has the engine to itself: what others decode meanwhile is counted too.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, Unpack

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, record_function

from langchain_aisp.ahead import waits
from langchain_aisp.align import Aligned, Settings, align
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.engine import decode as decoding
from langchain_aisp.engine.graphs import StepGraphs
from langchain_aisp.methods import BestOfN
from langchain_aisp.types import Chat, Info, Method, Problem, Response, Reward, Rollouts, Sampling, Ticket, Wave

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from rich.table import Table

StateT = TypeVar("StateT")

OTHER = "other"
PARTS: Mapping[str, str] = {
    "tokenising": "the conversation becomes token ids",
    "prefill": "the prompt and kept prefixes are read",
    "decode": "the model's layers, one token per row and step",
    "head": "offsets to the pre-logits, then the model's own head",
    "sampling": "from logits to tokens",
    "detokenising": "from tokens to text",
    "reward": "scoring the responses",
    "method": "proposing waves and learning from their rewards",
    OTHER: "masks, the rows' bookkeeping, threads that wake each other",
}


@dataclass(frozen=True)
class Profile:
    """Where the time of one request went.

    Attributes:
        aligned: What the request found.
        seconds: Seconds of each of ``PARTS``; together the wall-clock time of the request.
        calls: How often each part was begun.
    """

    aligned: Aligned
    seconds: Mapping[str, float]
    calls: Mapping[str, int]

    @property
    def wall(self) -> float:
        """Wall-clock time of the request, in seconds."""
        return sum(self.seconds.values())

    def share(self, part: str) -> float:
        """A part's share of the wall-clock time."""
        return self.seconds[part] / self.wall


def profile_request(
    engine: TransformersEngine, reward: Reward, method: Method[Any], chat: Chat, **settings: Unpack[Settings]
) -> Profile:
    """Answer a conversation and tell where the time went; arguments as for ``iterate``."""
    timeline = Timeline(engine.cache.device)
    with watching(engine, timeline):
        timeline.start()
        aligned = align(engine, TimedReward(reward, timeline), TimedMethod(method, timeline), chat, **settings)
        seconds = timeline.stop()
    return Profile(aligned, seconds, {part: timeline.calls[part] for part in PARTS})


def warm_up(engine: TransformersEngine, reward: Reward) -> None:
    """Answer another request, so that what is loaded at the first use is there."""
    chat = [{"role": "user", "content": "A request before the one that counts."}]
    align(engine, reward, BestOfN(samples=4), chat, sampling=Sampling(max_tokens=4))


@contextmanager
def tracing(path: Path | None) -> Iterator[None]:
    """Write every operation of all threads as a Chrome trace, for https://ui.perfetto.dev; None writes nothing.

    Raises:
        ValueError: This torch cannot trace the engine's thread.
    """
    if path is None:
        yield
        return
    with _profiler() as profiler:
        yield
    profiler.export_chrome_trace(str(path))


def table(profile: Profile) -> Table:
    """The parts as a table whose rows sum to the wall-clock time."""
    from rich import box
    from rich.table import Table

    found = Table("part", box=box.SIMPLE_HEAD, header_style="dim", border_style="dim", show_footer=True)
    found.columns[0].footer = "wall time"
    found.add_column("seconds", f"{profile.wall:.3f}", justify="right")
    found.add_column("share", "100.0 %", justify="right")
    found.add_column("calls", justify="right")
    found.add_column("what it is")
    for part, meaning in PARTS.items():
        calls = str(profile.calls[part]) if part != OTHER else ""
        found.add_row(part, f"{profile.seconds[part]:.3f}", f"{profile.share(part):.1%}", calls, meaning)
    return found


class Timeline:
    """Gives every moment to the part that was begun last and is still open, whichever thread began it."""

    def __init__(self, device: torch.device | None = None, *, shown: bool = True) -> None:
        """Nothing is counted before ``start``.

        Args:
            device: Where the model runs. Parts wait for what they launch on a GPU, or the launch alone would be timed.
            shown: Whether a trace shows the parts; to be ready for that takes some 50 µs of each.
        """
        self.calls: Counter[str] = Counter()
        self._device = device
        self.shown = shown
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._open: list[_Span] = []
        self._lock = threading.Lock()
        self._since = 0.0

    def start(self) -> None:
        """Begin to count."""
        self._since = time.perf_counter()

    def stop(self) -> Mapping[str, float]:
        """Seconds of each part since the start."""
        with self._lock:
            self._count()
            return dict(self._seconds)

    def part(self, name: str) -> AbstractContextManager[None]:
        """The time in this scope is the part's, but for parts within it; a trace shows the scope."""
        return _Part(self, name)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as a part."""

        def call(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return call

    def begin(self, name: str) -> _Span:
        """Begin a part that ``end`` ends, perhaps in another thread."""
        span = _Span(name)
        with self._lock:
            self._count()
            self._open.append(span)
            self.calls[name] += 1
        return span

    def end(self, span: _Span) -> None:
        """End a part."""
        with self._lock:
            self._count()
            self._open.remove(span)

    def _count(self) -> None:
        if self._device is not None and self._device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._seconds[self._open[-1].name if self._open else OTHER] += now - self._since
        self._since = now


class _Part:
    """A part as a scope: a class, since to enter a generator takes longer than some parts do."""

    def __init__(self, timeline: Timeline, name: str) -> None:
        self._timeline, self._name = timeline, name
        self._label = record_function(f"aisp: {name}") if timeline.shown else None

    def __enter__(self) -> None:
        self._span = self._timeline.begin(self._name)
        if self._label is not None:
            self._label.__enter__()

    def __exit__(self, *raised: Any) -> None:
        if self._label is not None:
            self._label.__exit__(*raised)
        self._timeline.end(self._span)


@dataclass(frozen=True, eq=False)
class _Span:
    """A part that is open; equal to itself alone."""

    name: str


@dataclass(frozen=True)
class TimedMethod(Generic[StateT]):
    """A method whose arithmetic is a part of a timeline."""

    method: Method[StateT]
    timeline: Timeline

    @property
    def name(self) -> str:
        """The method's."""
        return self.method.name

    @property
    def iterations(self) -> int:
        """The method's."""
        return self.method.iterations

    def init(self, problem: Problem) -> StateT:
        """The method's."""
        with self.timeline.part("method"):
            return self.method.init(problem)

    def propose(self, state: StateT) -> Wave:
        """The method's."""
        with self.timeline.part("method"):
            return self.method.propose(state)

    def update(self, state: StateT, wave: Wave, rollouts: Rollouts, rewards: Tensor) -> tuple[StateT, Info]:
        """The method's."""
        with self.timeline.part("method"):
            return self.method.update(state, wave, rollouts, rewards)


@dataclass(frozen=True)
class TimedReward:
    """A reward that is a part of a timeline from the asking to the answer."""

    reward: Reward
    timeline: Timeline

    @property
    def name(self) -> str:
        """The reward's."""
        return self.reward.name

    @property
    def fingerprint(self) -> str:
        """The reward's."""
        return self.reward.fingerprint

    @property
    def waits(self) -> bool:
        """As the reward does."""
        return waits(self.reward)

    def submit(
        self, pairs: Sequence[tuple[Chat, Response]], *, loop: AbstractEventLoop | None = None
    ) -> Ticket[Tensor]:
        """The reward's."""
        span = self.timeline.begin("reward")
        ticket = self.reward.submit(pairs, loop=loop)
        ticket.future.add_done_callback(lambda _: self.timeline.end(span))
        return ticket


@contextmanager
def watching(engine: TransformersEngine, timeline: Timeline) -> Iterator[None]:
    """Time the engine's parts as long as the scope lasts."""
    watched = [
        ("tokenising", engine, "encode"),
        ("prefill", engine.cache, "prefill"),
        ("prefill", engine.cache, "open"),
        ("decode", engine.cache, "step"),
        ("decode", StepGraphs, "step"),
        ("sampling", decoding, "draw"),
        ("detokenising", engine.tokenizer, "batch_decode"),
    ]
    with ExitStack() as stack:
        for part, owner, name in watched:
            stack.enter_context(_replaced(owner, name, timeline.timed(part, getattr(owner, name))))
        stack.enter_context(_watched_head(engine.model.get_output_embeddings(), timeline))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Lay an attribute over an object's own or its class's."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextmanager
def _watched_head(head: Any, timeline: Timeline) -> Iterator[None]:
    """Time the model's head with what the engine's hook does before it."""
    scopes: list[Any] = []

    def enter(*_: object) -> None:
        scopes.append(timeline.part("head"))
        scopes[-1].__enter__()

    def leave(*_: object) -> None:
        scopes.pop().__exit__(None, None, None)

    hooks = [head.register_forward_pre_hook(enter, prepend=True), head.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _profiler() -> Any:
    from torch._C._profiler import _ExperimentalConfig

    try:
        config = _ExperimentalConfig(profile_all_threads=True)
    except TypeError as error:
        message = f"a trace needs a newer torch: {torch.__version__} cannot look into the engine's thread"
        raise ValueError(message) from error
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    return torch.profiler.profile(activities=activities, experimental_config=config)
