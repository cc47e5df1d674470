"""Reward against distance from the model: searches on KL budgets and floors of likelihood, beside Best-of-N.

Why: any reward rises when answers may be anything. What counts is how much of it a method gets for its distance from
the model, and whether a gold reward that none of them sees rises with it; where gold turns, the rest of the way is the
reward's mistakes. Two distances are drawn, since no single one fits all methods:

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
from benchmarks.pairs import PAIRS, Opened, add_sources, open_pair, sources_of
from langchain_aisp import AISP, BestOfN, Budget, align
from langchain_aisp.align import Candidate, Settings
from langchain_aisp.evaluation.metrics import best_of_n_kl
from langchain_aisp.methods import MISVO, PublishedAISP
from langchain_aisp.types import Method, Sampling

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
        *(Arm("aisp, floors", least, AISP(samples=samples), _limits(least=least), None) for least in FLOORS),
        *(Arm("aisp, samples", n, AISP(samples=n), _limits(), None) for n in sizes),
    ]


def _limits(nats: float | None = None, least: float = -math.inf) -> Budget:
    """A floor that bounds nothing still tells how likely the answer is."""
    return Budget(kl_budget=nats, min_base_logprob=least)


def measure(opened: Opened, points: Sequence[Arm], max_tokens: int) -> list[dict[str, Any]]:
    """Each arm's answers to all prompts as numbers; the first arm must be a single plain sample."""
    answers = {number: _answers(opened, arm, max_tokens) for number, arm in enumerate(points)}
    plain = [_surprise(candidate) for candidate in answers[0]]
    return [_point(arm, answers[number], _golds(opened, answers[number]), plain) for number, arm in enumerate(points)]


def _answers(opened: Opened, arm: Arm, max_tokens: int) -> list[Candidate]:
    sampling, found = Sampling(max_tokens=max_tokens), list[Candidate]()
    for seed, prompt in enumerate(opened.prompts):
        settings: Settings = {"sampling": sampling, "seed": seed, "budget": arm.budget}
        found.append(align(opened.engine, opened.reward, arm.method, prompt.messages, **settings).best)
        print(f"\r{arm.family} at {arm.setting:g}: {len(found)} of {len(opened.prompts)}   ", end="", flush=True)
    print()
    return found


def _golds(opened: Opened, answers: Sequence[Candidate]) -> list[float]:
    said = [(prompt.messages, answer.response) for prompt, answer in zip(opened.prompts, answers, strict=True)]
    golds: list[float] = opened.gold.submit(said).future.result().tolist()
    return golds


def _point(arm: Arm, answers: Sequence[Candidate], golds: Sequence[float], plain: Sequence[float]) -> dict[str, Any]:
    """Means over the prompts; infinite settings as texts, which JSON can hold."""
    steered = [candidate.kl or 0.0 for candidate in answers]
    surprise = [_surprise(candidate) - one for candidate, one in zip(answers, plain, strict=True)]
    kl = None if arm.selection is None else sum(steered) / len(steered) + arm.selection
    return {
        "family": arm.family,
        "setting": arm.setting if math.isfinite(arm.setting) else str(arm.setting),
        "reward": mean_with_interval([candidate.reward for candidate in answers]),
        "gold": mean_with_interval(golds),
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
    print(f"{'family':20} {'setting':>8} {'reward':>8} {'gold':>7} {'KL':>7} {'steered':>8} {'surprise':>9}")
    for point in points:
        kl = "–" if point["kl"] is None else f"{point['kl']:.2f}"
        print(
            f"{point['family']:20} {point['setting']:>8} {point['reward']['mean']:8.3f} "
            f"{point['gold']['mean']:7.3f} {kl:>7} "
            f"{point['steered']['mean']:8.2f} {point['surprise']['mean']:9.2f}"
        )


def main() -> None:
    """Measure all points and save the numbers; `benchmarks.plots` draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="demo")
    add_sources(parser)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    args = parser.parse_args()
    opened = open_pair(args.pair, sources_of(args), args.split, args.prompts)
    points = measure(opened, arms(args.samples), PAIRS[args.pair].max_tokens)
    show(points)
    settings = {name: getattr(args, name) for name in ("pair", "samples", "prompts", "split")}
    save("frontier", {**settings, "points": points})


if __name__ == "__main__":
    main()
