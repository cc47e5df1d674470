"""What may be wrong with a message: every check gets an exchange and starts finding reasons against it."""

from __future__ import annotations

import json
import re
from asyncio import AbstractEventLoop
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from langchain_core.messages import BaseMessage
from torch import Tensor

from langchain_aisp.messages import to_chat
from langchain_aisp.rewards import as_reward
from langchain_aisp.types import Response, Reward, Ticket, require


@dataclass(frozen=True)
class Exchange:
    """A message and the conversation before it.

    Attributes:
        messages: What was said before.
        said: The message to check: an answer, or what the user said.
    """

    messages: Sequence[BaseMessage]
    said: BaseMessage

    @property
    def text(self) -> str:
        """All that is said, arguments of tool calls included."""
        calls = getattr(self.said, "tool_calls", [])
        return "\n".join([self.said.text, *(json.dumps(call["args"], ensure_ascii=False) for call in calls)])


@dataclass(frozen=True)
class Verdict:
    """What one check found.

    Attributes:
        check: Its name.
        reasons: What is wrong; empty when nothing is.
        score: The number it was decided by, where there is one.
    """

    check: str
    reasons: tuple[str, ...] = ()
    score: float | None = None


class Check(Protocol):
    """Finds reasons against a message."""

    @property
    def name(self) -> str:
        """For reasons and the log."""

    def submit(self, exchange: Exchange, *, loop: AbstractEventLoop | None = None) -> Ticket[Verdict]:
        """Start checking; ``loop`` is the caller's running event loop when the caller awaits the ticket."""


@dataclass(frozen=True)
class Pattern:
    """Forbids what a regular expression finds, in any case of letters.

    Attributes:
        name: What is forbidden, for the reasons; the match itself is not repeated, since it may be private.
        expression: The regular expression.
    """

    name: str
    expression: str

    def submit(self, exchange: Exchange, *, loop: AbstractEventLoop | None = None) -> Ticket[Verdict]:
        """Look for the expression."""
        found = re.search(self.expression, exchange.text, re.IGNORECASE)
        return _done(Verdict(self.name, (f"contains {self.name}",) if found else ()))


def pii() -> tuple[Pattern, ...]:
    """Patterns of e-mail addresses, card numbers and IBANs; a first net, not a proof that a text is clean."""
    return (
        Pattern("an e-mail address", r"[\w.+-]+@[\w-]+\.[\w.-]+"),
        Pattern("a card number", r"\b\d(?:[ -]?\d){12,18}\b"),
        Pattern("an IBAN", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b"),
    )


@dataclass(frozen=True)
class LeastReward:
    """Demands a least reward: of a reward model, a policy classifier, a judge or a function, scored anew.

    Attributes:
        reward: A reward, or a function ``(chat, responses) -> scores``.
        least: The lowest reward that passes.
    """

    reward: Reward | Callable[..., Any]
    least: float

    @property
    def name(self) -> str:
        """The reward's."""
        return as_reward(self.reward).name

    def submit(self, exchange: Exchange, *, loop: AbstractEventLoop | None = None) -> Ticket[Verdict]:
        """Score the message after its conversation; a user's first message has none, and follows itself."""
        reward = as_reward(self.reward)
        chat = to_chat(exchange.messages or [exchange.said])
        scores = reward.submit([(chat, Response(exchange.text))], loop=loop)
        return _then(scores, lambda rewards: _compared(reward.name, float(rewards[0]), self.least))


@dataclass(frozen=True)
class ReportedReward:
    """Demands a least reward of those that the answer brought along in its ``response_metadata``.

    Attributes:
        least: The lowest reward that passes.
    """

    least: float
    name: str = "reported reward"

    def submit(self, exchange: Exchange, *, loop: AbstractEventLoop | None = None) -> Ticket[Verdict]:
        """Read the reward; an answer without one does not pass."""
        reward = exchange.said.response_metadata.get("reward")
        if reward is None:
            return _done(Verdict(self.name, ("the answer reports no reward; use LeastReward to score it",)))
        return _done(_compared(self.name, float(reward), self.least))


def judged(model: Any, rubric: str, *, least: float, **settings: Any) -> LeastReward:
    """Ask a chat model to grade the message; the message is fenced, see ``JudgeReward``, which takes the settings."""
    from langchain_aisp.rewards.judge import JudgeReward

    return LeastReward(JudgeReward(model, rubric, **settings), least)


def _compared(name: str, score: float, least: float) -> Verdict:
    require(score == score, f"{name} gave NaN, which no threshold can be compared with")
    return Verdict(name, () if score >= least else (f"{name} is {score:.3g}, below {least:g}",), score)


def _done(verdict: Verdict) -> Ticket[Verdict]:
    future: Future[Verdict] = Future()
    future.set_result(verdict)
    return Ticket(future)


def _then(ticket: Ticket[Tensor], conclude: Callable[[Tensor], Verdict]) -> Ticket[Verdict]:
    """The verdict that follows from scores in flight; whatever fails on the way fails the verdict."""
    future: Future[Verdict] = Future()

    def settle(scores: Future[Tensor]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(conclude(scores.result()))
        except BaseException as error:
            future.set_exception(error)

    ticket.future.add_done_callback(settle)
    return Ticket(future, ticket.cancel)
