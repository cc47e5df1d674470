"""What may be wrong with a message: every check gets an exchange and starts finding reasons against it."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from langchain_core.messages import BaseMessage

from langchain_aisp.calling import UNJUDGED, judges_calls
from langchain_aisp.futures import gather
from langchain_aisp.messages import to_chat
from langchain_aisp.rewards import JudgeReward, Rule, as_reward
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

    @cached_property
    def text(self) -> str:
        """All that would go out, on lines: text, reasoning, and of calls the tool's name and every key and value."""
        return text_of(self.said)

    @property
    def calls_tools(self) -> bool:
        """Whether the message calls tools, in vain or not."""
        return bool(getattr(self.said, "tool_calls", ()) or getattr(self.said, "invalid_tool_calls", ()))


@dataclass(frozen=True)
class Verdict:
    """What one check found.

    Attributes:
        check: Its name.
        reasons: What is wrong; empty when nothing is.
        score: The number it was decided by, where there is one, in units of the reward.
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
class Rules:
    """Demands that a message keeps rules, such as ``no_topic("lawsuit")``, ``no_personal_data()``, ``must_match(...)``.

    Attributes:
        rules: The rules; their weights do not matter. Reasons name a rule, never the passage, which may be private.
        name: For the log.
        tool_calls: Whether messages that call tools are checked too, with the arguments of the calls.

    Raises:
        ValueError: Without a rule.
    """

    rules: Sequence[Rule]
    name: str = "rules"
    tool_calls: bool = True

    def __post_init__(self) -> None:
        """Reject no rules."""
        require(len(self.rules) > 0, "Rules needs at least one rule, such as no_personal_data()")

    def submit(self, exchange: Exchange, *, loop: AbstractEventLoop | None = None) -> Ticket[Verdict]:
        """Check here and now."""
        rules = self.rules if self.tool_calls or not exchange.calls_tools else ()
        broken = [rule for rule in rules if rule.check(exchange.text)]
        return _done(Verdict(self.name, tuple(f"{rule.name}: the message {rule.reason}" for rule in broken)))


@dataclass(frozen=True)
class LeastReward:
    """Demands a least reward: of a reward model, a policy classifier, a judge or a function, scored anew.

    A reward that understands tool calls, see ``as_reward(fn, sees="response")``, gets them as such; for the others
    their names and arguments stand on lines below the text. Reasoning is not scored.

    Attributes:
        reward: A reward, or a function ``(chat, responses) -> scores``.
        least: The lowest reward that passes.
        tool_calls: Whether messages that call tools are scored too. Say False for a reward that knows answers only.

    Raises:
        TypeError: If the reward is neither.
    """

    reward: Reward | Callable[..., Any]
    least: float
    tool_calls: bool = True

    def __post_init__(self) -> None:
        """Wrap a function once."""
        object.__setattr__(self, "reward", as_reward(self.reward))

    @property
    def name(self) -> str:
        """The reward's."""
        return as_reward(self.reward).name

    def submit(self, exchange: Exchange, *, loop: AbstractEventLoop | None = None) -> Ticket[Verdict]:
        """Start scoring the message after its conversation; a first message, which has none, follows itself."""
        if exchange.calls_tools and not self.tool_calls:
            return _done(Verdict(self.name))
        reward = as_reward(self.reward)
        chat = to_chat(exchange.messages or [exchange.said])
        scores = reward.submit([(chat, _response(exchange.said, judges_calls(reward)))], loop=loop)
        return gather([scores.future], lambda found: _compared(self.name, float(found[0][0]), self.least))


@dataclass(frozen=True)
class ReportedReward:
    """Demands a least reward of those that the answer brought along in its ``response_metadata``.

    A call that the model's own reward could not judge, which ``AISPChatModel`` says, passes.

    Attributes:
        least: The lowest reward that passes.
        name: For the log.
    """

    least: float
    name: str = "reported reward"

    def submit(self, exchange: Exchange, *, loop: AbstractEventLoop | None = None) -> Ticket[Verdict]:
        """Read the reward; an answer without one does not pass."""
        told = exchange.said.response_metadata
        if exchange.calls_tools and told.get("reward_name") == UNJUDGED:
            return _done(Verdict(self.name))
        if told.get("reward") is None:
            return _done(Verdict(self.name, ("the answer reports no reward; use LeastReward to score it",)))
        return _done(_compared(self.name, float(told["reward"]), self.least))


def judged(model: Any, rubric: str, *, least: float, **settings: Any) -> LeastReward:
    """Ask a chat model to grade the message, which is fenced in its prompt.

    Args:
        model: Any chat model of LangChain.
        rubric: What a good message is.
        least: The lowest grade that passes, on the judge's scale: 1 to 10 unless ``scale`` says otherwise.
        settings: Further ones of ``JudgeReward``, such as ``scale``, ``votes`` and ``timeout`` in seconds.
    """
    return LeastReward(JudgeReward(model, rubric, **settings), least)


def text_of(message: BaseMessage) -> str:
    """All that a message says, on lines: text, reasoning, and of tool calls the name and every key and value.

    Values stand as they are, not as JSON, whose escapes would hide what they hold from a pattern.
    """
    return "\n".join(part for part in (_spoken(message), reasoning_of(message)) if part)


def reasoning_of(message: BaseMessage) -> str:
    """What was thought before a message, wherever the provider has put it; empty for nothing."""
    return "\n".join(str(thought) for block in message.content_blocks for thought in _thoughts(block))


def _spoken(message: BaseMessage) -> str:
    """The text, and what tools are told."""
    called = [part for call in getattr(message, "tool_calls", ()) for part in (call["name"], *_leaves(call["args"]))]
    garbled = [call[key] for call in getattr(message, "invalid_tool_calls", ()) for key in ("name", "args")]
    return "\n".join([part for part in map(str, (message.text, *called, *garbled)) if part])


def _thoughts(block: Mapping[str, Any]) -> Iterator[Any]:
    """The reasoning in a block of content; a block that LangChain does not know may hold some."""
    if block["type"] == "reasoning":
        yield block.get("reasoning", "")
    elif block["type"] == "non_standard":
        yield from _leaves(block["value"])


def _leaves(value: Any) -> Iterator[Any]:
    """Every key and value, however deep."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _response(said: BaseMessage, understands_calls: bool) -> Response:
    """The message as a reward sees it."""
    if not understands_calls:
        return Response(_spoken(said))
    calls = [{"name": call["name"], "args": call["args"]} for call in getattr(said, "tool_calls", ())]
    failed = [dict(call) for call in getattr(said, "invalid_tool_calls", ())]
    return Response(said.text, tool_calls=tuple(calls), invalid_tool_calls=tuple(failed))


def _compared(name: str, score: float, least: float) -> Verdict:
    """A verdict by a threshold; a score that is not a number does not pass."""
    return Verdict(name, () if score >= least else (f"{name} is {score:.3g}, below {least:g}",), score)


def _done(verdict: Verdict) -> Ticket[Verdict]:
    return gather((), lambda _: verdict)
