"""What every benchmark shares: paired timing and its statistics, sizes of models, the machine, where results go."""

from __future__ import annotations

import datetime
import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from langchain_aisp import __version__
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.engine.cache import decoder_config
from langchain_aisp.evaluation.metrics import bootstrap_interval, estimate
from langchain_aisp.evaluation.run import environment
from langchain_aisp.noise import fold, request_key, uniform, wave_keys
from langchain_aisp.rewards import as_reward
from langchain_aisp.types import Chat, Grammar, Prompt, Reward, Rollouts, Sampling, Wave

RESULTS = Path(__file__).parent / "results"
MIB = 1024**2

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------------------------
# Work to be timed


def random_prompt(engine: TransformersEngine, length: int, seed: int) -> Prompt:
    """A prompt of arbitrary words: speed does not depend on sense."""
    words = len(engine.tokenizer) - 64
    ids = tuple((32 + uniform(fold(seed, torch.arange(length))) * words).long().tolist())
    return Prompt(({"role": "user", "content": "…"},), ids, request_key(seed, ids))


def plain_wave(prompt: Prompt, rows: int, tokens: int, grammar: Grammar | None = None) -> Wave:
    """Unsteered rows from scratch that all last for ``tokens`` tokens."""
    keys = wave_keys(prompt.key, 0, torch.arange(rows), tokens)
    sampling = Sampling(max_tokens=tokens, min_tokens=tokens, grammar=grammar)
    return Wave(prompt, torch.zeros_like(keys), torch.zeros(rows, dtype=torch.int64), keys, sampling)


def decode(
    engine: TransformersEngine, prompt: Prompt, rows: int, tokens: int, grammar: Grammar | None = None
) -> Rollouts:
    """Decode such rows."""
    rollouts = engine.submit(plain_wave(prompt, rows, tokens, grammar)).future.result()
    assert rollouts.sampled_tokens == rows * tokens
    return rollouts


def generate(engine: TransformersEngine, prompt: Prompt, rows: int, tokens: int) -> None:
    """The same work by transformers' own generate."""
    device = engine.cache.device
    output = engine.model.generate(
        torch.tensor([prompt.ids], device=device),
        attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.int64, device=device),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        num_return_sequences=rows,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    engine.tokenizer.batch_decode(output[:, len(prompt.ids) :], skip_special_tokens=True)
    assert output.shape == (rows, len(prompt.ids) + tokens)


def free_reward() -> Reward:
    """A reward that costs nothing and favours nothing: a checksum of the text."""

    def checksum(chat: Chat, responses: Sequence[str]) -> list[float]:
        return [zlib.crc32(response.encode()) / 2**32 for response in responses]

    return as_reward(checksum, name="checksum")


# ---------------------------------------------------------------------------------------------------------------------
# Timing and statistics


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock time of some work; what a GPU is still busy with is waited for."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def pair(one: Callable[[T], object], other: Callable[[T], object], item: T, swap: bool = False) -> list[float]:
    """Seconds of both, run one right after the other."""
    seconds = [0.0, 0.0]
    for which in (1, 0) if swap else (0, 1):
        seconds[which] = seconds_of(partial((one, other)[which], item))
    return seconds


def compare_pairs(
    name: str, one: Callable[[T], object], other: Callable[[T], object], items: Sequence[T], *, warm_up: T | None = None
) -> dict[str, Any]:
    """Ratio of the seconds of two rivals over all items, whose order alternates; printed and returned."""
    if warm_up is not None:
        pair(one, other, warm_up)
    seconds = [pair(one, other, item, swap=bool(number % 2)) for number, item in enumerate(items)]
    ratio = median_with_interval([a / b for a, b in seconds])
    print(f"{name}: {with_interval(ratio)} over {len(items)} pairs", flush=True)
    return {"ratio": ratio, "seconds": seconds}


def rounds(works: Sequence[Callable[[int], object]], count: int) -> list[list[float]]:
    """Seconds of each work in each of ``count`` rounds, after one round of warm-up; every other round runs backwards.

    Each work is given the number of its run, so that it can do something that it has not done before.
    """
    found = []
    for number in range(count + 1):
        order = range(len(works))
        times = {at: seconds_of(partial(works[at], number)) for at in (order if number % 2 else order[::-1])}
        found.append([times[at] for at in order])
    return found[1:]


def exponent(sizes: Sequence[float], seconds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How cost grows with size: the slope of log seconds over log size, fitted to each round, as its median."""
    return median_with_interval([slope([math.log(s) for s in sizes], [math.log(s) for s in row]) for row in seconds])


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the least-squares line."""
    across, up = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    across = across - across.mean()
    return float((across * (up - up.mean())).sum() / across.square().sum())


def median_with_interval(values: Sequence[float]) -> dict[str, Any]:
    """Median, its 95 % interval and the number of values."""
    low, high = bootstrap_interval(values, statistic="median")
    return {"median": float(torch.tensor(values).median()), "low": low, "high": high, "pairs": len(values)}


def with_interval(found: dict[str, Any]) -> str:
    """A median with its interval as people read it."""
    return f"{found['median']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def mean_with_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean, its standard error, its 95 % interval and the number of values."""
    found = estimate(values)
    ends = {"low": found.low, "high": found.high}
    return {"mean": found.mean, "standard_error": found.standard_error, **ends, "pairs": found.count}


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def cache_bytes_per_token(model: Any) -> int:
    """Bytes of the keys and values of one token in all layers."""
    config = decoder_config(model)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_layer: int = 2 * config.num_key_value_heads * width * model.dtype.itemsize
    return per_layer * config.num_hidden_layers


def cache_bytes(model: Any, rows: int, prompt: int, tokens: int) -> int:
    """Bytes of the keys and values of a prompt and of ``tokens`` tokens for each of the rows that share it."""
    return cache_bytes_per_token(model) * (prompt + rows * tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Results


def save(name: str, result: dict[str, Any]) -> None:
    """Write the result to ``results/DATE-name.json`` and print it as the last line."""
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    said = {"benchmark": name, "date": date, "command": _command(), "langchain_aisp": __version__}
    record = {**said, **environment(), **result}
    path = RESULTS / f"{date}-{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


def _command() -> str:
    """How the benchmark was called, folders by their names: where they lie on this machine is nobody's concern."""
    words = [Path(word).name if Path(word).is_dir() else word for word in sys.argv[1:]]
    return " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])
