"""Runs read back from their files: values and curves per method, paired by prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from langchain_aisp.evaluation.log import Key, Line, key_of, read_log
from langchain_aisp.evaluation.metrics import best_so_far, mean_curve
from langchain_aisp.types import require

Cost = Literal["samples", "sampled_tokens", "seconds"]
Value = Literal["reward", "gold"]
Curve: TypeAlias = tuple[list[float], list[float]]
"""Rising costs and what was reached with them."""

_FINE = 256  # points of a curve over tokens or seconds; samples are counted one by one


@dataclass(frozen=True)
class Answer:
    """What a report needs of a run: its numbers and its answer, without the texts and tokens of all samples.

    Attributes:
        run: The run's own fields, samples and trace left out.
        curves: Reward and held-out reward of the best response so far, over each cost.
        last: The numbers of the last iteration.
    """

    run: Line
    curves: Mapping[tuple[Cost, Value], Curve]
    last: Mapping[str, float | None]

    @classmethod
    def of(cls, line: Line) -> Answer:
        """From a line of a log."""
        samples, trace = line.pop("samples"), line.pop("trace")
        curves: dict[tuple[Cost, Value], Curve] = {}
        costs: tuple[Cost, ...] = ("samples", "sampled_tokens", "seconds")
        for cost in costs:
            spent = [float(point[cost]) for point in trace]
            curves[cost, "reward"] = spent, [point["best"] for point in trace]
            if line["gold"] is not None:
                curves[cost, "gold"] = spent, [point["gold"] for point in trace]
        curves.update(_sample_by_sample(samples, curves["samples", "reward"]))
        return cls({**line, "samples": len(samples)}, curves, trace[-1])


def _sample_by_sample(samples: Sequence[Line], by_iteration: Curve) -> dict[tuple[Cost, Value], Curve]:
    """Curves with a point per sample; none where the method does not take the best of all that it decodes."""
    best = best_so_far([each["reward"] for each in samples], [each["finish_reason"] == "stop" for each in samples])
    rewards = [samples[index]["reward"] for index in best]
    if any(rewards[int(spent) - 1] != reached for spent, reached in zip(*by_iteration, strict=True)):
        return {}
    counted = [float(number) for number in range(1, len(samples) + 1)]
    golds = [samples[index]["gold"] for index in best]
    curves: dict[tuple[Cost, Value], Curve] = {("samples", "reward"): (counted, rewards)}
    if None not in golds:  # else only the answers were judged
        curves["samples", "gold"] = counted, golds
    return curves


@dataclass(frozen=True)
class Results:
    """Runs of several methods.

    Attributes:
        config: What was evaluated.
        answers: By method, prompt and seed.
        environments: The machines that ran it.
    """

    config: Line
    answers: Mapping[Key, Answer]
    environments: tuple[Line, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """Labels of the methods, in the order that was asked for."""
        return tuple(self.config["methods"])

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """Prompts that every method has answered with every seed; only they are compared."""
        known = dict.fromkeys(prompt for _, prompt, _ in self.answers)
        return tuple(
            prompt
            for prompt in known
            if all((name, prompt, seed) in self.answers for name in self.methods for seed in self.config["seeds"])
        )

    @property
    def has_gold(self) -> bool:
        """Whether a held-out reward judged the answers."""
        return self.config["gold"] is not None

    def answers_of(self, method: str) -> list[list[Answer]]:
        """One list per compared prompt, with one answer per seed."""
        seeds: list[int] = self.config["seeds"]
        return [[self.answers[method, prompt, seed] for seed in seeds] for prompt in self.prompts]

    def values(self, method: str, measure: Callable[[Answer], float]) -> list[float]:
        """A measure of the method's answers, one number per prompt: the mean over its seeds."""
        return [math.fsum(map(measure, same)) / len(same) for same in self.answers_of(method)]

    def numbers(self, method: str, name: str) -> list[float]:
        """A number that the runs tell, one per prompt."""
        return self.values(method, lambda answer: answer.run[name])

    def curve(self, method: str, cost: Cost, value: Value) -> Curve:
        """The method's mean best reward so far over what it has cost, up to the most that one of its runs has cost."""
        curves = [answer.curves[cost, value] for same in self.answers_of(method) for answer in same]
        low, high = min(costs[0] for costs, _ in curves), max(costs[-1] for costs, _ in curves)
        whole = [float(number) for number in range(1, int(high) + 1)]
        return mean_curve(curves, whole if cost == "samples" else _between(low, high))


def load_results(paths: Sequence[str | Path]) -> Results:
    """Read files of runs that differ in their methods only, such as rivals that were run later.

    Raises:
        ValueError: The files were made with other models, prompts or rewards, or hold the same method, or no prompt has
            been answered by all methods.
    """
    config: Line = {}
    answers: dict[Key, Answer] = {}
    environments: list[Line] = []
    for path in paths:
        found, lines = read_log(path)
        config = _merged(config, found, str(path)) if config else found
        for line in lines:
            if line["kind"] == "run":
                answers[key_of(line)] = Answer.of(line)
            elif line["kind"] == "session":
                environments.append({name: value for name, value in line.items() if name != "kind"})
    distinct = [each for index, each in enumerate(environments) if each not in environments[:index]]
    results = Results(config, answers, tuple(distinct))
    require(bool(results.prompts), "no prompt has been answered by every method yet; go on with the evaluation")
    return results


def _merged(config: Line, other: Line, path: str) -> Line:
    unlike = [key for key in {**config, **other} if key != "methods" and config.get(key) != other.get(key)]
    require(not unlike, f"{path} cannot be compared with the files before it: they differ in {', '.join(unlike)}")
    twice = sorted(config["methods"].keys() & other["methods"].keys())
    require(not twice, f"{path} holds {', '.join(twice)} again; a report shows each method once")
    return {**config, "methods": {**config["methods"], **other["methods"]}}


def _between(low: float, high: float) -> list[float]:
    """Costs from low to high at equal ratios."""
    low = max(low, 1e-9)
    steps = _FINE if high > low else 1
    return [low * (high / low) ** (step / max(steps - 1, 1)) for step in range(steps - 1)] + [high]


def prompt_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The last turn of a conversation: what the answer answers."""
    return str(messages[-1]["content"])
