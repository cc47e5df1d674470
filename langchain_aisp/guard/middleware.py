"""The guard in an agent of LangChain: the same steps around each call of the agent's model."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from langchain_core.messages import AIMessage

from langchain_aisp.guard.core import Guard, adrive, drive, quiet_copy

try:
    from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
except ImportError as missing:
    raise ImportError("GuardMiddleware needs LangChain's agents: pip install 'langchain-aisp[agents]'") from missing


class GuardMiddleware(AgentMiddleware[Any, Any, Any]):
    """Lets an agent's final answers, and with ``Guard(tool_calls=True)`` its tool calls, out only when checked."""

    def __init__(self, guard: Guard) -> None:
        """Guard an agent."""
        super().__init__()
        self.guard = guard

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Ask through the guard."""
        seen: list[ModelResponse[Any]] = []

        def ask(settings: Mapping[str, Any]) -> AIMessage:
            seen.append(handler(_with(request, settings)))
            return _answer(seen[-1])

        return _response(seen, drive(self.guard, _said(request), ask))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """Ask through the guard."""
        seen: list[ModelResponse[Any]] = []

        async def ask(settings: Mapping[str, Any]) -> AIMessage:
            seen.append(await handler(_with(request, settings)))
            return _answer(seen[-1])

        return _response(seen, await adrive(self.guard, _said(request), ask))


def _said(request: ModelRequest[Any]) -> list[Any]:
    return [*([request.system_message] if request.system_message else []), *request.messages]


def _with(request: ModelRequest[Any], settings: Mapping[str, Any]) -> ModelRequest[Any]:
    return request.override(model=quiet_copy(request.model), model_settings={**request.model_settings, **settings})


def _answer(response: ModelResponse[Any]) -> AIMessage:
    [answer, *_] = [message for message in response.result if isinstance(message, AIMessage)]
    return answer


def _response(seen: list[ModelResponse[Any]], answer: AIMessage) -> ModelResponse[Any]:
    """The response that the answer came with, or, for an answer that no model gave, the answer alone."""
    for response in seen:
        if _answer(response).content == answer.content and _answer(response).tool_calls == answer.tool_calls:
            rest = [message for message in response.result if not isinstance(message, AIMessage)]
            return ModelResponse(result=[answer, *rest], structured_response=response.structured_response)
    return ModelResponse(result=[answer])
