"""Reward and gold reward at equal numbers of samples, on the demo pair: the default AISP against Best-of-N.

Why: a search is worth its name only if it beats plain sampling at equal cost, on prompts that nothing was chosen on,
and by a measure that nobody optimised. Temperatures are chosen on dev prompts at the full budget: Best-of-N gets the
one of the highest reward, the default AISP the lowest that is within a standard error of its highest, because what is
nearer to the model fools the reward less. AISP also runs at 1.0, as a user gets it. Every method answers the same test
prompts with the same seeds; the gold reward is the demo's exact checker. Runs are kept one by one, so a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, mean_with_interval, save
from langchain_aisp import AISP, BestOfN, ClassifierReward, align
from langchain_aisp.align import Aligned
from langchain_aisp.demo import REWARD_MODEL_PATH, Scenario, gold_reward, scenarios
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.methods import PublishedAISP
from langchain_aisp.types import Method, Sampling

MAX_TOKENS = 80
TEMPERATURES = {  # the highest rewards lie inside
    "best_of_n": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0),
    "aisp": (0.3, 0.4, 0.5, 0.7),
}
WAVE = 32
SEEDS = {"dev": 1, "test": 3}  # of the prompts; test prompts of 1 and 2 were looked at before settings were final


@dataclass(frozen=True)
class Arm:
    """A method on one split of the prompts, and the temperature of its requests."""

    name: str
    split: str
    method: Method[Any]
    temperature: float = 1.0


def best_of_n(samples: int, temperature: float, split: str) -> Arm:
    """Best-of-N at one temperature."""
    return Arm(f"best_of_{samples}@{temperature}", split, BestOfN(samples, samples_per_wave=WAVE), temperature)


def aisp(samples: int, temperature: float, split: str) -> Arm:
    """The default search at one temperature."""
    return Arm(f"aisp@{temperature}", split, AISP(samples=samples, iterations=samples // WAVE), temperature)


def dev_arms(samples: int) -> dict[str, list[Arm]]:
    """What the temperatures are chosen from, by method."""
    makers = {"best_of_n": best_of_n, "aisp": aisp}
    return {name: [make(samples, at, "dev") for at in TEMPERATURES[name]] for name, make in makers.items()}


def test_arms(samples: int, theirs: float, ours: float) -> list[Arm]:
    """What is compared on the test prompts, Best-of-N at the temperature `theirs`.

    The first arm is what all are compared with; the second is the first wave of the third.
    """
    published = PublishedAISP(samples_per_iteration=WAVE, iterations=samples // WAVE)
    return [
        best_of_n(samples, theirs, "test"),
        best_of_n(WAVE, ours, "test"),
        aisp(samples, ours, "test"),
        aisp(samples, 1.0, "test"),
        Arm("published_aisp", "test", published),
    ]


@cache
def _pair() -> tuple[TransformersEngine, ClassifierReward]:
    """The demo's models, once per process, on one thread."""
    torch.set_num_threads(1)
    return TransformersEngine.shared("demo"), ClassifierReward.from_pretrained(str(REWARD_MODEL_PATH))


@cache
def _prompts(split: str, count: int) -> Sequence[Scenario]:
    return scenarios(split, count, seed=SEEDS[split])


def run(task: tuple[Arm, int, int]) -> dict[str, Any]:
    """Answer one prompt by one arm."""
    arm, index, count = task
    engine, reward = _pair()
    scenario = _prompts(arm.split, count)[index]
    sampling = Sampling(max_tokens=MAX_TOKENS, temperature=arm.temperature)
    outcome = align(engine, reward, arm.method, scenario.messages, sampling=sampling, seed=index)
    return {"arm": arm.name, "split": arm.split, "prompt": index, **describe(outcome, scenario)}


def describe(outcome: Aligned, scenario: Scenario) -> dict[str, Any]:
    """What is kept of a run: cost, and reward and gold reward of the best answer after each iteration."""
    gold = gold_reward(scenario)
    curve = {now.samples: [now.best, float(gold(scenario.messages, [now.response.text])[0])] for now in outcome.trace}
    return {
        "text": outcome.best.response.text,
        "reward": outcome.best.reward,
        "curve": curve,
        "samples": outcome.samples,
        "sampled_tokens": outcome.sampled_tokens,
        "reward_calls": outcome.reward_calls,
        "seconds": outcome.seconds,
        "reward_seconds": outcome.reward_seconds,
    }


class Log:
    """Runs that were done, one JSON line each, keyed by what they were."""

    def __init__(self, path: Path) -> None:
        """Read what is there."""
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.runs = {self._key(row): row for row in map(json.loads, lines)}

    def missing(self, arms: Sequence[Arm], count: int) -> list[tuple[Arm, int, int]]:
        """The runs that are still to be done."""
        return [(arm, i, count) for i in range(count) for arm in arms if (arm.name, arm.split, i) not in self.runs]

    def add(self, row: dict[str, Any]) -> None:
        """Keep a run."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.runs[self._key(row)] = json.loads(json.dumps(row))

    def column(self, arm: Arm, count: int, samples: int, which: int) -> list[float]:
        """Reward (0) or gold reward (1) of each prompt's best answer after so many samples."""
        return [self.runs[arm.name, arm.split, i]["curve"][str(samples)][which] for i in range(count)]

    def mean(self, arm: Arm, count: int, name: str) -> float:
        """Mean of one number over the prompts."""
        return sum(self.runs[arm.name, arm.split, i][name] for i in range(count)) / count

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[str, str, int]:
        return row["arm"], row["split"], row["prompt"]


def do(arms: Sequence[Arm], count: int, log: Log, workers: int) -> None:
    """Do the runs that are missing."""
    tasks = log.missing(arms, count)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for done, row in enumerate(pool.imap_unordered(run, tasks), 1):
            log.add(row)
            print(f"\r{arms[0].split}: {done} of {len(tasks)} runs", end="", flush=True)
    print()


def checkpoints(arm: Arm, log: Log) -> Iterator[int]:
    """Numbers of samples at which the arm's curve is known."""
    yield from sorted(map(int, log.runs[arm.name, arm.split, 0]["curve"]))


def compare(arms: Sequence[Arm], count: int, samples: int, log: Log) -> dict[str, Any]:
    """The table: each arm against the first, paired by prompt."""
    reference, first_wave, ours, *_ = arms
    table = {}
    for arm in arms:
        at = max(checkpoints(arm, log))
        reward, gold = (log.column(arm, count, at, which) for which in (0, 1))
        base = [log.column(reference, count, samples, which) for which in (0, 1)]
        table[arm.name] = {
            "reward": mean_with_interval(reward),
            "gold": mean_with_interval(gold),
            "reward_difference": mean_with_interval([a - b for a, b in zip(reward, base[0], strict=True)]),
            "gold_difference": mean_with_interval([a - b for a, b in zip(gold, base[1], strict=True)]),
            "curve": {n: _means(log, arm, count, n) for n in checkpoints(arm, log)},
            **{name: log.mean(arm, count, name) for name in ("sampled_tokens", "reward_calls", "seconds")},
        }
    target = table[reference.name]["reward"]["mean"]
    reached = [n for n in checkpoints(ours, log) if sum(log.column(ours, count, n, 0)) / count >= target]
    answers, floors = log.column(ours, count, samples, 0), log.column(first_wave, count, WAVE, 0)
    worse = sum(answer < floor - 1e-5 for answer, floor in zip(answers, floors, strict=True))
    return {
        "arms": table,
        "samples_to_reach_best_of_n": min(reached, default=None),
        "prompts_below_the_first_wave": worse,
    }


def _means(log: Log, arm: Arm, count: int, samples: int) -> list[float]:
    return [sum(log.column(arm, count, samples, which)) / count for which in (0, 1)]


def best_temperature(arms: Sequence[Arm], count: int, log: Log, samples: int) -> Arm:
    """The arm with the highest mean reward."""
    return max(arms, key=lambda arm: _means(log, arm, count, samples)[0])


def coolest_of_the_best(arms: Sequence[Arm], count: int, log: Log, samples: int) -> Arm:
    """The arm of the lowest temperature whose reward is within one paired standard error of the highest."""
    highest = log.column(best_temperature(arms, count, log, samples), count, samples, 0)

    def is_close(arm: Arm) -> bool:
        lost = torch.tensor(highest) - torch.tensor(log.column(arm, count, samples, 0))
        return bool(lost.mean() <= lost.std() / count**0.5)

    return min(filter(is_close, arms), key=lambda arm: arm.temperature)


def show(result: dict[str, Any]) -> None:
    """The comparison as a table for people."""
    print(f"{'arm':22} {'reward':>8} {'gold':>6}   difference in reward         tokens  seconds")
    for name, row in result["arms"].items():
        change = row["reward_difference"]
        print(
            f"{name:22} {row['reward']['mean']:8.3f} {row['gold']['mean']:6.2f}   "
            f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]   "
            f"{row['sampled_tokens']:8.0f} {row['seconds']:8.2f}"
        )
    print(f"Best-of-N's reward is reached with {result['samples_to_reach_best_of_n']} samples")


def main() -> None:
    """Choose on dev prompts, compare on test prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=60, help="test prompts")
    parser.add_argument("--dev-prompts", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--log", type=Path, default=RESULTS / "quality.jsonl", help="where single runs are kept")
    args = parser.parse_args()
    log = Log(args.log)
    candidates = dev_arms(args.samples)
    do([arm for arms in candidates.values() for arm in arms], args.dev_prompts, log, args.workers)
    on_dev = {
        arm.name: _means(log, arm, args.dev_prompts, args.samples)[0] for arms in candidates.values() for arm in arms
    }
    theirs, ours = (
        choose(candidates[name], args.dev_prompts, log, args.samples).temperature
        for name, choose in (("best_of_n", best_temperature), ("aisp", coolest_of_the_best))
    )
    arms = test_arms(args.samples, theirs, ours)
    do(arms, args.prompts, log, args.workers)
    result = compare(arms, args.prompts, args.samples, log)
    show(result)
    settings = {"samples": args.samples, "prompts": args.prompts, "max_tokens": MAX_TOKENS}
    save("quality", {**settings, "dev_rewards": on_dev, "temperatures": {"best_of_n": theirs, "aisp": ours}, **result})


if __name__ == "__main__":
    main()
