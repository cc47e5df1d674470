"""News of a running search for those who listen: callbacks, the events of a chain, LangGraph's custom stream.

LangChain's own ``dispatch_custom_event`` reaches the chain around a call only, and raises where there is none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForLLMRun,
    CallbackManager,
    CallbackManagerForLLMRun,
)
from langchain_core.runnables.config import ensure_config

from langchain_aisp.align import Iteration

EVENT = "aisp_iteration"
UNSTREAMED = "nostream"  # the tag of a call whose texts LangGraph keeps out of its streams

Manager = TypeVar("Manager", CallbackManager, AsyncCallbackManager)


def report(now: Iteration, run_manager: CallbackManagerForLLMRun | None) -> None:
    """Tell callbacks and a LangGraph stream of an iteration, where there are any."""
    manager = _manager(CallbackManager, run_manager)
    _stream(now, manager)
    if manager.parent_run_id is not None:
        manager.on_custom_event(EVENT, _news(now), run_id=manager.parent_run_id)


async def areport(now: Iteration, run_manager: AsyncCallbackManagerForLLMRun | None) -> None:
    """``report`` for an event loop."""
    manager = _manager(AsyncCallbackManager, run_manager)
    _stream(now, manager)
    if manager.parent_run_id is not None:
        await manager.on_custom_event(EVENT, _news(now), run_id=manager.parent_run_id)


def _stream(now: Iteration, listeners: CallbackManager | AsyncCallbackManager) -> None:
    """Write an iteration into LangGraph's custom stream, its text only where the call's texts may be streamed."""
    news = now.numbers if UNSTREAMED in listeners.tags else _news(now)
    _stream_writer()({EVENT: news})


def _news(now: Iteration) -> dict[str, Any]:
    """The iteration's line of the trace and the best text so far."""
    return {**now.numbers, "text": now.response.text}


def _manager(
    kind: type[Manager], run_manager: CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun | None
) -> Manager:
    """Who listens to this run, or else to the chain around it; outside of both the manager has no run id."""
    if run_manager is None:
        config = ensure_config()
        return kind.configure(
            inheritable_callbacks=config.get("callbacks"),
            inheritable_tags=config.get("tags"),
            inheritable_metadata=config.get("metadata"),
        )
    return kind(
        run_manager.handlers,
        parent_run_id=run_manager.run_id,
        tags=run_manager.tags,
        metadata=run_manager.metadata,
    )


def _stream_writer() -> Callable[[Any], object]:
    """The writer of the LangGraph run that this call is part of, or one that writes nowhere."""
    if "langgraph" not in sys.modules:
        return _write_nowhere
    from langgraph.config import get_stream_writer

    try:
        return get_stream_writer()
    except (RuntimeError, KeyError):  # outside of any run; in a run that is no graph's
        return _write_nowhere


def _write_nowhere(_: Any) -> None:
    pass
