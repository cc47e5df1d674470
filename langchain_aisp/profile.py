"""What a model can do, in the form of LangChain's model profiles, known without loading its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class ResolvedProfile(dict[str, Any]):
    """A profile that was looked up rather than given, so that another model does not inherit it."""


ABILITIES: dict[str, Any] = {
    "text_inputs": True,
    "image_inputs": False,
    "image_url_inputs": False,
    "pdf_inputs": False,
    "audio_inputs": False,
    "video_inputs": False,
    "image_tool_message": False,
    "pdf_tool_message": False,
    "text_outputs": True,
    "image_outputs": False,
    "audio_outputs": False,
    "video_outputs": False,
    "reasoning_output": False,
    "tool_calling": True,
    "tool_choice": True,
    "structured_output": True,
    "mid_conversation_system_messages": False,
    "temperature": True,
}


def context_length(model: str, revision: str | None) -> int | None:
    """Positions of a model, from its config file, where that is on this machine already."""
    file = Path(model) / "config.json"
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, "config.json", revision=revision)
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    config = json.loads(file.read_text("utf-8"))
    lengths = [part.get(key) for part in (config, config.get("text_config", {})) for key in _POSITION_FIELDS]
    return min((length for length in lengths if isinstance(length, int)), default=None)


_POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
