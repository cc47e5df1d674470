"""The numbers of a comparison, each with its formula; pure functions of numbers and words, no model anywhere.

The unit of all statistics is the prompt: seeds of one prompt are averaged before anything is compared, since they are
no independent evidence. Differences are paired by prompt.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from langchain_aisp.noise import fold, uniform
from langchain_aisp.types import require

DRAWS = 10_000
"""Bootstrap samples of an interval."""


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and how far it can be trusted.

    Attributes:
        mean: The average.
        standard_error: Standard deviation over the root of the count; nan for a single value.
        low: Lower end of the 95 % bootstrap interval.
        high: Upper end.
        count: Number of values.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard error and bootstrap interval of values [n], one per prompt.

    Raises:
        ValueError: There is no value.
    """
    require(len(values) > 0, "nothing to average: no prompt was answered by every method yet")
    low, high = bootstrap_interval(values)
    return Estimate(math.fsum(values) / len(values), standard_error(values), low, high, len(values))


def paired(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """``estimate`` of the differences ``values[i] - baseline[i]``, both [n] and in the same order of prompts."""
    require(len(values) == len(baseline), f"pairs need equally many values, got {len(values)} and {len(baseline)}")
    return estimate([ours - theirs for ours, theirs in zip(values, baseline, strict=True)])


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean, ``sqrt(Σ (x - mean)² / (n - 1) / n)``; nan for fewer than two values."""
    if len(values) < 2:
        return math.nan
    data = torch.tensor(values, dtype=torch.float64)
    return float(data.std() / math.sqrt(len(values)))


def bootstrap_interval(
    values: Sequence[float],
    *,
    statistic: Literal["mean", "median"] = "mean",
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 2026,
) -> tuple[float, float]:
    """Percentile bootstrap interval: quantiles of the statistics of ``draws`` resamples with replacement.

    Args:
        values: [n], for a paired interval the differences or ratios.
        statistic: Of which the interval is.
        level: Share of the resampled statistics that lie inside.
        draws: Number of resamples.
        seed: The same seed gives the same interval.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    data = torch.tensor(values, dtype=torch.float64)
    picks = (uniform(fold(seed, torch.arange(draws * len(data)))) * len(data)).long().view(draws, -1)
    resampled = data[picks]
    found = resampled.mean(dim=1) if statistic == "mean" else resampled.median(dim=1).values
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = found.quantile(edges).tolist()
    return low, high


def words(text: str) -> list[str]:
    """The text's words in lower case, parted by white space: the units of ``diversity``."""
    return text.lower().split()


def diversity(units: Sequence[Hashable], sizes: Iterable[int] = (2, 3, 4)) -> float:
    """How little a response repeats itself, ``Π_n unique n-grams / (n-grams + 1)``, between 0 and 1.

    The 1 keeps the ratio finite for a response without n-grams, and makes short responses score low: five different
    words get 4/5 · 3/4 · 2/3 = 0.4.

    Args:
        units: The response's words or token ids.
        sizes: The n.

    Source: the measure that ARGS (arXiv 2402.01694) and RE-Control (arXiv 2406.05954) report.
    """
    return math.prod(_distinct_share(units, size) for size in sizes)


def _distinct_share(units: Sequence[Hashable], size: int) -> float:
    grams = [tuple(units[start : start + size]) for start in range(len(units) - size + 1)]
    return len(set(grams)) / (len(grams) + 1)


def cosine(left: Sequence[float], right: Sequence[float]) -> float:
    """Cosine of two vectors [D], ``a·b / (|a| |b|)``; 0 if one of them is zero."""
    one, other = (torch.tensor(vector, dtype=torch.float64) for vector in (left, right))
    norms = one.norm() * other.norm()
    return float(one @ other / norms) if norms > 0 else 0.0


def best_of_n_kl(samples: int) -> float:
    """KL divergence in nats of the best of n samples from a single one, ``ln n - (n - 1) / n``.

    Exact where no two responses tie, an upper bound where some do (Beirami et al., arXiv 2401.01879).
    """
    require(samples >= 1, f"samples must be at least 1, got {samples}")
    return math.log(samples) - (samples - 1) / samples


def best_so_far(rewards: Sequence[float], complete: Sequence[bool]) -> list[int]:
    """For each sample [n] the index of the best one up to it: complete before cut off, then by reward, then earlier.

    That is the order in which a search ranks its candidates.
    """
    found: list[int] = []
    for index in range(len(rewards)):
        best = found[-1] if found else index
        better = (complete[index], rewards[index]) > (complete[best], rewards[best])
        found.append(index if better else best)
    return found


def value_at(costs: Sequence[float], values: Sequence[float], spent: float) -> float | None:
    """The value of a curve after a cost: that of the last point not beyond it, None before the first one.

    Args:
        costs: [n], rising: samples, tokens or seconds.
        values: [n], for instance the best reward so far.
        spent: On the same scale as the costs.
    """
    index = bisect_right(costs, spent) - 1
    return values[index] if index >= 0 else None


def cost_to_reach(costs: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """The first of the costs [n] at which the value [n] is at least the target; None if it never is."""
    reached = (cost for cost, value in zip(costs, values, strict=True) if value >= target)
    return next(reached, None)


def mean_curve(
    curves: Sequence[tuple[Sequence[float], Sequence[float]]], at: Iterable[float]
) -> tuple[list[float], list[float]]:
    """The mean of several curves, each (costs, values), as a curve of its own.

    Args:
        curves: One per prompt, as for ``value_at``.
        at: Costs to read them at; those at which a curve has not begun yet are left out.

    Returns:
        Costs and mean values, equally many.
    """
    points = []
    for cost in at:
        values = [value for costs, known in curves if (value := value_at(costs, known, cost)) is not None]
        if len(values) == len(curves):
            points.append((cost, math.fsum(values) / len(values)))
    return [cost for cost, _ in points], [value for _, value in points]


def preference(ours: float, theirs: float) -> float:
    """1 for the greater number, 0 for the smaller, a half for a tie."""
    return 0.5 if ours == theirs else float(ours > theirs)


@dataclass(frozen=True)
class Verdict:
    """What a judge said of two answers, ours shown first and ours shown second.

    Attributes:
        shown_first: 1 if ours won, 0 if it lost, a half for a tie, None if the judge's answer was unreadable.
        shown_second: The same with the answers exchanged.
    """

    shown_first: float | None
    shown_second: float | None

    @property
    def readable(self) -> tuple[float, ...]:
        """The outcomes that could be read."""
        return tuple(outcome for outcome in (self.shown_first, self.shown_second) if outcome is not None)

    @property
    def exchanged(self) -> Verdict:
        """The same judgement from the other answer's side."""
        first, second = (None if each is None else 1 - each for each in (self.shown_second, self.shown_first))
        return Verdict(first, second)

    @property
    def score(self) -> float | None:
        """Mean of the readable outcomes, None without any; a judge that prefers a place gives a half."""
        return math.fsum(self.readable) / len(self.readable) if self.readable else None


@dataclass(frozen=True)
class WinRate:
    """How often a judge preferred our answers.

    Attributes:
        rate: Estimate over the pairs with a readable verdict; None without any.
        unreadable: Answers of the judge without a verdict, of two per pair; they count for neither side.
        undecided: Share of the pairs whose two orders gave different winners: the judge's fondness for a place.
    """

    rate: Estimate | None
    unreadable: int
    undecided: float


def win_rate(verdicts: Sequence[Verdict], *, seeds: int = 1) -> WinRate:
    """The mean score of verdicts with its bootstrap interval, failures to parse counted apart.

    Args:
        verdicts: [n * seeds], those of one prompt one after the other.
        seeds: Verdicts per prompt; they are averaged first.
    """
    prompts = [verdicts[start : start + seeds] for start in range(0, len(verdicts), seeds)]
    readable = [[verdict.score for verdict in same if verdict.score is not None] for same in prompts]
    scores = [math.fsum(same) / len(same) for same in readable if same]
    both = [verdict.readable for verdict in verdicts if len(verdict.readable) == 2]
    torn = sum(set(outcomes) == {0.0, 1.0} for outcomes in both)
    unreadable = sum(2 - len(verdict.readable) for verdict in verdicts)
    return WinRate(estimate(scores) if scores else None, unreadable, torn / len(both) if both else 0.0)
