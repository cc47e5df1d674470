"""How the cost of a request grows with each of its sizes, and that its prompt is read once, not once per row.

Why: a search multiplies everything by its samples, so what must not be multiplied has to be known. Each size is doubled
while the others stay; the exponent is the slope of log seconds over log size, fitted in each round, with the interval
of its median over the rounds. Vocabularies are those of random-weight Llamas of the demo model's shape.

The prompt is shown in two ways. What the model's embedding is given is counted: beside one token per row and step, the
count must not depend on the number of rows. And the seconds that a long prompt costs more than a short one, for a
single new token, are compared between few rows and many; ``generate``, which reads the prompt once per row, beside it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    decode,
    exponent,
    free_reward,
    generate,
    median_with_interval,
    random_prompt,
    rounds,
    save,
    with_interval,
)
from benchmarks.grammar import random_llama
from langchain_aisp.align import align
from langchain_aisp.demo import scenarios
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.methods import BestOfN, PublishedAISP
from langchain_aisp.types import Method, Prompt, Sampling

FEW, MANY = 4, 32  # rows

_numbers = itertools.count()  # every prompt is a new one, or the engine would remember it


def fresh_prompt(engine: TransformersEngine, length: int) -> Prompt:
    """A prompt that nobody has read."""
    return random_prompt(engine, length, 1_000 + next(_numbers))


def rows_work(engine: TransformersEngine, rows: int, prompt: int, tokens: int) -> Callable[[int], object]:
    """One wave."""
    return lambda _: decode(engine, fresh_prompt(engine, prompt), rows, tokens)


def search_work(engine: TransformersEngine, method: Method[Any], tokens: int) -> Callable[[int], object]:
    """A whole search whose responses all have so many tokens."""
    sampling = Sampling(max_tokens=tokens, min_tokens=tokens)
    reward = free_reward()
    chats = [one.messages for one in scenarios("test", 64, seed=4)]
    return lambda number: align(engine, reward, method, chats[number % 64], sampling=sampling, seed=number)


def growth(name: str, sizes: list[int], works: list[Callable[[int], object]], count: int) -> dict[str, Any]:
    """The exponent of one size, printed and returned with the seconds of every round."""
    seconds = rounds(works, count)
    found = exponent(sizes, seconds)
    print(f"seconds grow with the {name} to the power {with_interval(found)}", flush=True)
    return {"sizes": sizes, "exponent": found, "seconds": seconds}


def vocabularies(sizes: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """The exponent of the vocabulary."""
    engines = [random_llama(size) for size in sizes]
    try:
        works = [rows_work(engine, args.fixed_rows, args.fixed_prompt, args.fixed_tokens) for engine in engines]
        return growth("vocabulary", sizes, works, args.rounds)
    finally:
        for engine in engines:
            engine.close()


# ---------------------------------------------------------------------------------------------------------------------
# The prompt


@contextmanager
def counting_tokens(engine: TransformersEngine) -> Iterator[list[int]]:
    """Numbers of tokens that the model's embedding is given, call by call."""
    found: list[int] = []
    handle = engine.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, given: found.append(given[0].numel())
    )
    try:
        yield found
    finally:
        handle.remove()


def tokens_read(engine: TransformersEngine, rows: int, prompt: int, tokens: int, *, plain: bool = False) -> int:
    """Tokens that the model reads for some rows, beside the one per row and step that decoding is.

    Args:
        engine: Decodes.
        rows: How many rows.
        prompt: Length of the prompt.
        tokens: New tokens per row.
        plain: Let ``generate`` do it.
    """
    given = fresh_prompt(engine, prompt)
    with counting_tokens(engine) as counted:
        (generate if plain else decode)(engine, given, rows, tokens)
    return sum(counted) - rows * tokens


def prompt_once(engine: TransformersEngine, short: int, long: int, count: int) -> dict[str, Any]:
    """Whether the prompt is read once: by tokens, which must agree, and by seconds."""
    read = {rows: tokens_read(engine, rows, long, 2) for rows in (FEW, MANY)}
    assert read[FEW] == read[MANY] < 2 * long, f"a prompt of {long} tokens is read as {read} tokens, by rows"
    plain = {rows: tokens_read(engine, rows, long, 2, plain=True) for rows in (FEW, MANY)}
    print(f"a prompt of {long} tokens: {read} tokens read by rows, by generate {plain}", flush=True)
    cells = [(rows, length) for rows in (FEW, MANY) for length in (short, long)]
    ours = rounds([rows_work(engine, rows, length, 1) for rows, length in cells], count)
    theirs = rounds(
        [
            lambda _, rows=rows, length=length: generate(engine, fresh_prompt(engine, length), rows, 1)
            for rows, length in cells
        ],
        count,
    )
    added = {name: added_by_prompt(seconds) for name, seconds in (("ours", ours), ("generate", theirs))}
    for name, found in added.items():
        print(
            f"{name}: what the long prompt adds, {MANY} rows / {FEW} rows: {with_interval(found['ratio'])}", flush=True
        )
    return {
        "prompt_tokens": [short, long],
        "rows": [FEW, MANY],
        "tokens_read": read,
        "tokens_read_by_generate": plain,
        "seconds_added_by_the_long_prompt": added,
    }


def added_by_prompt(seconds: list[list[float]]) -> dict[str, Any]:
    """From rounds of (few rows, short), (few, long), (many, short), (many, long): what long costs more than short."""
    added = [(row[1] - row[0], row[3] - row[2]) for row in seconds]
    return {
        "few": median_with_interval([few for few, _ in added]),
        "many": median_with_interval([many for _, many in added]),
        "ratio": median_with_interval([many / few for few, many in added]),
    }


def main() -> None:
    """Measure every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="id or folder of a model")
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128], help="samples at once")
    parser.add_argument(
        "--iterations", type=int, nargs="+", default=[1, 2, 4, 8], help="of a search, and waves of plain samples"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 32, 64, 128], help="new tokens per row")
    parser.add_argument("--prompts", type=int, nargs="+", default=[65, 129, 257, 513], help="tokens")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 16_384, 65_536])
    parser.add_argument("--fixed-rows", type=int, default=16, help="while another size changes")
    parser.add_argument("--fixed-tokens", type=int, default=16)
    parser.add_argument("--fixed-prompt", type=int, default=65)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, tokens, prompt = args.fixed_rows, args.fixed_tokens, args.fixed_prompt
    with TransformersEngine.from_pretrained(args.model, device="cpu") as engine:
        waves = {n: BestOfN(n * rows, samples_per_wave=rows) for n in args.iterations}
        searches = {n: PublishedAISP(samples_per_iteration=rows, iterations=n) for n in args.iterations}
        works = {
            f"samples, {rows} at once": (
                [method.samples for method in waves.values()],
                [search_work(engine, method, tokens) for method in waves.values()],
            ),
            "samples, all at once": (args.rows, [rows_work(engine, n, prompt, tokens) for n in args.rows]),
            "iterations": (args.iterations, [search_work(engine, method, tokens) for method in searches.values()]),
            "tokens": (args.tokens, [rows_work(engine, rows, prompt, n) for n in args.tokens]),
            "prompt": (args.prompts, [rows_work(engine, rows, n, tokens) for n in args.prompts]),
        }
        grown = {name: growth(name, sizes, each, args.rounds) for name, (sizes, each) in works.items()}
        once = prompt_once(engine, args.prompts[0], args.prompts[-1], args.rounds)
    grown["vocabulary"] = vocabularies(args.vocabularies, args)
    sizes = {"model": Path(args.model).name, "fixed": [rows, tokens, prompt]}
    save("scaling", {**sizes, "growth": grown, "prompt_once": once})


if __name__ == "__main__":
    main()
