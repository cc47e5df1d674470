"""Records and protocols that every layer shares; imports torch and nothing else.

One letter per axis in the whole package: N rows of one wave, L positions of a response (``max_tokens``),
T controlled positions (the horizon), D width of the pre-logits, V vocabulary, K alternatives, r any subset of rows.
"""

from __future__ import annotations

import math
from asyncio import AbstractEventLoop
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Generic, Literal, Protocol, Self, TypeAlias, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor

Chat = Sequence[Mapping[str, Any]]
"""A conversation: dicts with at least ``role`` and ``content``, as chat templates take them."""

FinishReason = Literal["stop", "length", "timeout"]
Observable = Literal["base_logprobs", "alternatives", "unchecked_alternatives", "scores", "prelogits"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
StateT = TypeVar("StateT")


@dataclass(frozen=True)
class Prompt:
    """A conversation, tokenised.

    Attributes:
        chat: The conversation the ids were made from.
        ids: Token ids, ending where the answer begins.
        key: Noise identity of the request, a hash of seed and ids: the same whoever else runs, and whenever.
    """

    chat: Chat
    ids: tuple[int, ...]
    key: int


@dataclass(frozen=True)
class Grammar:
    """What a response may say; every candidate of a search obeys it.

    Attributes:
        source: The grammar in llguidance's dialect of Lark
            (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md), its start rule named ``start``.
    """

    source: str


class Reader(Protocol):
    """Turns what a model has written into what it means. A frozen dataclass: its ``repr`` is part of cache keys."""

    def read(self, text: str, finish_reason: FinishReason) -> Response:
        """Split a decoded answer, control tokens such as ``<tool_call>`` written out, into its parts; never raises."""


@dataclass(frozen=True)
class Sampling:
    """How one token is drawn from the (steered) logits.

    Attributes:
        max_tokens: Longest response, in tokens; L everywhere.
        min_tokens: No end token before so many tokens; 1 keeps answers non-empty.
        temperature: Divides the logits; 0 takes the likeliest token (argmax).
        top_p: Keeps the smallest set of tokens with this probability mass; 1 keeps all.
        top_k: Keeps the k likeliest tokens; 0 keeps all.
        stop: Strings that end a response; they are trimmed from its text.
        grammar: What a response may say; None for anything. It also decides when the response may end.
        reader: Takes the response apart; None when all of it is text.
    """

    max_tokens: int = 256
    min_tokens: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    grammar: Grammar | None = None
    reader: Reader | None = None

    def __post_init__(self) -> None:
        """Reject values no decoder can follow."""
        require(self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}")
        require(
            0 <= self.min_tokens <= self.max_tokens, f"min_tokens must be in [0, max_tokens], got {self.min_tokens}"
        )
        require(self.temperature >= 0, f"temperature must not be negative, got {self.temperature}; 0 means argmax")
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}; 1 keeps every token")
        require(self.top_k >= 0, f"top_k must not be negative, got {self.top_k}; 0 keeps every token")
        require(all(self.stop), "a stop string must not be empty")


class Steering(Protocol):
    """What is added to the pre-logits of a row before the model's head sees them."""

    @property
    def open_loop(self) -> bool:
        """True when ``offset`` ignores ``hidden``, so that it can be computed before the step."""

    def offset(self, rows: Tensor, positions: Tensor, keys: Tensor, hidden: Tensor | None) -> Tensor:
        """Offsets for some rows of the wave.

        Args:
            rows: [r] int64, indices into the wave.
            positions: [r] int64, the response position each row is about to fill.
            keys: [r] int64, the noise keys of those positions.
            hidden: [r, D] pre-logits of the model, or None for open-loop steering.

        Returns:
            [r, D] float32 offsets.
        """


@dataclass(frozen=True)
class Wave:
    """N responses wanted for one prompt; a pure value: retry it, split it by rows, ship it elsewhere, same answer.

    Attributes:
        prompt: The shared prompt.
        prefix: [N, L] int64; row n keeps ``prefix[n, :cut[n]]`` and is decoded from there. Other entries are ignored.
        cut: [N] int64; 0 starts from scratch.
        keys: [N, L] int64, a noise key per row and position. A child copies its parent's keys where it copies tokens.
        sampling: How tokens are drawn.
        steering: Offsets to the pre-logits, or None.
        observe: Extras that cost time: ``base_logprobs`` (log-probability of each drawn token under the unsteered
            model at temperature 1, among the tokens allowed at its position), ``alternatives`` (its likeliest tokens
            per position), ``unchecked_alternatives`` (the same, and by the same name, but a grammar may forbid some of
            them: it costs far less to ask ``Engine.allowed`` about a few rows than to look at every step of all),
            ``scores`` (gradient of that log-probability by the pre-logits), ``prelogits`` (what the model's head is
            given at each position, before any steering).
        forced: Nothing is drawn: each row says the rest of its prefix, up to the first -1, and ends, so that given
            responses can be observed.
        kl_budget: Most nats by which the steering may part a response from the model: a bound on the sum over its
            tokens of ``KL(steered ‖ unsteered)``, both at temperature 1 among the tokens allowed there, before top-p
            and top-k. Where the next token would pass it, the offset is scaled down. None for no bound.
        kl_spent: [N] float64, nats of the budget that each row's kept tokens have taken; None for none.
        temperatures: [N] float32, each row's own temperature in place of the sampling's; None for that.
        enough: So many ended rows are enough: the others come back as far as they are, to go on in another wave as its
            first rows, in their order; 0 is enough as soon as each has said a token. None waits for all, as does an
            engine that decodes the wave in parts.
        resumed: So many first rows are the unfinished ones of an earlier wave; with 0, these wait for yet another one.
        held: What the rollouts of unfinished rows brought beside them (``Rollouts.held``), so that nothing has to be
            read again when they go on; the tokens are the same without it.
    """

    prompt: Prompt
    prefix: Tensor
    cut: Tensor
    keys: Tensor
    sampling: Sampling
    steering: Steering | None = None
    observe: frozenset[Observable] = frozenset()
    forced: bool = False
    kl_budget: float | None = None
    kl_spent: Tensor | None = None
    temperatures: Tensor | None = None
    enough: int | None = None
    resumed: int = 0
    held: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Reject a budget that bounds nothing."""
        drawn = self.sampling.temperature > 0
        require(
            self.kl_budget is None or self.steering is None or drawn,
            "kl_budget bounds the probabilities that steered tokens are drawn from, and at temperature 0 (argmax) none "
            "is drawn: sample, with a temperature and a cooling above 0 and, in the published form, decode='sample'; "
            "or bound the answer itself with min_base_logprob",
        )

    def __len__(self) -> int:
        """Number of rows N."""
        return int(self.cut.shape[0])

    @classmethod
    def saying(
        cls, prompt: Prompt, answers: Sequence[Sequence[int]], sampling: Sampling, observe: Iterable[Observable]
    ) -> Wave:
        """A wave that says given answers, so that they can be observed; each row says a block of one of them, in order.

        An answer of T tokens is cut into blocks of about √T: all of it is read in one pass, as kept prefixes, and then
        every block a token at a time, all blocks at once.

        Args:
            prompt: What was answered.
            answers: Token ids, not all of them empty.
            sampling: What the answers obeyed; of it counts what forbids tokens, such as a grammar.
            observe: What is wanted of each token.
        """
        blocks = [block for answer in answers for block in _blocks(answer)]
        prefix = torch.full((len(blocks), max(map(len, answers))), -1)
        for row, (said, _) in zip(prefix, blocks, strict=True):
            row[: len(said)] = torch.tensor(said)
        cut = torch.tensor([start for _, start in blocks])
        length = prefix.shape[1]
        allowing = replace(
            sampling, max_tokens=length, min_tokens=min(sampling.min_tokens, length), stop=(), reader=None
        )
        keys = torch.zeros_like(prefix)  # nothing is drawn
        return cls(prompt, prefix, cut, keys, allowing, observe=frozenset(observe), forced=True)

    @property
    def said(self) -> Tensor:
        """[N, L] bool, what the rows of a forced wave say; row by row, these are the answers of ``saying``."""
        return (self.prefix >= 0) & (torch.arange(self.prefix.shape[1]) >= self.cut[:, None])

    @property
    def kl_left(self) -> Tensor | None:
        """[N] float32, nats that each row may still spend, rounded down; None without a budget."""
        if self.kl_budget is None:
            return None
        whole = torch.full((len(self),), self.kl_budget, dtype=torch.float64)
        left = whole if self.kl_spent is None else (whole - self.kl_spent).clamp(min=0)
        return left.float().nextafter(torch.zeros(()))


def _blocks(answer: Sequence[int]) -> list[tuple[Sequence[int], int]]:
    """The answer up to the end of each block, and where the block begins.

    Each of B rows remembers what it keeps, and T / B steps are made for T tokens: √T is little of both.
    """
    size = math.isqrt(max(len(answer) - 1, 0)) + 1
    return [(answer[: start + size], start) for start in range(0, len(answer), size)]


@dataclass(frozen=True)
class Response:
    """One candidate answer as a person or a reward sees it.

    Attributes:
        text: What is said.
        finish_reason: Why it ended.
        reasoning: What was thought before.
        tool_calls: ``{"name": str, "args": dict}`` each.
        invalid_tool_calls: ``{"name": str | None, "args": str, "error": str}`` each: what was meant as a call.
    """

    text: str
    finish_reason: FinishReason = "stop"
    reasoning: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    invalid_tool_calls: tuple[Mapping[str, Any], ...] = ()

    @property
    def complete(self) -> bool:
        """False when the response was cut off; a cut-off response never beats a complete one."""
        return self.finish_reason == "stop"


@dataclass(frozen=True)
class Rollouts:
    """The decoded wave.

    Attributes:
        tokens: [N, L] int64 with the kept prefix and, where one was drawn, the end token; -1 after the end.
        lengths: [N] int64, tokens per row, the end token included.
        responses: The candidates, one for each row that has ended: N of them, unless the wave had enough before.
        sampled_tokens: Tokens that were decoded for this wave, kept prefixes not counted.
        observed: What the wave asked to observe, on the CPU, defined at the decoded positions (from ``cut`` on):
            ``base_logprobs`` [N, L]; ``alternatives`` [N, L, K], token ids in int32, with ``alternative_logprobs``
            [N, L, K]; ``scores`` and ``prelogits`` [N, L, D] float32. Of a steered wave with a KL budget also ``kl``
            [N, L] float32, the nats that each position has taken of it.
        unfinished: [N] bool, the rows that were still being decoded when the wave had enough; None for none.
        held: What the engine remembers of these, for the wave in which they go on.
    """

    tokens: Tensor
    lengths: Tensor
    responses: tuple[Response, ...]
    sampled_tokens: int
    observed: Mapping[str, Tensor] = field(default_factory=dict)
    unfinished: Tensor | None = None
    held: Any = field(default=None, repr=False)

    @property
    def ended(self) -> Tensor:
        """[E] int64, the rows that have ended, whose responses these are."""
        return torch.arange(len(self.tokens)) if self.unfinished is None else (~self.unfinished).nonzero().squeeze(1)

    @property
    def going(self) -> Tensor:
        """[C] int64, the rows that have not, in their order."""
        return torch.arange(0) if self.unfinished is None else self.unfinished.nonzero().squeeze(1)

    @property
    def complete(self) -> Tensor:
        """[E] bool, False where a response was cut off."""
        return torch.tensor([response.complete for response in self.responses], dtype=torch.bool)


@dataclass(frozen=True)
class Head:
    """What a method may know of the model's head.

    Attributes:
        width: D, the width of the pre-logits.
        spread: Standard deviation, over the vocabulary, of the logits that standard normal pre-logits give:
            the unit that makes a perturbation's sigma mean the same on every model.
        vocabulary: V, the number of logits; the tokenizer may know fewer tokens.
    """

    width: int
    spread: float
    vocabulary: int


class Ticket(Generic[T_co]):
    """Work in flight. Leaving ``with ticket:`` cancels what is not done.

    Attributes:
        future: Holds the result; wait for it in a thread, or await ``asyncio.wrap_future(ticket.future)``.
    """

    def __init__(self, future: Future[T_co], cancel: Callable[[], object] = lambda: None) -> None:
        """Wrap a future and the way to abandon it."""
        self.future = future
        self._cancel = cancel

    def cancel(self) -> None:
        """Abandon the work; thread-safe, harmless when it is done."""
        if not self.future.done() or self.future.cancelled():  # asyncio may have cancelled the bare future already
            self._cancel()
            self.future.cancel()

    def __enter__(self) -> Ticket[T_co]:
        """Enter the scope after which unfinished work is abandoned."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Abandon unfinished work."""
        self.cancel()


Ended: TypeAlias = Callable[[Sequence[Response]], None]
"""Is told of responses while others still decode, by the engine's thread: it neither blocks nor raises."""


class Engine(Protocol):
    """Turns waves into rollouts."""

    @property
    def name(self) -> str:
        """Id or path of the model, for metadata and cache keys."""

    @property
    def head(self) -> Head:
        """Width and spread of the model's head."""

    def encode(
        self, chat: Chat, *, tools: Sequence[Mapping[str, Any]] = (), seed: int = 0, continue_last: bool = False
    ) -> Prompt:
        """Tokenise a conversation and the tools at hand with the model's own chat template."""

    def submit(self, wave: Wave, *, deadline: float | None = None, ended: Ended | None = None) -> Ticket[Rollouts]:
        """Start decoding.

        Args:
            wave: What to decode.
            deadline: On the clock of ``time.monotonic``; after it rows are cut off.
            ended: Is told what rows say as soon as they end; an engine that cannot may leave it alone.
        """

    def allowed(self, grammar: Grammar, tokens: Tensor, choices: Tensor) -> Tensor:
        """Which tokens a grammar lets stand in place of a response's own.

        Args:
            grammar: What the responses obey.
            tokens: [r, L] int64, responses, -1 after their end.
            choices: [r, L, K] int64, tokens for each position.

        Returns:
            [r, L, K] bool; False after the end.
        """


class Reward(Protocol):
    """Scores candidates; higher is better.

    A reward may say more of itself by attributes: ``sees = "response"``, that it understands tool calls;
    ``partial = True``, that it understands unfinished texts; ``waits = True``, that it mostly waits for somebody else,
    so that rows are scored as soon as they end, in several batches.
    """

    @property
    def name(self) -> str:
        """For error messages and metadata."""

    @property
    def fingerprint(self) -> str:
        """For cache keys: two rewards that may score differently never share one."""

    def submit(
        self, pairs: Sequence[tuple[Chat, Response]], *, loop: AbstractEventLoop | None = None
    ) -> Ticket[Tensor]:
        """Start scoring flat pairs; the result is [len(pairs)] float32, all finite.

        Args:
            pairs: Conversations and candidates.
            loop: The caller's running event loop when the caller awaits the ticket; None when a thread waits for it.
        """


def parts_of(reward: Reward) -> Iterator[Reward]:
    """The rewards that a combination is made of, however deep; of any other reward itself."""
    parts: Sequence[Reward] = getattr(reward, "rewards", ())
    for part in parts:
        yield from parts_of(part)
    if not parts:
        yield reward


@dataclass(frozen=True)
class Problem:
    """What a method is given to solve.

    Attributes:
        prompt: What to answer.
        sampling: How tokens are drawn.
        head: What may be known of the model's head.
        allowed: ``Engine.allowed`` for the request's grammar; None where there is no grammar.
    """

    prompt: Prompt
    sampling: Sampling
    head: Head
    allowed: Callable[[Tensor, Tensor], Tensor] | None = None


Info = Mapping[str, float]
"""What a person wants to see of one update: ``ess`` and ``control_kl`` at least, numbers only."""


class Method(Protocol[StateT]):
    """A search: a frozen dataclass of hyper-parameters with pure verbs; noise comes from keys, never a generator.

    State is what the next step needs; info is what a person wants to see.
    """

    @property
    def name(self) -> str:
        """Short name for tables and metadata."""

    @property
    def iterations(self) -> int:
        """Most waves one search may propose."""

    def init(self, problem: Problem) -> StateT:
        """The state before the first wave."""

    def propose(self, state: StateT) -> Wave:
        """The next wave."""

    def update(self, state: StateT, wave: Wave, rollouts: Rollouts, rewards: Tensor) -> tuple[StateT, Info]:
        """Learn from a wave's rewards [N]."""


@runtime_checkable
class Deciding(Protocol):
    """A state that tells how its search stands; for methods whose rows are not all answers, or that end by themselves.

    Without it every response may be the answer, and the search ends after ``Method.iterations`` waves.
    """

    @property
    def answers(self) -> frozenset[tuple[int, int]]:
        """Iteration and row of the responses that stand as answers so far; when there are none, all of them do."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to propose."""


@runtime_checkable
class Flowing(Protocol):
    """A state of a search whose waves come back before all rows have ended, so that an iteration takes several.

    Without it each wave is an iteration, and the search ends after ``Method.iterations`` of them; with it after at most
    so many.
    """

    @property
    def goes_on(self) -> bool:
        """Whether more belongs to the present iteration."""

    @property
    def exhausted(self) -> bool:
        """Whether all responses that the method plans are there."""


@runtime_checkable
class Crediting(Protocol):
    """A state that learns where its responses lose, once it is told what their beginnings earn.

    It is told so before each wave when the reward understands unfinished texts (``partial``), as often as it asks.
    """

    @property
    def beginnings(self) -> Wave | None:
        """Unfinished texts, as a wave that keeps all it says or decodes a token of each at most; None for none."""

    def credited(self, rollouts: Rollouts, rewards: Tensor) -> Self:
        """The state that knows what that wave brought, and its rewards, one per row."""


class ContextLengthError(ValueError):
    """The prompt and the answer that was asked for do not fit into the model's context."""


def answered(steps: Generator[Any, Any, T], answer: Callable[[Any], Any]) -> T:
    """What a generator returns when each thing it asks for is answered; whoever waits is a thread."""
    reply: Any = None
    while True:
        try:
            wish = steps.send(reply)
        except StopIteration as end:
            return cast(T, end.value)
        reply = answer(wish)


async def aanswered(steps: Generator[Any, Any, T], answer: Callable[[Any], Awaitable[Any]]) -> T:
    """``answered`` for an event loop."""
    reply: Any = None
    while True:
        try:
            wish = steps.send(reply)
        except StopIteration as end:
            return cast(T, end.value)
        reply = await answer(wish)


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless the condition holds."""
    if not condition:
        raise ValueError(message)
