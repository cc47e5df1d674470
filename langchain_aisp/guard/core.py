"""The guard: it asks, checks and acts in one generator, which threads and event loops drive alike."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, convert_to_messages
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import ensure_config, merge_configs

from langchain_aisp.guard.audit import AuditLog
from langchain_aisp.guard.checks import Check, Exchange, Verdict
from langchain_aisp.guard.policies import Ask, Examine, GuardError, HandOver, Policy, Raise, SearchLonger, reasons_of
from langchain_aisp.types import aanswered, answered, require

UNSTREAMED = "nostream"
"""The tag by which LangGraph keeps a model's tokens, here unchecked ones, out of its stream of messages."""


@dataclass(frozen=True)
class Guard:
    """Checks answers, and what users say, and acts when they fail.

    A check that breaks raises: then nothing goes out.

    Attributes:
        checks: All must pass for an answer to go out.
        policies: What to do otherwise, in this order; at the end ``GuardError`` is raised.
        input_checks: All must pass before the model is called; they see the last message of the user.
        input_policies: What to do otherwise, in this order; at the end ``GuardError`` is raised.
        tool_calls: Whether answers that call tools are checked too, with the calls' arguments.
        audit: Where decisions are logged.
    """

    checks: Sequence[Check] = ()
    policies: Sequence[Policy] = ()
    input_checks: Sequence[Check] = ()
    input_policies: Sequence[Policy] = ()
    tool_calls: bool = False
    audit: AuditLog | None = None

    def __post_init__(self) -> None:
        """Reject a guard that guards nothing, and policies that only make sense for answers."""
        require(bool(self.checks or self.input_checks), "a guard needs at least one check, got none")
        about_answers = [policy.name for policy in self.input_policies if isinstance(policy, SearchLonger | HandOver)]
        require(not about_answers, f"{about_answers} act on answers; input_policies take Fallback and Raise")

    def wrap(self, model: Runnable[Any, Any]) -> GuardedChatModel:
        """Guard a chat model, or one with bound settings or tools."""
        return GuardedChatModel(self, model)

    def steps(self, messages: Sequence[BaseMessage]) -> Generator[Ask | Examine, Any, AIMessage]:
        """Ask for an answer that may go out; the caller replies to each step with its outcome."""
        users = [place for place, message in enumerate(messages) if isinstance(message, HumanMessage)]
        if self.input_checks and users:
            said = Exchange(messages[: users[-1]], messages[users[-1]])
            blocked = yield from self._decide(said, "input", self.input_checks, self.input_policies)
            if blocked is not None:
                return blocked
        answer: AIMessage = yield Ask()
        if not self.checks or (answer.tool_calls and not self.tool_calls):
            return answer
        decided = yield from self._decide(Exchange(messages, answer), "answer", self.checks, self.policies)
        assert decided is not None
        return decided

    def _decide(
        self, exchange: Exchange, stage: str, checks: Sequence[Check], policies: Sequence[Policy]
    ) -> Generator[Ask | Examine, Any, AIMessage | None]:
        """The answer that goes out, or None where a user's message passed."""
        verdicts: Sequence[Verdict] = yield Examine(exchange)
        if not reasons_of(verdicts):
            self._log(stage, "passed", exchange, verdicts, exchange.said)
            return _marked(exchange.said, stage, "passed", verdicts) if isinstance(exchange.said, AIMessage) else None
        for policy in (*policies, Raise()):
            try:
                answer = yield from policy.act(exchange, verdicts)
            except GuardError:
                self._log(stage, policy.name, exchange, verdicts, None)
                raise
            if answer is not None:
                self._log(stage, policy.name, exchange, verdicts, answer)
                return _marked(answer, stage, policy.name, verdicts)
        raise AssertionError("Raise returned")

    def checks_of(self, exchange: Exchange) -> Sequence[Check]:
        """The checks that concern a message."""
        return self.checks if isinstance(exchange.said, AIMessage) else self.input_checks

    def _log(
        self, stage: str, action: str, exchange: Exchange, verdicts: Sequence[Verdict], sent: BaseMessage | None
    ) -> None:
        if self.audit is not None:
            texts = {"said": exchange.text, "sent": None if sent is None else sent.text}
            self.audit.write({"stage": stage, "action": action, **_ids(), **_found(verdicts)}, texts)


def drive(guard: Guard, messages: Sequence[BaseMessage], ask: Callable[[Mapping[str, Any]], AIMessage]) -> AIMessage:
    """Run the guard; whoever waits is a thread."""

    def reply(step: Ask | Examine) -> Any:
        return ask(step.settings) if isinstance(step, Ask) else _examine(guard, step.exchange)

    return answered(guard.steps(messages), reply)


async def adrive(
    guard: Guard, messages: Sequence[BaseMessage], ask: Callable[[Mapping[str, Any]], Awaitable[AIMessage]]
) -> AIMessage:
    """Run the guard; whoever waits is an event loop."""

    async def reply(step: Ask | Examine) -> Any:
        return await (ask(step.settings) if isinstance(step, Ask) else _aexamine(guard, step.exchange))

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
        """Answer; keyword arguments go to the model."""
        # LangChain passes config to whoever takes it, but its annotation knows that of three-argument functions only
        return self._call_with_config(self._answer, input, config, **kwargs)  # type: ignore[arg-type]

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        """Answer; keyword arguments go to the model."""
        return await self._acall_with_config(self._aanswer, input, config, **kwargs)  # type: ignore[arg-type]

    def _answer(self, input: LanguageModelInput, config: RunnableConfig, **kwargs: Any) -> AIMessage:
        quiet = merge_configs(config, {"tags": [UNSTREAMED]})
        return drive(self.guard, _messages(input), lambda more: self.model.invoke(input, quiet, **{**kwargs, **more}))

    async def _aanswer(self, input: LanguageModelInput, config: RunnableConfig, **kwargs: Any) -> AIMessage:
        quiet = merge_configs(config, {"tags": [UNSTREAMED]})
        return await adrive(
            self.guard, _messages(input), lambda more: self.model.ainvoke(input, quiet, **{**kwargs, **more})
        )


def quiet_copy(model: BaseChatModel) -> BaseChatModel:
    """The same model with its unchecked tokens kept out of LangGraph's stream of messages."""
    return model.model_copy(update={"tags": [*(model.tags or []), UNSTREAMED]})


def _examine(guard: Guard, exchange: Exchange) -> list[Verdict]:
    with ExitStack() as tickets:
        started = [tickets.enter_context(check.submit(exchange)) for check in guard.checks_of(exchange)]
        return [ticket.future.result() for ticket in started]


async def _aexamine(guard: Guard, exchange: Exchange) -> list[Verdict]:
    loop = asyncio.get_running_loop()
    with ExitStack() as tickets:
        started = [tickets.enter_context(check.submit(exchange, loop=loop)) for check in guard.checks_of(exchange)]
        return [await asyncio.wrap_future(ticket.future) for ticket in started]


def _messages(input: LanguageModelInput) -> list[BaseMessage]:
    if isinstance(input, PromptValue):
        return input.to_messages()
    return [HumanMessage(input)] if isinstance(input, str) else convert_to_messages(input)


def _marked(answer: AIMessage, stage: str, action: str, verdicts: Sequence[Verdict]) -> AIMessage:
    guard = {"stage": stage, "action": action, **_found(verdicts)}
    return answer.model_copy(update={"response_metadata": {**answer.response_metadata, "guard": guard}})


def _found(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What was found against the first answer, or against the user's message."""
    scores = {verdict.check: verdict.score for verdict in verdicts if verdict.score is not None}
    return {
        "checks": [verdict.check for verdict in verdicts],
        "reasons": list(reasons_of(verdicts)),
        "scores": scores,
    }


def _ids() -> dict[str, Any]:
    config = ensure_config()
    callbacks = config.get("callbacks")
    run = getattr(callbacks, "parent_run_id", None)
    return {"thread": config.get("configurable", {}).get("thread_id"), "run": None if run is None else str(run)}
