"""LangChain's own standard unit tests of a chat model."""

from typing import Any

from langchain_tests.unit_tests import ChatModelUnitTests

from langchain_aisp import AISPChatModel


class TestStandardUnit(ChatModelUnitTests):
    """Construction, parameters and tracing; nothing is loaded."""

    @property
    def chat_model_class(self) -> type[AISPChatModel]:
        return AISPChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "demo"}
