"""Answers leave only when they were checked: checks find reasons, policies act on them, a log keeps what happened."""

from typing import Any

from langchain_aisp.guard.audit import AuditLog
from langchain_aisp.guard.checks import Check, Exchange, LeastReward, ReportedReward, Rules, Verdict, judged
from langchain_aisp.guard.core import Guard, GuardedChatModel
from langchain_aisp.guard.policies import Fallback, GuardError, HandOver, Policy, Raise, SearchLonger, Tried

__all__ = [
    "AuditLog",
    "Check",
    "Exchange",
    "Fallback",
    "Guard",
    "GuardError",
    "GuardMiddleware",
    "GuardedChatModel",
    "HandOver",
    "LeastReward",
    "Policy",
    "Raise",
    "ReportedReward",
    "Rules",
    "SearchLonger",
    "Tried",
    "Verdict",
    "judged",
]


def __getattr__(name: str) -> Any:
    """Import the middleware, and with it langchain, only for those who use it."""
    if name != "GuardMiddleware":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from langchain_aisp.guard.middleware import GuardMiddleware

    return GuardMiddleware
