"""LangChain's own standard unit tests of a chat model."""

from typing import Any

from langchain_tests.unit_tests import ChatModelUnitTests

from tests.suites import LocalModel


class TestStandardUnit(LocalModel, ChatModelUnitTests):
    """Construction, parameters and tracing; nothing is loaded."""

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "demo"}
