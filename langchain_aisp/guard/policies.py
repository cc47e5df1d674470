"""What to do with a message that failed its checks: a policy asks for steps and returns an answer, or None to pass on.

Policies are generators, so that threads and event loops run the same ones.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Protocol, TypeAlias, TypeVar, cast

from langchain_core.messages import AIMessage, BaseMessage

from langchain_aisp.guard.audit import AuditLog
from langchain_aisp.guard.checks import Check, Exchange, Verdict, reasoning_of
from langchain_aisp.types import require

T = TypeVar("T")


@dataclass(frozen=True)
class Ask:
    """A step: ask the model, with settings for this call; the reply is its ``AIMessage``."""

    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Examine:
    """A step: check a message; the reply is a list of verdicts."""

    exchange: Exchange
    checks: Sequence[Check]


@dataclass(frozen=True)
class Note:
    """A step: put a record on the disk."""

    log: AuditLog
    record: Mapping[str, Any]


Steps = Generator[Ask | Examine | Note, Any, T]


@dataclass(frozen=True)
class Tried:
    """A message and what its checks found: the user's, or one of the model's attempts.

    Attributes:
        message: The message.
        verdicts: One per check.
        settings: Keyword arguments of the call that brought it.
        seconds: How long that call took.
    """

    message: BaseMessage
    verdicts: Sequence[Verdict]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def reasons(self) -> tuple[str, ...]:
        """All that is wrong with it."""
        return tuple(reason for verdict in self.verdicts for reason in verdict.reasons)

    @property
    def summary(self) -> dict[str, Any]:
        """All but the text, for metadata and the log: plain values only."""
        told = self.message.response_metadata
        return {
            "settings": {name: _plain(value) for name, value in self.settings.items()},
            "checks": [verdict.check for verdict in self.verdicts],
            "reasons": list(self.reasons),
            "scores": {verdict.check: _plain(verdict.score) for verdict in self.verdicts if verdict.score is not None},
            "reward": _plain(told.get("reward")),
            "samples": _plain(told.get("samples")),
            "seconds": self.seconds,
        }


AskAgain: TypeAlias = Callable[[Mapping[str, Any]], Steps[Tried]]
"""Steps that ask the model again, with these keyword arguments, and check what it says."""

Act: TypeAlias = Steps[AIMessage | None]


class GuardError(Exception):
    """A message failed its checks and no policy had an answer.

    Attributes:
        reasons: What is wrong with it.
    """

    def __init__(self, reasons: Sequence[str]) -> None:
        """Keep the reasons."""
        super().__init__(tuple(reasons))
        self.reasons = tuple(reasons)

    def __str__(self) -> str:
        """The reasons in one line."""
        return f"The guard let no answer pass: {'; '.join(self.reasons)}."


class Policy(Protocol):
    """Acts on a failed message."""

    @property
    def name(self) -> str:
        """What was done, for the metadata and the log."""

    def act(self, failed: Tried, ask: AskAgain) -> Act:
        """Return the answer that goes out instead, or None to leave it to the next policy.

        Args:
            failed: The newest message that failed.
            ask: Asks the model again: ``tried = yield from ask({"temperature": 0.5})``.
        """


@dataclass(frozen=True)
class SearchLonger:
    """Asks again, up to so many times, until an answer passes.

    Attributes:
        times: Most further calls.
        settings: Keyword arguments of call 1, 2, ...: for ``AISPChatModel`` for example
            ``lambda attempt: {"method": AISP(samples=256 * 2**attempt), "seed": attempt}``.

    Raises:
        ValueError: For less than one call.
    """

    times: int = 2
    settings: Callable[[int], Mapping[str, Any]] = lambda attempt: {}
    name: str = "searched longer"

    def __post_init__(self) -> None:
        """Reject a search of no calls."""
        require(self.times >= 1, f"times must be at least 1, got {self.times}; leave SearchLonger out instead")

    def act(self, failed: Tried, ask: AskAgain) -> Act:
        """Ask and check in turns."""
        for attempt in range(1, self.times + 1):
            tried = yield from ask(self.settings(attempt))
            if not tried.reasons:
                return cast(AIMessage, tried.message)
        return None


@dataclass(frozen=True)
class Fallback:
    """Answers with a written message, which is not checked.

    Attributes:
        text: The message.
    """

    text: str
    name: str = "fell back"

    def act(self, failed: Tried, ask: AskAgain) -> Act:
        """Give the written message."""
        yield from ()
        return AIMessage(self.text)


@dataclass(frozen=True)
class Raise:
    """Raises ``GuardError`` with the reasons."""

    name: str = "raised"

    def act(self, failed: Tried, ask: AskAgain) -> Act:
        """Raise."""
        yield from ()
        raise GuardError(failed.reasons)


@dataclass(frozen=True)
class HandOver:
    """Interrupts the LangGraph run until a human resumes it.

    The human sees ``{"message", "reasoning", "tool_calls": [{"name", "args"}, ...], "reasons": [...]}`` and resumes
    with the same and a type, ``{**shown, "type": "approve"}``, with other words or calls,
    ``{**shown, "type": "edit", "message": text}``, or with ``{"type": "reject"}``, after which the next policy acts.
    What the human sends is not checked. Whoever resumes with something else is asked again, and told why under
    ``"problem"``.

    LangGraph runs an interrupted node again on resuming, and so asks the model again: what was shown goes out, never a
    second answer that nobody saw. Fix the model's seed, or an answer that passes may come instead.
    """

    name: str = "human"

    def act(self, failed: Tried, ask: AskAgain) -> Act:
        """Wait for the human.

        Raises:
            RuntimeError: Outside of a LangGraph run.
        """
        yield from ()
        answer = cast(AIMessage, failed.message)
        calls = [{"name": call["name"], "args": call["args"]} for call in answer.tool_calls]
        shown = {"message": answer.text, "reasoning": reasoning_of(answer), "tool_calls": calls}
        decision = _decided({**shown, "reasons": list(failed.reasons)})
        if decision["type"] == "reject":
            return None
        if all(decision.get(key) == value for key, value in shown.items()):
            return answer  # it came again as it was shown, so it goes out with all that it brought along
        sent = [{**call, "id": f"call_{uuid.uuid4().hex}"} for call in decision.get("tool_calls", ())]
        return AIMessage(decision["message"], tool_calls=sent)


@dataclass(frozen=True)
class Pass:
    """Lets a message out that has nothing against it; every guard begins with it."""

    name: str = "passed"

    def act(self, failed: Tried, ask: AskAgain) -> Act:
        """Give the message itself."""
        yield from ()
        return None if failed.reasons else cast(AIMessage, failed.message)


def _plain(value: Any) -> Any:
    """The value if JSON has it, else how Python writes it."""
    has = value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and isfinite(value))
    return value if has else repr(value)


def _decided(shown: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the human decides. Raising would not do: LangGraph would answer every later try with the same words."""
    decision = _interrupt(shown)
    while (problem := _problem(decision)) is not None:
        decision = _interrupt({**shown, "problem": problem})
    return cast(Mapping[str, Any], decision)


def _problem(decision: Any) -> str | None:
    kind, said = (decision.get("type"), decision.get("message")) if isinstance(decision, Mapping) else (None, None)
    if kind == "reject" or (kind in ("approve", "edit") and isinstance(said, str)):
        return None
    return f"resume with {{**shown, 'type': 'approve' or 'edit'}} or with {{'type': 'reject'}}, got {decision!r}"


def _interrupt(value: Mapping[str, Any]) -> Any:
    try:
        from langgraph.types import interrupt
    except ImportError as error:
        raise ImportError("HandOver needs LangGraph: pip install 'langchain-aisp[agents]'") from error
    try:
        return interrupt(value)
    except (KeyError, RuntimeError) as error:  # it looks for the run it is part of
        remedy = "Use the guard in a graph that is compiled with a checkpointer, or leave HandOver out."
        raise RuntimeError(f"HandOver found no LangGraph run that it could interrupt. {remedy}") from error
