"""What a request gains when rows are scored as soon as they end, for a reward that waits for somebody else.

Why: a judge behind a network takes its time, and the rows of a wave do not end together. The reward here stands for
such a judge: each response takes so many seconds, so many at a time, and no work of this machine. Both rivals are the
same search with the same reward, scored ahead or not, and must find the same answer.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import compare_pairs, mean_with_interval, save
from benchmarks.concurrency import Request, requests_of
from langchain_aisp.align import Aligned, align
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.methods import AISP
from langchain_aisp.rewards import as_reward
from langchain_aisp.types import Chat, Reward, Sampling


def judge(seconds: float, at_once: int, *, ahead: bool) -> Reward:
    """A reward that keeps everybody waiting: it counts unlike letters."""
    line: list[asyncio.Semaphore] = []  # made on the loop that it is for

    async def one(text: str) -> float:
        async with line[0]:
            await asyncio.sleep(seconds)
        return float(len(set(text)))

    async def unlike_letters(chat: Chat, texts: Sequence[str]) -> list[float]:
        if not line:
            line.append(asyncio.Semaphore(at_once))
        return list(await asyncio.gather(*map(one, texts)))

    return as_reward(unlike_letters, waits=ahead)


class Searches:
    """A search under one of the two rewards; remembers what it found."""

    def __init__(self, engine: TransformersEngine, reward: Reward, args: argparse.Namespace) -> None:
        """Sizes are those of the command line."""
        self.engine, self.reward = engine, reward
        self.method = AISP(args.rows * args.waves, args.waves)
        self.sampling = Sampling(max_tokens=args.tokens)
        self.found: list[Aligned] = []

    def __call__(self, request: Request) -> None:
        """Answer a request."""
        seed, chat = request
        self.found.append(align(self.engine, self.reward, self.method, chat, sampling=self.sampling, seed=seed))

    def waited(self) -> dict[str, Any]:
        """Seconds per request in which nothing but the reward was under way."""
        return mean_with_interval([each.reward_seconds for each in self.found[1:]])


def measure(engines: Sequence[TransformersEngine], at_once: int, args: argparse.Namespace) -> dict[str, Any]:
    """Both rivals on the same requests."""
    ahead, after = (
        Searches(engine, judge(args.seconds, at_once, ahead=first), args)
        for engine, first in zip(engines, (True, False), strict=True)
    )
    requests = requests_of(args.pairs + 1, seed=7)
    name = f"{at_once} judgements of {args.seconds:g} s at a time: scored ahead / after each wave"
    result = compare_pairs(name, ahead, after, requests[1:], warm_up=requests[0])
    for one, other in zip(ahead.found, after.found, strict=True):
        assert [(each.tokens, each.reward) for each in one.candidates] == [
            (each.tokens, each.reward) for each in other.candidates
        ], "scoring ahead has changed an answer"
    return {"at_once": at_once, **result, "waiting_for_reward": {"ahead": ahead.waited(), "after": after.waited()}}


def main() -> None:
    """Measure judges of several widths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="id or folder of a model")
    parser.add_argument("--rows", type=int, default=32, help="of one wave")
    parser.add_argument("--waves", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=80, help="longest response")
    parser.add_argument("--seconds", type=float, default=0.2, help="that a judgement takes")
    parser.add_argument("--at-once", type=int, nargs="+", default=[8, 32], help="judgements at a time")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = TransformersEngine.from_pretrained
    with load(args.model, device="cpu") as one, load(args.model, device="cpu") as other:
        found = [measure((one, other), at_once, args) for at_once in args.at_once]
    save("overlap", {"model": Path(args.model).name, "rows": args.rows, "waves": args.waves, "judges": found})


if __name__ == "__main__":
    main()
