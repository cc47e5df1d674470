"""What callers at once gain over the same requests one after the other, and that nobody's answer changes.

Why: a service has many callers, each with few rows. A step costs little more for many rows than for few, so an engine
that decodes the rows of all callers as one batch serves them faster than a queue would. A request is the default search
in two waves, plain rows and then branches with prefixes of every length, under a free reward. Each rival has an engine
of its own, so neither finds prompts that the other has read, and both must give the same answers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import compare_pairs, free_reward, save
from langchain_aisp.align import Candidate, align
from langchain_aisp.demo import scenarios
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.methods import AISP
from langchain_aisp.types import Chat, Sampling

WAVES = 2

Request = tuple[int, Chat]
"""A seed and a conversation."""


class Callers:
    """Callers who each want one answer of a search with ``rows`` rows per wave; remembers the answers."""

    def __init__(self, engine: TransformersEngine, rows: int, tokens: int) -> None:
        """Every row lasts for ``tokens`` tokens unless the model ends it before."""
        self.engine = engine
        self.method = AISP(samples=WAVES * rows, iterations=WAVES, overlap=1)  # so many rows at once, no more
        self.sampling = Sampling(max_tokens=tokens)
        self.reward = free_reward()
        self.answers: list[list[tuple[Candidate, ...]]] = []

    def ask(self, request: Request) -> tuple[Candidate, ...]:
        """All candidates, the best first."""
        seed, chat = request
        return align(self.engine, self.reward, self.method, chat, sampling=self.sampling, seed=seed).candidates

    def in_turn(self, requests: Sequence[Request]) -> None:
        """One after the other."""
        self.answers.append([self.ask(request) for request in requests])

    def together(self, requests: Sequence[Request]) -> None:
        """All at once, a thread for each."""
        with ThreadPoolExecutor(len(requests)) as threads:
            self.answers.append(list(threads.map(self.ask, requests)))


def gain(engines: Sequence[TransformersEngine], callers: int, rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """Throughput of callers at once over the same requests in turn, and whether every answer is the same."""
    queue, crowd = (Callers(engine, rows, args.tokens) for engine in engines)
    requests = requests_of(callers * (args.pairs + 1), seed=100 * rows + callers)
    groups = [requests[first : first + callers] for first in range(0, len(requests), callers)]
    name = f"{rows} rows per wave, {callers} callers: throughput at once / in turn"
    result = compare_pairs(name, queue.in_turn, crowd.together, groups[1:], warm_up=groups[0])
    same = queue.answers == crowd.answers
    assert same, f"{callers} callers with {rows} rows each got other answers at once than in turn"
    return {"rows": rows, "callers": callers, "answers_identical": same, **result}


def requests_of(count: int, seed: int) -> list[Request]:
    """Conversations of the demo that no other call with another seed asks for."""
    return [(number, one.messages) for number, one in enumerate(scenarios("test", count, seed=seed))]


def main() -> None:
    """Measure every number of rows and callers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="id or folder of a model")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16, 32], help="of one wave")
    parser.add_argument("--tokens", type=int, default=32, help="longest response")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = TransformersEngine.from_pretrained
    with load(args.model, device="cpu") as one, load(args.model, device="cpu") as other:
        gains = [gain((one, other), callers, rows, args) for rows in args.rows for callers in args.callers]
    save("concurrency", {"model": Path(args.model).name, "max_tokens": args.tokens, "waves": WAVES, "gains": gains})


if __name__ == "__main__":
    main()
