"""Inference-time alignment for LangChain: a chat model that searches for the answer its reward likes best."""

from importlib.metadata import PackageNotFoundError, version

from langchain_aisp.align import Budget, aalign, aiterate, align, iterate
from langchain_aisp.chat_model import AISPChatModel
from langchain_aisp.methods import AISP, BestOfN
from langchain_aisp.rewards import ClassifierReward, as_reward
from langchain_aisp.types import Sampling

try:
    __version__ = version("langchain-aisp")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0"

__all__ = [
    "AISP",
    "AISPChatModel",
    "BestOfN",
    "Budget",
    "ClassifierReward",
    "Sampling",
    "__version__",
    "aalign",
    "aiterate",
    "align",
    "as_reward",
    "iterate",
]
