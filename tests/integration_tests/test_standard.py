"""LangChain's own standard integration tests, on the models that come with the package."""

from typing import Any

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests

from langchain_aisp import AISP, ClassifierReward
from langchain_aisp.demo import LANGUAGE_MODEL_PATH, REWARD_MODEL_PATH
from tests.suites import LocalModel

pytestmark = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # the suite measures recordings only


class TestStandardIntegration(LocalModel, ChatModelIntegrationTests):
    """Tests of images and audio skip themselves: the model reads and writes text."""

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "demo",
            "reward": ClassifierReward.from_pretrained(REWARD_MODEL_PATH),  # a model given by its path has no own one
            "method": AISP(samples=16, iterations=2),
            "max_tokens": 96,
            "grounded_arguments": True,  # on for "demo", but the model that is named by its path has no such default
        }

    @property
    def model_override_value(self) -> str:
        return str(LANGUAGE_MODEL_PATH)
