"""How near decoding on a GPU comes to the time that reading its memory takes, on a model of Llama-3-8B's shape.

Why: a step cannot be faster than reading all weights, and the keys and values of the prompt and of each row, once; with
few rows nothing else counts. The copy bandwidth and the rate of matrix products are measured first, on the machine
at hand, and the floor of a step follows from them. Weights are random and made on the device: speed does not depend on
sense, and nothing is downloaded.

A step's seconds are those of a whole wave less those of a wave of one token, divided by the steps between. Beside the
engine stands plain ``generate``; then six prompts at once against one, peak memory above weights, keys and values, and
what was compiled after the warm-up, which should be nothing. ``--shape tiny`` runs on a CPU and shows that it works.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.common import (
    MIB,
    cache_bytes,
    decode,
    generate,
    median_with_interval,
    plain_wave,
    random_prompt,
    rounds,
    save,
    weight_bytes,
    with_interval,
)
from benchmarks.grammar import made_up_tokenizer
from langchain_aisp.engine import TransformersEngine

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
}
CROWD = 6  # prompts at once
REPEATS = 9
NOT_AVAILABLE = "not available"


def build(shape: str, device: torch.device) -> PreTrainedModel:
    """A random-weight Llama, made where it runs: bfloat16 on a GPU, float32 on a CPU."""
    config = LlamaConfig(**SHAPES[shape], eos_token_id=0, bos_token_id=None, dtype=precision(device))
    default = torch.get_default_dtype()
    torch.set_default_dtype(precision(device))
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def precision(device: torch.device) -> torch.dtype:
    """What a model is usually run in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# The floor


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of the fastest of some copies of a buffer that no cache holds."""
    source = torch.empty((2048 if device.type == "cuda" else 64) * MIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = rounds([lambda _: target.copy_(source)], REPEATS)
    return 2 * source.nbytes / min(row[0] for row in seconds)


def product_rate(device: torch.device) -> float:
    """Floating-point operations per second of the fastest of some square matrix products."""
    size = 8192 if device.type == "cuda" else 512
    matrix = torch.randn(size, size, device=device, dtype=precision(device))
    seconds = rounds([lambda _: matrix @ matrix], REPEATS)
    return float(2 * size**3 / min(row[0] for row in seconds))


def floor(model: PreTrainedModel, rows: int, prompt: int, tokens: int, bandwidth: float, rate: float) -> dict[str, Any]:
    """The least seconds of a step halfway through the response, by memory and by products; the larger one binds.

    Of the embedding only the rows' own tokens are read. The prompt's keys count once, for all rows; ``per_row`` is the
    floor of an engine that reads them once per row.
    """
    weights = weight_bytes(model) - model.get_input_embeddings().weight.nbytes
    shared = cache_bytes(model, rows, prompt, tokens // 2)
    copied = cache_bytes(model, rows, 0, prompt + tokens // 2)
    products = 2 * rows * weights / model.dtype.itemsize / rate
    return {
        "weight_bytes": weights,
        "cache_bytes": shared,
        "by_memory": (weights + shared) / bandwidth,
        "by_memory_per_row": (weights + copied) / bandwidth,
        "by_products": products,
        "seconds": max((weights + shared) / bandwidth, products),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Ours and generate


def modes(device: torch.device) -> dict[str, dict[str, Any] | None]:
    """Options of an engine with and without CUDA graphs; None where there are none to be had."""
    known = "cuda_graphs" in inspect.signature(TransformersEngine).parameters
    if device.type != "cuda" or not known:
        return {"eager": {}, "graphs": None}
    return {"eager": {"cuda_graphs": False}, "graphs": {"cuda_graphs": True}}


def compilations() -> int:
    """Graphs that torch has compiled so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@contextmanager
def counting_recordings() -> Iterator[list[None]]:
    """One entry for each CUDA graph that is recorded in the scope."""
    recorded: list[None] = []
    begin = torch.cuda.CUDAGraph.capture_begin

    def count(*arguments: Any, **options: Any) -> None:
        recorded.append(None)
        begin(*arguments, **options)

    torch.cuda.CUDAGraph.capture_begin = count  # type: ignore[method-assign]
    try:
        yield recorded
    finally:
        torch.cuda.CUDAGraph.capture_begin = begin  # type: ignore[method-assign]


class Bench:
    """An engine with fresh prompts of one length."""

    def __init__(self, engine: TransformersEngine, prompt: int, tokens: int) -> None:
        """Rows last for ``tokens`` tokens."""
        self.engine, self.prompt, self.tokens = engine, prompt, tokens
        self.made = 0

    def next_prompt(self) -> Any:
        """A prompt that nobody has read."""
        self.made += 1
        return random_prompt(self.engine, self.prompt, self.made)

    def ours(self, rows: int, tokens: int, _: int = 0) -> None:
        """Decode one wave."""
        decode(self.engine, self.next_prompt(), rows, tokens)

    def theirs(self, rows: int, tokens: int, _: int = 0) -> None:
        """The same work by ``generate``."""
        generate(self.engine, self.next_prompt(), rows, tokens)

    def crowd(self, prompts: int, rows: int, _: int = 0) -> None:
        """Decode the waves of several prompts at once."""
        waves = [plain_wave(self.next_prompt(), rows, self.tokens) for _ in range(prompts)]
        for ticket in [self.engine.submit(wave) for wave in waves]:
            assert ticket.future.result().sampled_tokens == rows * self.tokens

    def steps(self, work: Any, rows: int, count: int, least: float) -> dict[str, Any]:
        """Seconds of a wave and of a step, and which part of a step its floor ``least`` is."""
        seconds = rounds([partial(work, rows, self.tokens), partial(work, rows, 1)], count)
        step = [(whole - first) / (self.tokens - 1) for whole, first in seconds]
        return {
            "wave_seconds": median_with_interval([whole for whole, _ in seconds]),
            "first_token_seconds": median_with_interval([first for _, first in seconds]),
            "step_seconds": median_with_interval(step),
            "share_of_floor": median_with_interval([least / each for each in step]),
            "tokens_per_second": median_with_interval([rows * self.tokens / whole for whole, _ in seconds]),
        }

    def memory(self, rows: int) -> dict[str, Any] | str:
        """Peak bytes of one wave, in all and above weights, keys and values."""
        if self.engine.cache.device.type != "cuda":
            return NOT_AVAILABLE
        torch.cuda.reset_peak_memory_stats()
        self.ours(rows, self.tokens)
        peak = torch.cuda.max_memory_allocated()
        model = self.engine.model
        needed = weight_bytes(model) + cache_bytes(model, rows, self.prompt, self.tokens)
        return {"peak": peak, "above": peak - needed}


def measure(
    engine: TransformersEngine, floors: dict[int, Any], args: argparse.Namespace, beside: bool
) -> dict[str, Any]:
    """Everything about one engine, by rows; with ``beside``, generate too."""
    bench = Bench(engine, args.prompt, args.tokens)
    for rows in args.rows:
        bench.ours(rows, args.tokens)  # warm-up of all shapes
    bench.crowd(CROWD, args.crowd_rows)
    compiled = compilations()
    with counting_recordings() as recorded:
        by_rows = {rows: at_rows(bench, rows, least["seconds"], args.pairs, beside) for rows, least in floors.items()}
        crowd = at_once(bench, args.crowd_rows, args.pairs)
    return {
        "by_rows": by_rows,
        "crowd": crowd,
        "compilations_after_warm_up": compilations() - compiled,
        "graphs_recorded_after_warm_up": len(recorded),
    }


def at_rows(bench: Bench, rows: int, least: float, pairs: int, beside: bool) -> dict[str, Any]:
    """Steps and memory of a wave of so many rows."""
    found = {"ours": bench.steps(bench.ours, rows, pairs, least)}
    if beside:
        found["generate"] = bench.steps(bench.theirs, rows, pairs, least)
    shares = {who: with_interval(steps["share_of_floor"]) for who, steps in found.items()}
    print(f"{rows} rows: share of the floor, {shares}", flush=True)
    return {**found, "memory": bench.memory(rows)}


def at_once(bench: Bench, rows: int, pairs: int) -> dict[str, Any]:
    """Throughput of several prompts at once over one alone."""
    seconds = rounds([partial(bench.crowd, 1, rows), partial(bench.crowd, CROWD, rows)], pairs)
    gain = median_with_interval([CROWD * one / many for one, many in seconds])
    print(f"{CROWD} prompts of {rows} rows at once: throughput of one times {with_interval(gain)}", flush=True)
    return {"prompts": CROWD, "rows": rows, "throughput": gain, "seconds": seconds}


def main() -> None:
    """Measure the machine, then the engine with and without graphs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--crowd-rows", type=int, default=32, help="per prompt, when several are decoded at once")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens per row")
    parser.add_argument("--pairs", type=int, default=9)
    args = parser.parse_args()
    if args.shape != "tiny" and not torch.cuda.is_available():
        parser.error(f"--shape {args.shape} needs a GPU that torch can use; --shape tiny runs on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth, rate = copy_bandwidth(device), product_rate(device)
    print(f"copies {bandwidth / 1e12:.2f} TB/s, products {rate / 1e12:.1f} TFLOP/s", flush=True)
    model, tokenizer = build(args.shape, device), made_up_tokenizer(SHAPES[args.shape]["vocab_size"])
    floors = {rows: floor(model, rows, args.prompt, args.tokens, bandwidth, rate) for rows in args.rows}
    results: dict[str, Any] = {}
    for mode, options in modes(device).items():
        if options is None:
            print(f"{mode}: {NOT_AVAILABLE}")
            results[mode] = NOT_AVAILABLE
            continue
        most = max(*args.rows, CROWD * args.crowd_rows)
        with TransformersEngine(model, tokenizer, name=args.shape, max_rows=most, **options) as engine:
            results[mode] = measure(engine, floors, args, beside=mode == "eager")
    save(
        f"gpu-{args.shape}",
        {
            "prompt_tokens": args.prompt,
            "new_tokens": args.tokens,
            "copy_bytes_per_second": bandwidth,
            "product_flops": rate,
            "floors": floors,
            "modes": results,
        },
    )


if __name__ == "__main__":
    main()
