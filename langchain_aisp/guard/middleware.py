"""The guard in an agent of LangChain: the same steps around each call of the agent's model."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage

from langchain_aisp.guard.core import Decision, Guard, adrive, drive
from langchain_aisp.progress import UNSTREAMED

try:
    from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
except ImportError as missing:
    raise ImportError("GuardMiddleware needs LangChain's agents: pip install 'langchain-aisp[agents]'") from missing


class GuardMiddleware(AgentMiddleware[Any, Any, Any]):
    """Lets an agent's messages, calls of tools among them, out only when they were checked."""

    def __init__(self, guard: Guard, name: str = "guard") -> None:
        """Guard an agent.

        Args:
            guard: The guard.
            name: Of this middleware; several guards in one agent, the first outermost, need names of their own.
        """
        super().__init__()
        self.guard = guard
        self._name = name

    @property
    def name(self) -> str:
        """What tells it from other middleware."""
        return self._name

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Ask through the guard.

        Raises:
            GuardError: No answer passed, and no policy had one.
        """
        responses: list[ModelResponse[Any]] = []

        def ask(settings: Mapping[str, Any]) -> BaseMessage:
            responses.append(handler(_with(request, settings)))
            return _answer(responses[-1])

        return _response(responses, drive(self.guard, _said(request), ask))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """``wrap_model_call`` for an event loop."""
        responses: list[ModelResponse[Any]] = []

        async def ask(settings: Mapping[str, Any]) -> BaseMessage:
            responses.append(await handler(_with(request, settings)))
            return _answer(responses[-1])

        return _response(responses, await adrive(self.guard, _said(request), ask))


def _said(request: ModelRequest[Any]) -> list[BaseMessage]:
    return [*([request.system_message] if request.system_message else []), *request.messages]


def _with(request: ModelRequest[Any], settings: Mapping[str, Any]) -> ModelRequest[Any]:
    """The request with settings for the model, whose unchecked texts stay out of LangGraph's streams."""
    model = request.model.model_copy(update={"tags": [*(request.model.tags or []), UNSTREAMED]})
    return request.override(model=model, model_settings={**request.model_settings, **settings})


def _answer(response: ModelResponse[Any]) -> BaseMessage:
    """The model's message; behind it may stand the agent's note about a structured answer."""
    return next(message for message in response.result if isinstance(message, AIMessage))


def _response(responses: list[ModelResponse[Any]], decision: Decision) -> ModelResponse[Any]:
    """The response that the answer came with, or, for an answer that no model gave, the answer alone."""
    came = next((each for each in responses if _answer(each) is decision.answer), ModelResponse([decision.answer]))
    result = [decision.message if message is decision.answer else message for message in came.result]
    return ModelResponse(result, came.structured_response)
