"""Would it pay to verify an earlier response's tokens in blocks? How often they come again, and what a block saves.

Why: a child of the default search differs from its parent at the cut and draws anew after it. Where it then draws what
an earlier response with the same beginning said, one forward pass over several of that one's tokens could have
confirmed them at once. Two things bound the gain: the share of new tokens that repeat such a response before the first
difference, whichever repeats most, and what a pass over b tokens per row costs beside b steps, which is what a step of
b times as many rows costs. The product is more than any such scheme can save, since it knows beforehand which response
to follow and where the child will differ, and verifies nothing in vain.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

import torch

from benchmarks.common import decode, median_with_interval, random_prompt, rounds, save, with_interval
from benchmarks.concurrency import requests_of
from langchain_aisp.align import Budget, Score, Search, search
from langchain_aisp.demo import REWARD_MODEL_PATH
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.methods import AISP
from langchain_aisp.rewards import ClassifierReward
from langchain_aisp.types import Problem, Reward, Sampling, Wave

BLOCKS = (2, 4, 8)


def repeated(cut: int, child: Sequence[int], earlier: Iterable[Sequence[int]]) -> int:
    """How many of a child's tokens after its cut repeat those of the earlier response that it repeats longest.

    The last token before the cut is where the child was made to differ.
    """
    begins = child[: cut - 1]
    rivals = (other[cut:] for other in earlier if other[: cut - 1] == begins)
    equal = (takewhile(lambda pair: pair[0] == pair[1], zip(child[cut:], other, strict=False)) for other in rivals)
    return max((sum(1 for _ in pairs) for pairs in equal), default=0)


def count(steps: Search, engine: TransformersEngine, reward: Reward) -> tuple[int, int]:
    """The same over all branching waves of a search."""
    found, new = 0, 0
    known: list[list[int]] = []
    answer: Any = None
    while True:
        try:
            wish = steps.send(answer)
        except StopIteration:
            return found, new
        answer = None
        if isinstance(wish, Score):
            answer = reward.submit(wish.pairs).future.result()
        elif isinstance(wish, Wave):
            answer = engine.submit(wish).future.result()
            said = [row[:n] for row, n in zip(answer.tokens.tolist(), answer.lengths.tolist(), strict=True)]
            for cut, row in zip(wish.cut.tolist(), said, strict=True):
                if cut > 0:
                    found, new = found + repeated(cut, row, known), new + len(row) - cut
            known += said


def shares(engine: TransformersEngine, temperature: float, args: argparse.Namespace) -> dict[str, Any]:
    """The share of repeated tokens, over some requests."""
    reward = ClassifierReward.from_pretrained(REWARD_MODEL_PATH)
    method, sampling = AISP(args.samples), Sampling(max_tokens=args.tokens, temperature=temperature)
    counts = []
    for seed, chat in requests_of(args.requests, seed=5):
        problem = Problem(engine.encode(chat, seed=seed), sampling, engine.head)
        counts.append(count(search(method, problem, Budget(), whole=True), engine, reward))
    found, new = (sum(each) for each in zip(*counts, strict=True))
    print(
        f"temperature {temperature:g}: {found} of {new} new tokens repeat an earlier response's, {found / new:.3f}",
        flush=True,
    )
    return {"temperature": temperature, "repeated": found, "new": new, "share": found / new}


def main() -> None:
    """Measure shares and blocks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.3, 1.0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--rows", type=int, default=32, help="of one wave")
    parser.add_argument("--tokens", type=int, default=80, help="longest response")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with TransformersEngine.from_pretrained("demo", device="cpu") as engine:
        found = [shares(engine, temperature, args) for temperature in args.temperatures]
        works = [
            lambda number, rows=args.rows * block: decode(engine, random_prompt(engine, 64, 9_000 + number), rows, 16)
            for block in (1, *BLOCKS)
        ]
        seconds = rounds(works, args.rounds)
    blocks = {
        block: median_with_interval([row[place] / (block * row[0]) for row in seconds])
        for place, block in enumerate(BLOCKS, start=1)
    }
    best = min(blocks, key=lambda block: blocks[block]["median"])
    for block, cost in blocks.items():
        print(f"a pass over {block} tokens of {args.rows} rows costs {with_interval(cost)} of {block} steps")
    for each in found:
        each["saved_at_most"] = each["share"] * max(0.0, 1 - blocks[best]["median"])
        print(f"temperature {each['temperature']:g}: at most {each['saved_at_most']:.1%} of decoding could be saved")
    save("drafts", {"rows": args.rows, "shares": found, "blocks": blocks})


if __name__ == "__main__":
    main()
