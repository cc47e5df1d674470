"""When gold turns while the reward still rises, and what prevents it: ensembles' lower bounds, floors of likelihood.

Why: a search finds the mistakes of its reward, the more surely the better it searches. A reward with few data behind it
has many, so here closeness to a person's reply is told by embeddings of few dialogues each: one of them alone, the mean
of several, their lower bound, and the one alone under floors of likelihood. Gold is ROUGE-L with that reply, which none
of them sees. The best answer so far is judged after every iteration, so a curve shows where gold turns.

All arms answer the same prompts with the same seed, the default search at the same number of samples; Best-of-N stands
beside it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import mean_with_interval, save
from benchmarks.pairs import (
    PAIRS,
    TENTHS,
    LatentSemantics,
    Opened,
    add_sources,
    open_pair,
    replies,
    replies_of,
    sgd_dialogues,
    sources_of,
)
from langchain_aisp import AISP, BestOfN, Budget
from langchain_aisp.align import Aligned, Iteration, iterate
from langchain_aisp.rewards import EmbeddingReward, EnsembleReward, WeightedSum, as_reward
from langchain_aisp.types import Method, Reward, Sampling

MEMBERS, DIALOGUES, RANK = 4, 40, 32
FLOORS = (-20.0, -40.0)
TEMPERATURE = 0.85


@dataclass(frozen=True)
class Arm:
    """A search for a reward within a limit.

    Attributes:
        name: For tables.
        method: The search.
        reward: What it looks for.
        floor: Least log-probability of an answer, in nats.
    """

    name: str
    method: Method[Any]
    reward: Reward
    floor: float | None = None


def members(opened: Opened, dialogues: Sequence[Any]) -> list[Reward]:
    """Rewards of unfinished texts, each of embeddings fitted on a few dialogues of its own."""
    found = []
    for number in range(MEMBERS):
        few = dialogues[number * DIALOGUES : (number + 1) * DIALOGUES]
        embeddings = LatentSemantics.fit(list(replies(few)), rank=RANK, least=1)
        name = f"latent semantics {number}"
        reward = EmbeddingReward(embeddings, replies_of(opened.prompts), name=name, fingerprint=name)
        found.append(as_reward(WeightedSum([(reward, TENTHS)]), partial=True))
    return found


def arms(rewards: Sequence[Reward], samples: int) -> list[Arm]:
    """What is compared: the first reward alone, all together, and the first one within limits."""
    alone, search = rewards[0], AISP(samples)
    return [
        Arm("best of n", BestOfN(samples, samples_per_wave=32), alone),
        Arm("one", search, alone),
        Arm("mean", search, EnsembleReward(rewards)),
        Arm("lower bound", search, EnsembleReward(rewards, "lower_bound")),
        *(Arm(f"one, floor {floor:g}", search, alone, floor) for floor in FLOORS),
    ]


def measure(opened: Opened, arm: Arm, max_tokens: int) -> dict[str, Any]:
    """An arm's answers to all prompts: reward and gold as the search goes on, and log-probability at its end."""
    sampling, curves = Sampling(max_tokens=max_tokens, temperature=TEMPERATURE), []
    ends: list[float] = []
    for seed, prompt in enumerate(opened.prompts):
        floor = -math.inf if arm.floor is None else arm.floor
        budget = Budget(min_base_logprob=floor)  # one that bounds nothing still tells how likely the answer is
        steps = list(
            iterate(opened.engine, arm.reward, arm.method, prompt.messages, sampling=sampling, seed=seed, budget=budget)
        )
        trace = [step for step in steps if isinstance(step, Iteration)]
        said = [(prompt.messages, now.response) for now in trace]
        golds = opened.gold.submit(said).future.result().tolist()
        curves.append([(now.samples, now.best, gold) for now, gold in zip(trace, golds, strict=True)])
        [aligned] = [step for step in steps if isinstance(step, Aligned)]
        assert aligned.best.base_logprob is not None
        ends.append(aligned.best.base_logprob)
        print(f"\r{arm.name}: {len(curves)} of {len(opened.prompts)}   ", end="", flush=True)
    print()
    points = [
        {
            "samples": sum(samples for samples, _, _ in at) / len(at),
            "reward": sum(reward for _, reward, _ in at) / len(at),
            "gold": mean_with_interval([gold for _, _, gold in at]),
        }
        for at in zip(*curves, strict=False)
    ]
    return {
        "arm": arm.name,
        "reward": mean_with_interval([curve[-1][1] for curve in curves]),
        "gold": mean_with_interval([curve[-1][2] for curve in curves]),
        "gold_by_prompt": [round(curve[-1][2], 3) for curve in curves],
        "base_logprob": mean_with_interval(ends),
        "curve": points,
    }


def show(found: Sequence[Mapping[str, Any]]) -> None:
    """The arms as a table for people."""
    print(f"{'arm':20} {'reward':>8} {'gold':>6} {'best gold':>10} {'at samples':>11} {'log p':>7}")
    for each in found:
        best = max(each["curve"], key=lambda point: point["gold"]["mean"])
        print(
            f"{each['arm']:20} {each['reward']['mean']:8.3f} {each['gold']['mean']:6.2f} {best['gold']['mean']:10.2f} "
            f"{best['samples']:11.0f} {each['base_logprob']['mean']:7.1f}"
        )


def main() -> None:
    """Measure all arms and save the numbers; `benchmarks.plots` draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sources = sources_of(args)
    opened = open_pair("similarity", sources, args.split, args.prompts)
    rewards = members(opened, sgd_dialogues(sources, "train"))
    found = [measure(opened, arm, PAIRS["similarity"].max_tokens) for arm in arms(rewards, args.samples)]
    show(found)
    settings = {name: getattr(args, name) for name in ("samples", "prompts", "split")}
    save("overoptimisation", {**settings, "members": MEMBERS, "dialogues": DIALOGUES, "rank": RANK, "arms": found})


if __name__ == "__main__":
    main()
