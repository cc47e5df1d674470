"""What to do with a message that failed its checks: a policy asks for steps and returns an answer, or None to pass on.

Policies are generators, so that threads and event loops run the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from langchain_core.messages import AIMessage

from langchain_aisp.guard.checks import Exchange, Verdict
from langchain_aisp.types import require


@dataclass(frozen=True)
class Ask:
    """A step: ask the model, with settings for this call; the reply is its ``AIMessage``."""

    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Examine:
    """A step: check a message; the reply is a list of verdicts."""

    exchange: Exchange


Steps = Generator[Ask | Examine, Any, AIMessage | None]


class GuardError(Exception):
    """A message failed its checks and no policy had an answer.

    Attributes:
        reasons: What is wrong with it.
    """

    def __init__(self, reasons: Sequence[str]) -> None:
        """Keep the reasons."""
        super().__init__(f"The guard let no answer pass: {'; '.join(reasons)}.")
        self.reasons = tuple(reasons)


class Policy(Protocol):
    """Acts on a failed message."""

    @property
    def name(self) -> str:
        """What was done, for the metadata and the log."""

    def act(self, exchange: Exchange, verdicts: Sequence[Verdict]) -> Steps:
        """Return the answer that goes out instead, or None to leave it to the next policy."""


@dataclass(frozen=True)
class SearchLonger:
    """Asks again, up to so many times, until an answer passes.

    Attributes:
        times: Most further calls.
        settings: Keyword arguments of call 1, 2, ...: for ``AISPChatModel`` for example
            ``lambda attempt: {"method": AISP(samples=256 * 2**attempt), "seed": attempt}``.
    """

    times: int = 2
    settings: Callable[[int], Mapping[str, Any]] = lambda attempt: {}
    name: str = "searched longer"

    def __post_init__(self) -> None:
        """Reject a search of no calls."""
        require(self.times >= 1, f"times must be at least 1, got {self.times}; leave SearchLonger out instead")

    def act(self, exchange: Exchange, verdicts: Sequence[Verdict]) -> Steps:
        """Ask and check in turns."""
        for attempt in range(1, self.times + 1):
            answer: AIMessage = yield Ask(self.settings(attempt))
            if not reasons_of((yield Examine(Exchange(exchange.messages, answer)))):
                return answer
        return None


@dataclass(frozen=True)
class Fallback:
    """Answers with a written message."""

    text: str
    name: str = "fell back"

    def act(self, exchange: Exchange, verdicts: Sequence[Verdict]) -> Steps:
        """Give the written message."""
        yield from ()
        return AIMessage(self.text)


@dataclass(frozen=True)
class Raise:
    """Raises ``GuardError`` with the reasons."""

    name: str = "raised"

    def act(self, exchange: Exchange, verdicts: Sequence[Verdict]) -> Steps:
        """Raise."""
        yield from ()
        raise GuardError(reasons_of(verdicts))


@dataclass(frozen=True)
class HandOver:
    """Interrupts the LangGraph run until a human resumes it.

    The human sees ``{"message", "reasons"}`` and resumes with ``{"type": "approve", "message": text}``, where text is
    the message that was shown, ``{"type": "edit", "message": text}``, or ``{"type": "reject"}``, after which the next
    policy acts. LangGraph runs an interrupted node again on resuming, and so asks the model again: the human's text
    goes out, never a second answer that nobody saw. Fix the model's seed, or an answer that passes may come instead.
    """

    name: str = "human"

    def act(self, exchange: Exchange, verdicts: Sequence[Verdict]) -> Steps:
        """Wait for the human."""
        yield from ()
        decision = _interrupt({"message": exchange.text, "reasons": list(reasons_of(verdicts))})
        kind, text = (decision.get("type"), decision.get("message")) if isinstance(decision, dict) else (decision, None)
        if kind == "reject":
            return None
        require(
            kind in ("approve", "edit") and isinstance(text, str),
            f"resume with {{'type': 'approve' or 'edit', 'message': text}} or {{'type': 'reject'}}, got {decision!r}",
        )
        return AIMessage(str(text))


def reasons_of(verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """All reasons of all checks."""
    return tuple(reason for verdict in verdicts for reason in verdict.reasons)


def _interrupt(value: Any) -> Any:
    try:
        from langgraph.types import interrupt
    except ImportError as error:
        raise ImportError("HandOver needs LangGraph: pip install 'langchain-aisp[agents]'") from error
    return interrupt(value)
