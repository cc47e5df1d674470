"""Reward against distance from the model: searches on KL budgets and floors of likelihood, beside Best-of-N.

Why: any reward rises when answers may be anything. What counts is how much of it a method gets for its distance from
the model, and Best-of-N is hard to beat there. Two distances are drawn, since no single one fits all methods:

- *KL divergence.* Best-of-N: at most ln n - (n - 1)/n nats. Steered samples: what the answer was steered by, measured
  at each of its tokens (``Budget.kl_budget``), and on top the same bound for being the best of all samples. A control
  that has learnt from earlier samples of the same request owes them more than is counted here. Branching has no such
  number.
- *Surprise.* How many nats less likely the answers are, under the model by itself, than one plain sample of the same
  prompts. It is measured for every method, and asks for no theory.

All methods answer the same prompts with the same seeds at temperature 1, where both distances are defined.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common import mean_with_interval, save
from langchain_aisp import AISP, BestOfN, Budget, ClassifierReward, align
from langchain_aisp.align import Candidate
from langchain_aisp.demo import REWARD_MODEL_PATH, scenarios
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.evaluation.metrics import best_of_n_kl
from langchain_aisp.methods import MISVO, PublishedAISP
from langchain_aisp.types import Chat, Engine, Method, Reward, Sampling

WAVE = 32
KL_BUDGETS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, math.inf)
FLOORS = (-10.0, -20.0, -40.0, -80.0, -math.inf)
FEWEST_NATS = 0.3  # per token: the control of AISP that a budget shall have something to bound


@dataclass(frozen=True)
class Arm:
    """One point of the frontier.

    Attributes:
        family: The line that it is on.
        setting: Where on the line.
        method: The search.
        budget: How far it may go.
        selection: Nats for being the best of all samples; None where nobody knows.
    """

    family: str
    setting: float
    method: Method[Any]
    budget: Budget
    selection: float | None


def arms(samples: int) -> list[Arm]:
    """All points; each family but Best-of-N decodes so many samples everywhere."""
    wave = min(WAVE, samples)
    waves = samples // wave
    samples = wave * waves
    steered: Mapping[str, Method[Any]] = {
        "published, sampled": PublishedAISP(samples_per_iteration=wave, iterations=waves, decode="sample"),
        "misvo": MISVO(samples_per_iteration=wave, iterations=waves),
        "aisp with control": AISP(samples=samples, iterations=waves, control_kl=FEWEST_NATS),
    }
    sizes = [2**power for power in range(samples.bit_length()) if 2**power <= samples]
    return [
        *(Arm("best of n", n, BestOfN(n, samples_per_wave=WAVE), _limits(), best_of_n_kl(n)) for n in sizes),
        *(
            Arm(name, nats, method, _limits(nats), None if isinstance(method, AISP) else best_of_n_kl(samples))
            for name, method in steered.items()
            for nats in KL_BUDGETS
        ),
        *(Arm("aisp", least, AISP(samples=samples, iterations=waves), _limits(least=least), None) for least in FLOORS),
    ]


def _limits(nats: float | None = None, least: float = -math.inf) -> Budget:
    """A floor that bounds nothing still tells how likely the answer is."""
    return Budget(kl_budget=nats, min_base_logprob=least)


def measure(
    engine: Engine, reward: Reward, chats: Sequence[Chat], points: Sequence[Arm], max_tokens: int
) -> list[dict[str, Any]]:
    """Each arm's answers to all conversations as numbers; the first arm must be a single plain sample."""
    answers = {number: _answers(engine, reward, chats, arm, max_tokens) for number, arm in enumerate(points)}
    plain = [_surprise(candidate) for candidate in answers[0]]
    return [_point(arm, answers[number], plain) for number, arm in enumerate(points)]


def _answers(engine: Engine, reward: Reward, chats: Sequence[Chat], arm: Arm, max_tokens: int) -> list[Candidate]:
    sampling, found = Sampling(max_tokens=max_tokens), list[Candidate]()
    for seed, chat in enumerate(chats):
        found.append(align(engine, reward, arm.method, chat, sampling=sampling, seed=seed, budget=arm.budget).best)
        print(f"\r{arm.family} at {arm.setting:g}: {len(found)} of {len(chats)}   ", end="", flush=True)
    print()
    return found


def _point(arm: Arm, answers: Sequence[Candidate], plain: Sequence[float]) -> dict[str, Any]:
    """Means over the conversations; infinite settings as texts, which JSON can hold."""
    steered = [candidate.kl or 0.0 for candidate in answers]
    surprise = [_surprise(candidate) - one for candidate, one in zip(answers, plain, strict=True)]
    kl = None if arm.selection is None else sum(steered) / len(steered) + arm.selection
    return {
        "family": arm.family,
        "setting": arm.setting if math.isfinite(arm.setting) else str(arm.setting),
        "reward": mean_with_interval([candidate.reward for candidate in answers]),
        "steered": mean_with_interval(steered),
        "most_steered": max(steered),
        "kl": kl,
        "surprise": mean_with_interval(surprise),
        "least_logprob": min(-_surprise(candidate) for candidate in answers),
    }


def _surprise(candidate: Candidate) -> float:
    assert candidate.base_logprob is not None
    return -candidate.base_logprob


def show(points: Sequence[Mapping[str, Any]]) -> None:
    """The points as a table for people."""
    print(f"{'family':20} {'setting':>8} {'reward':>8} {'KL':>7} {'steered':>8} {'surprise':>9}")
    for point in points:
        kl = "–" if point["kl"] is None else f"{point['kl']:.2f}"
        print(
            f"{point['family']:20} {point['setting']:>8} {point['reward']['mean']:8.3f} {kl:>7} "
            f"{point['steered']['mean']:8.2f} {point['surprise']['mean']:9.2f}"
        )


def demo_pair() -> tuple[Engine, Reward]:
    """The demo's model and its reward."""
    return TransformersEngine.shared("demo"), ClassifierReward.from_pretrained(str(REWARD_MODEL_PATH))


def main() -> None:
    """Measure all points and save the numbers; `benchmarks.plots` draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    args = parser.parse_args()
    engine, reward = demo_pair()
    chats = [scenario.messages for scenario in scenarios(args.split, args.prompts, seed=3)]
    points = measure(engine, reward, chats, arms(args.samples), args.max_tokens)
    show(points)
    settings = {name: getattr(args, name) for name in ("samples", "prompts", "max_tokens", "split")}
    save("frontier", {**settings, "points": points})


if __name__ == "__main__":
    main()
