"""Which number of threads, precision and products decode fastest on this processor, for few, some and many rows.

Why: torch has one number of threads per process, which rewards share, so the engine leaves it alone, and small models
gain from few. bfloat16 is for processors that multiply it; on others it is slow. Weights that are laid out once
(`engine.packed`) are a copy, which has to pay, and so has a decoder of our own (`engine.fused`) beside the model's
modules. Every setting has an engine of its own, and they take turns.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import decode, median_with_interval, random_prompt, rounds, save, with_interval
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.engine.packed import PackedProducts
from langchain_aisp.engine.slots import SlotCache

PROMPT = 64


def wave(engine: TransformersEngine, threads: int, rows: int, tokens: int, number: int) -> None:
    """One wave on a prompt that nobody has read; the number of threads is that of the engine's when it begins."""
    torch.set_num_threads(threads)
    decode(engine, random_prompt(engine, PROMPT, 1_000 * rows + number), rows, tokens)


Setting = tuple[int, str]
"""Threads and what multiplies."""

WAYS = ("float32", "float32, by modules", "float32, by modules, not packed", "bfloat16")


def load(model: str, products: str) -> TransformersEngine:
    """An engine that multiplies in this way."""
    dtype, *without = products.split(", ")
    engine = TransformersEngine.from_pretrained(model, device="cpu", dtype=dtype)
    if without and isinstance(engine.cache, SlotCache):
        engine.cache.decoder = None
        engine.packed = PackedProducts(engine.model)
    if "not packed" in without:
        engine.packed.products = []
    return engine


def compare(engines: dict[Setting, TransformersEngine], rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each setting as shares of the first one's."""
    works = [partial(wave, engine, threads, rows, args.tokens) for (threads, _), engine in engines.items()]
    seconds = rounds(works, args.rounds)
    found = {}
    for place, (threads, products) in enumerate(engines):
        name = f"{threads} threads, {products}"
        found[name] = median_with_interval([row[place] / row[0] for row in seconds])
        print(f"{rows} rows, {name}: {with_interval(found[name])} of the first one's seconds", flush=True)
    return {"rows": rows, "seconds": seconds, "ratios": found}


def main() -> None:
    """Measure all settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="id or folder of a model")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 32, 128], help="of one wave")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens per row")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    settings = [(threads, products) for threads in dict.fromkeys(args.threads) for products in WAYS]
    engines = {(threads, products): load(args.model, products) for threads, products in settings}
    try:
        found = [compare(engines, rows, args) for rows in args.rows]
    finally:
        for engine in engines.values():
            engine.close()
    save("arithmetic", {"model": Path(args.model).name, "threads_compared": args.threads, "waves": found})


if __name__ == "__main__":
    main()
