"""The guard: it asks, checks and acts in one generator, which threads and event loops drive alike."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage, convert_to_messages
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import ensure_config, merge_configs

from langchain_aisp.guard.audit import AuditLog
from langchain_aisp.guard.checks import Check, Exchange, Verdict, text_of
from langchain_aisp.guard.policies import (
    Ask,
    Examine,
    HandOver,
    Note,
    Pass,
    Policy,
    Raise,
    SearchLonger,
    Steps,
    Tried,
)
from langchain_aisp.progress import UNSTREAMED
from langchain_aisp.types import aanswered, answered, require


@dataclass(frozen=True)
class Decision:
    """What goes out.

    Attributes:
        answer: The message as the model or a policy gave it.
        notes: Why it is this one.
    """

    answer: BaseMessage
    notes: Mapping[str, Any]

    @property
    def message(self) -> AIMessage:
        """The answer with the notes as ``response_metadata["guard"]``; those of a guard within are under "inner"."""
        told = self.answer.response_metadata
        inner = {"inner": told["guard"]} if "guard" in told else {}
        metadata = {**told, "guard": {**self.notes, **inner}}
        return cast(AIMessage, self.answer.model_copy(update={"response_metadata": metadata}))


@dataclass(frozen=True)
class Guard:
    """Checks answers, and what users say, and acts when they fail.

    A check that breaks raises: then nothing goes out.

    Attributes:
        checks: All must pass for an answer to go out; messages that call tools are answers too.
        policies: What to do otherwise, in this order; at the end ``GuardError`` is raised.
        input_checks: All must pass before the model is asked; they see the user's last message, once per message.
        input_policies: What to do otherwise, in this order; at the end ``GuardError`` is raised.
        audit: Where decisions are logged.

    Raises:
        ValueError: Without a check, and for input policies that act on answers.
    """

    checks: Sequence[Check] = ()
    policies: Sequence[Policy] = ()
    input_checks: Sequence[Check] = ()
    input_policies: Sequence[Policy] = ()
    audit: AuditLog | None = None

    def __post_init__(self) -> None:
        """Reject a guard that guards nothing, and policies that only make sense for answers."""
        require(bool(self.checks or self.input_checks), "a guard needs at least one check, got none")
        about_answers = [policy.name for policy in self.input_policies if isinstance(policy, SearchLonger | HandOver)]
        require(not about_answers, f"{about_answers} act on answers; input_policies take Fallback and Raise")

    def wrap(self, model: Runnable[Any, Any]) -> GuardedChatModel:
        """Guard a chat model, one with bound settings or tools, or any runnable that answers with an ``AIMessage``."""
        return GuardedChatModel(self, model)

    def steps(self, messages: Sequence[BaseMessage]) -> Steps[Decision]:
        """Ask for an answer that may go out; the caller replies to each step with its outcome."""
        place = _open_question(messages)
        if self.input_checks and place is not None:
            question = Exchange(messages[:place], messages[place])
            asked = [Tried(question.said, (yield Examine(question, self.input_checks)))]
            decision = yield from self._decide("input", messages, asked, self.input_policies)
            if decision.answer is not question.said:
                return decision
        tried: list[Tried] = []
        yield from self._ask(messages, tried, {})
        return (yield from self._decide("answer", messages, tried, self.policies))

    def _ask(self, messages: Sequence[BaseMessage], tried: list[Tried], settings: Mapping[str, Any]) -> Steps[Tried]:
        """Ask and check once more."""
        start = time.monotonic()
        answer: AIMessage = yield Ask(settings)
        seconds = round(time.monotonic() - start, 3)
        verdicts: Sequence[Verdict] = yield Examine(Exchange(messages, answer), self.checks)
        tried.append(Tried(answer, verdicts, settings, seconds))
        return tried[-1]

    def _decide(
        self,
        stage: Literal["input", "answer"],
        messages: Sequence[BaseMessage],
        tried: list[Tried],
        policies: Sequence[Policy],
    ) -> Steps[Decision]:
        """Let the first policy decide that has an answer."""
        ask = partial(self._ask, messages, tried)
        declined: list[str] = []
        for policy in (Pass(), *policies, Raise()):
            try:
                answer = yield from policy.act(tried[-1], ask)
            except Exception:  # the guard's own error, or the interrupt that hands over: nothing goes out now
                yield from self._log(_notes(stage, policy.name, declined, tried), tried, None)
                raise
            if answer is not None:
                notes = _notes(stage, policy.name, declined, tried)
                yield from self._log(notes, tried, answer)
                return Decision(answer, notes)
            declined.append(policy.name)
        raise AssertionError("Raise returned")

    def _log(self, notes: Mapping[str, Any], tried: Sequence[Tried], sent: BaseMessage | None) -> Steps[None]:
        if self.audit is not None:
            quote = self.audit.quote
            quoted = [{**each.summary, "text": quote(text_of(each.message))} for each in tried]
            gone = None if sent is None else quote(text_of(sent))
            yield Note(self.audit, {**_ids(), **notes, "tried": quoted, "sent": gone})


def drive(guard: Guard, messages: Sequence[BaseMessage], ask: Callable[[Mapping[str, Any]], Any]) -> Decision:
    """Run the guard; whoever waits is a thread."""

    def reply(step: Ask | Examine | Note) -> Any:
        match step:
            case Ask(settings):
                return _answer(ask(settings))
            case Examine(exchange, checks):
                return _examine(exchange, checks)
            case Note(log, record):
                return log.write(record)

    return answered(guard.steps(messages), reply)


async def adrive(
    guard: Guard, messages: Sequence[BaseMessage], ask: Callable[[Mapping[str, Any]], Awaitable[Any]]
) -> Decision:
    """Run the guard; whoever waits is an event loop."""

    async def reply(step: Ask | Examine | Note) -> Any:
        match step:
            case Ask(settings):
                return _answer(await ask(settings))
            case Examine(exchange, checks):
                return await _aexamine(exchange, checks)
            case Note(log, record):
                return await asyncio.to_thread(log.write, record)

    return await aanswered(guard.steps(messages), reply)


class GuardedChatModel(Runnable[LanguageModelInput, AIMessage]):
    """A chat model whose answers are checked before anybody sees them; made by ``Guard.wrap``.

    A stream brings the answer in one piece, after its checks. Callbacks and ``astream_events`` see the unchecked
    model too: show people the guarded output alone.
    """

    def __init__(self, guard: Guard, model: Runnable[Any, Any]) -> None:
        """Guard a model."""
        self.guard = guard
        self.model = model

    def invoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> AIMessage:
        """Answer; keyword arguments go to the model.

        Raises:
            GuardError: No answer passed, and no policy had one.
            TypeError: The model answered with something else than an ``AIMessage``.
        """
        # LangChain passes config to whoever takes it, but its annotation knows that of three-argument functions only
        return self._call_with_config(self._invoke, input, config, **kwargs)  # type: ignore[arg-type]

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        """``invoke`` for an event loop; cancelling it cancels the model's call and the checks under way."""
        return await self._acall_with_config(self._ainvoke, input, config, **kwargs)  # type: ignore[arg-type]

    def _invoke(self, input: LanguageModelInput, config: RunnableConfig, **kwargs: Any) -> AIMessage:
        def ask(settings: Mapping[str, Any]) -> Any:
            return self.model.invoke(input, _quiet(config), **{**kwargs, **settings})

        return drive(self.guard, _messages(input), ask).message

    async def _ainvoke(self, input: LanguageModelInput, config: RunnableConfig, **kwargs: Any) -> AIMessage:
        def ask(settings: Mapping[str, Any]) -> Awaitable[Any]:
            return self.model.ainvoke(input, _quiet(config), **{**kwargs, **settings})

        return (await adrive(self.guard, _messages(input), ask)).message


def _quiet(config: RunnableConfig) -> RunnableConfig:
    return merge_configs(config, {"tags": [UNSTREAMED]})


def _open_question(messages: Sequence[BaseMessage]) -> int | None:
    """Where the user's last message stands; None when it was asked about already, and tools have answered since."""
    if messages and isinstance(messages[-1], ToolMessage):
        return None
    return max((place for place, message in enumerate(messages) if isinstance(message, HumanMessage)), default=None)


def _answer(value: Any) -> AIMessage:
    if not isinstance(value, AIMessage):
        raise TypeError(
            f"a guard wraps what answers with an AIMessage, and got {type(value).__name__}. "
            "Parsers stand behind it: guard.wrap(model) | parser"
        )
    return value


def _examine(exchange: Exchange, checks: Sequence[Check]) -> list[Verdict]:
    with ExitStack() as tickets:
        started = [tickets.enter_context(check.submit(exchange)) for check in checks]
        return [ticket.future.result() for ticket in started]


async def _aexamine(exchange: Exchange, checks: Sequence[Check]) -> list[Verdict]:
    loop = asyncio.get_running_loop()
    with ExitStack() as tickets:
        started = [tickets.enter_context(check.submit(exchange, loop=loop)) for check in checks]
        return [await asyncio.wrap_future(ticket.future) for ticket in started]


def _messages(input: LanguageModelInput) -> list[BaseMessage]:
    if isinstance(input, PromptValue):
        return input.to_messages()
    return [HumanMessage(input)] if isinstance(input, str) else convert_to_messages(input)


def _notes(stage: str, action: str, declined: Sequence[str], tried: Sequence[Tried]) -> dict[str, Any]:
    """A decision in plain values, as metadata and the log hold it; the reasons are those that made somebody act."""
    return {
        "stage": stage,
        "action": action,
        "declined": [name for name in declined if name != Pass.name],
        "reasons": list(tried[0].reasons),
        "tried": [each.summary for each in tried],
    }


def _ids() -> dict[str, Any]:
    config = ensure_config()
    run = getattr(config.get("callbacks"), "parent_run_id", None)
    return {"thread": config.get("configurable", {}).get("thread_id"), "run": None if run is None else str(run)}
