"""What LangChain's standard suites are told of every model here."""

from langchain_aisp import AISPChatModel


class LocalModel:
    """Goes before a suite's own class."""

    @property
    def chat_model_class(self) -> type[AISPChatModel]:
        return AISPChatModel

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def enable_vcr_tests(self) -> bool:
        """Also measure a stream; a local model makes no requests that would have to be recorded."""
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True
