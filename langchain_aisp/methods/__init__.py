"""Searches over the responses of a model; each knows records and tensors, no engine and no reward."""

from langchain_aisp.methods.aisp import AISP
from langchain_aisp.methods.best_of_n import BestOfN
from langchain_aisp.methods.greedy import Greedy
from langchain_aisp.methods.published import PublishedAISP

__all__ = ["AISP", "BestOfN", "Greedy", "PublishedAISP"]
