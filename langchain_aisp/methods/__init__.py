"""Searches over the responses of a model; each knows records and tensors, no engine and no reward."""

from langchain_aisp.methods.aisp import AISP
from langchain_aisp.methods.args import ARGS
from langchain_aisp.methods.best_of_n import BestOfN
from langchain_aisp.methods.greedy import Greedy
from langchain_aisp.methods.misvo import MISVO
from langchain_aisp.methods.published import PublishedAISP
from langchain_aisp.methods.qalign import QAlign
from langchain_aisp.methods.recontrol import REControl
from langchain_aisp.methods.value import ValueNetwork

__all__ = ["AISP", "ARGS", "MISVO", "BestOfN", "Greedy", "PublishedAISP", "QAlign", "REControl", "ValueNetwork"]
