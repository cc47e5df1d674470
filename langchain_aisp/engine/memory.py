"""How much memory is left, and what a row that decodes will take of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from langchain_aisp.types import Head, Observable, Wave

ALTERNATIVES = 32  # likeliest tokens kept per position when a wave observes "alternatives"

_LOGIT_BYTES = 48  # per logit of a row while a token is drawn: a dozen float32 copies, half of them only under top-p
_SCORE_BYTES = 12  # per head and token that a row attends to, in one layer: scores, their concatenation, weights
_MEMINFO = Path("/proc/meminfo")
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be had on a device, None where that cannot be found out."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own reserve
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    bounds = [bound for bound in (_machine(), _container()) if bound is not None]
    return min(bounds, default=None)


def working_bytes(wave: Wave, head: Head, heads: int, tokens: int) -> int:
    """Bytes that a row takes at most beside its keys: logits, scores of attention and what is observed.

    Args:
        wave: What is decoded.
        head: Width and vocabulary.
        heads: Query heads of a layer.
        tokens: Prompt and response.
    """
    compared = bool(wave.observe) or wave.kl_budget is not None
    both = compared and wave.steering is not None  # unsteered logits beside the steered ones
    per_position: Mapping[Observable, int] = {
        "base_logprobs": 4,
        "alternatives": (4 + 4) * ALTERNATIVES,
        "unchecked_alternatives": (4 + 4) * ALTERNATIVES,
        "scores": 4 * head.width,
        "prelogits": 4 * head.width,
    }
    observed = wave.prefix.shape[1] * sum(per_position[name] for name in wave.observe)
    return _LOGIT_BYTES * head.vocabulary * (1 + both) + _SCORE_BYTES * heads * tokens + observed


def _machine() -> int | None:
    """What the machine has left; only Linux tells."""
    lines = (line.split() for line in _MEMINFO.read_text().splitlines()) if _MEMINFO.exists() else ()
    return next((1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:"), None)


def _container() -> int | None:
    """What the container may still take; files that were read and could be dropped do not count as taken."""
    limit, current, stat = (_CONTROL_GROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if not limit.exists() or not limit.read_text().strip().isdigit():
        return None
    droppable = next((int(line.split()[1]) for line in stat.read_text().splitlines() if "inactive_file" in line), 0)
    return int(limit.read_text()) - int(current.read_text()) + droppable
