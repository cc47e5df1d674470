"""Tables and curves of a comparison: numbers with errors, and every gain beside its cost and the held-out reward."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from langchain_aisp.evaluation.coherence import Embeddings, coherence
from langchain_aisp.evaluation.metrics import (
    Estimate,
    WinRate,
    best_of_n_kl,
    cost_to_reach,
    diversity,
    estimate,
    paired,
    preference,
    value_at,
    win_rate,
    words,
)
from langchain_aisp.evaluation.plot import Series, line_plot
from langchain_aisp.evaluation.results import Answer, Cost, Results, Value, prompt_text
from langchain_aisp.types import require

if TYPE_CHECKING:
    from langchain_aisp.evaluation.judge import PairJudge

NOTHING = "–"

_COSTS: dict[Cost, str] = {"samples": "samples", "sampled_tokens": "sampled tokens", "seconds": "seconds"}
_VALUES: dict[Value, str] = {"reward": "reward", "gold": "held-out reward"}
_SHOWN = 40  # points of a plotted curve
_TARGETS = 6  # numbers of samples whose reward others are to reach


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        title: What it shows.
        header: Names of the columns, the first one of the rows.
        rows: As many cells each.
        note: What has to be known to read it.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What people read of an evaluation.

    Attributes:
        results: The runs.
        baseline: The method that all are compared with.
        tables: The numbers.
        plots: The curves as SVG.
    """

    results: Results
    baseline: str
    tables: tuple[Table, ...]
    plots: tuple[str, ...]


def build_report(
    results: Results,
    *,
    baseline: str | None = None,
    embeddings: Embeddings | None = None,
    judge: PairJudge | None = None,
) -> Report:
    """Tables and plots of runs.

    Args:
        results: The runs.
        baseline: Label of the method that all are compared with; the first Best-of-N, else the first method, unless
            given.
        embeddings: Measure the coherence of prompts and answers with these.
        judge: Compare the answers of all pairs of methods by this judge: two calls per prompt, seed and pair.

    Raises:
        ValueError: There is no such baseline.
    """
    names = results.methods
    chosen = baseline or next((name for name in names if name.startswith("best_of_n")), names[0])
    require(chosen in names, f"there is no method {chosen!r} to compare with; the file has {', '.join(names)}")
    tables = [
        scores(results, chosen),
        costs(results),
        equal_seconds(results, chosen),
        samples_to_reach(results, chosen),
        wins_by_reward(results),
        texts(results, embeddings),
        distances(results),
    ]
    if judge is not None:
        tables.append(wins_by_judge(results, judge))
    return Report(results, chosen, tuple(tables), plots(results))


# -- tables -----------------------------------------------------------------------------------------------------------


def scores(results: Results, baseline: str) -> Table:
    """Reward and held-out reward of the answers, and the paired differences from the baseline."""
    rows = []
    for name in results.methods:
        row = [name]
        for value in _VALUES:
            row += _score_and_difference(results, name, baseline, value)
        rows.append(tuple(row))
    seeds = len(results.config["seeds"])
    note = (
        f"{len(results.prompts)} prompts, {seeds} seed{'s' * (seeds > 1)} each. Mean ± standard error over prompts; "
        f"paired differences from {baseline} with 95 % bootstrap intervals."
    )
    if not results.has_gold:
        note += " No held-out reward was asked: a gain may be the reward model's mistakes."
    return Table("Scores", ("method", "reward", "difference", "held-out reward", "difference"), tuple(rows), note)


def _score_and_difference(results: Results, name: str, baseline: str, value: Value) -> list[str]:
    if value == "gold" and not results.has_gold:
        return [NOTHING, NOTHING]
    ours, theirs = results.numbers(name, value), results.numbers(baseline, value)
    difference = "" if name == baseline else _difference(paired(ours, theirs))
    return [_score(estimate(ours)), difference]


def costs(results: Results) -> Table:
    """What an answer has cost on average."""
    names = ("samples", "sampled_tokens", "reward_calls", "seconds", "reward_seconds")
    rows = tuple((name, *(_mean(results.numbers(name, cost)) for cost in names)) for name in results.methods)
    note = "Per answer. The prompt was read beforehand for every method; reward seconds are part of the seconds."
    if len(results.environments) > 1:
        note += f" The runs come from {len(results.environments)} unlike machines or set-ups: do not compare seconds."
    return Table("Costs", ("method", "samples", "tokens", "reward calls", "seconds", "reward seconds"), rows, note)


def equal_seconds(results: Results, baseline: str) -> Table:
    """Each method's answers at the time at which the baseline was done with the same prompt and seed."""
    rows = []
    for name in results.methods:
        row = [name]
        for value in _VALUES:
            row += _at_the_same_time(results, name, baseline, value)
        rows.append((*row, _share_begun(results, name, baseline)))
    header = ("method", "reward", "difference", "held-out reward", "difference", "prompts")
    note = (
        f"Best answer so far when {baseline} was done, on the same prompt. Prompts on which a method had no answer yet "
        "are left out; the last column tells how many are left."
    )
    return Table("At equal seconds", header, tuple(rows), note)


def _at_the_same_time(results: Results, name: str, baseline: str, value: Value) -> list[str]:
    if value == "gold" and not results.has_gold:
        return [NOTHING, NOTHING]
    pairs = _pairs_at_the_same_time(results, name, baseline, value)
    if not pairs:
        return [NOTHING, NOTHING]
    ours, theirs = [our for our, _ in pairs], [their for _, their in pairs]
    return [_score(estimate(ours)), "" if name == baseline else _difference(paired(ours, theirs))]


def _pairs_at_the_same_time(results: Results, name: str, baseline: str, value: Value) -> list[tuple[float, float]]:
    """The method's value and the baseline's, for each prompt on which the method had answers in time."""
    pairs = []
    for ours, theirs in zip(results.answers_of(name), results.answers_of(baseline), strict=True):
        deadlines = [its.run["seconds"] for its in theirs]
        timed = [value_at(*mine.curves["seconds", value], end) for mine, end in zip(ours, deadlines, strict=True)]
        reached = [each for each in timed if each is not None]
        if len(reached) == len(timed):
            pairs.append((_average(reached), _average([its.run[value] for its in theirs])))
    return pairs


def _share_begun(results: Results, name: str, baseline: str) -> str:
    return f"{len(_pairs_at_the_same_time(results, name, baseline, 'reward'))} of {len(results.prompts)}"


def samples_to_reach(results: Results, baseline: str) -> Table:
    """With how many samples, and in how many seconds, the methods reach the baseline's mean reward."""
    counts, rewards = results.curve(baseline, "samples", "reward")
    rivals = [name for name in results.methods if name != baseline]
    rows = []
    for count in _powers_of_two(int(counts[-1])):
        target = value_at(counts, rewards, count)
        assert target is not None
        rows.append((f"{count}", f"{target:.3f}", *(_reached(results, name, target) for name in rivals)))
    note = (
        f"Mean reward of {baseline} after so many samples, and how many samples and seconds the others need for a mean "
        "reward no lower."
    )
    return Table(f"To reach {baseline}", ("samples", "reward", *rivals), tuple(rows), note)


def _reached(results: Results, name: str, target: float) -> str:
    samples = cost_to_reach(*results.curve(name, "samples", "reward"), target)
    seconds = cost_to_reach(*results.curve(name, "seconds", "reward"), target)
    told = [f"{samples:.0f}"] if samples is not None else []
    return ", ".join([*told, f"{seconds:.3g} s"] if seconds is not None else told) or "never"


def _powers_of_two(most: int) -> list[int]:
    """The largest powers of two up to a number, and the number."""
    powers = [1 << exponent for exponent in range(most.bit_length()) if 1 << exponent <= most]
    return sorted({*powers, most})[-_TARGETS:]


def wins_by_reward(results: Results) -> Table:
    """How often the row's answer scores higher than the column's, by the held-out reward where there is one."""
    value: Value = "gold" if results.has_gold else "reward"
    rows = []
    for name in results.methods:
        row = [name]
        for other in results.methods:
            row.append("" if name == other else _share(estimate(_wins(results, name, other, value))))
        rows.append(tuple(row))
    note = f"Share of prompts on which the row has the higher {_VALUES[value]} than the column, ties as a half."
    return Table(f"Win rates by {_VALUES[value]}", ("method", *results.methods), tuple(rows), note)


def _wins(results: Results, name: str, other: str, value: Value) -> list[float]:
    """One number per prompt: the share of its seeds that the method wins."""
    pairs = zip(results.answers_of(name), results.answers_of(other), strict=True)
    return [_average([preference(a.run[value], b.run[value]) for a, b in zip(*pair, strict=True)]) for pair in pairs]


def wins_by_judge(results: Results, judge: PairJudge) -> Table:
    """How often a judge, who sees both orders, prefers the row's answer."""
    names, seeds = results.methods, len(results.config["seeds"])
    rates: dict[tuple[str, str], WinRate] = {}
    for ours, theirs in combinations(names, 2):
        pairs = zip(_flat(results, ours), _flat(results, theirs), strict=True)
        verdicts = judge.compare([(a.run["messages"], a.run["text"], b.run["text"]) for a, b in pairs])
        rates[ours, theirs] = win_rate(verdicts, seeds=seeds)
        rates[theirs, ours] = win_rate([verdict.exchanged for verdict in verdicts], seeds=seeds)
    rows = tuple((name, *("" if name == other else _judged(rates[name, other]) for other in names)) for name in names)
    note = (
        "Share of answers that the judge prefers, each pair shown in both orders, ties as a half. In brackets: pairs "
        "whose winner changed with the order; answers of the judge without a verdict, which count for neither side."
    )
    return Table("Win rates by the judge", ("method", *names), rows, note)


def _judged(found: WinRate) -> str:
    told = NOTHING if found.rate is None else _share(found.rate)
    return f"{told} ({found.undecided:.0%}; {found.unreadable})"


def texts(results: Results, embeddings: Embeddings | None) -> Table:
    """What the answers are like: length, repetition, closeness to the prompt."""
    rows = []
    for name in results.methods:
        close = NOTHING if embeddings is None else _score(estimate(_coherences(results, name, embeddings)))
        counted = _mean(results.values(name, lambda answer: float(len(words(answer.run["text"])))))
        varied = _score(estimate(results.values(name, lambda answer: diversity(words(answer.run["text"])))))
        finished = results.values(name, lambda answer: float(answer.run["finish_reason"] == "stop"))
        rows.append((name, counted, varied, close, f"{_average(finished):.0%}"))
    note = "Diversity: product over n = 2, 3, 4 of distinct n-grams / (n-grams + 1), in words of the answer."
    if embeddings is not None:
        note += " Coherence: cosine of the embeddings of the last user turn and the answer."
    return Table("Texts", ("method", "words", "diversity", "coherence", "complete"), tuple(rows), note)


def _coherences(results: Results, name: str, embeddings: Embeddings) -> list[float]:
    """One number per prompt."""
    answers = _flat(results, name)
    prompts = [prompt_text(answer.run["messages"]) for answer in answers]
    found = coherence(embeddings, prompts, [answer.run["text"] for answer in answers])
    seeds = len(results.config["seeds"])
    return [_average(found[start : start + seeds]) for start in range(0, len(found), seeds)]


def distances(results: Results) -> Table:
    """How far the answers are from what the model says by itself, by what is known of each method."""
    rows = []
    for name in results.methods:
        likely = NOTHING
        if results.config["base_logprobs"]:
            likely = _score(estimate(results.numbers(name, "base_logprob")))
        plain = results.config["methods"][name].startswith("BestOfN(")
        bound = results.values(name, lambda answer: best_of_n_kl(answer.run["samples"]))
        steered = [answer.last.get("control_kl") for answer in _flat(results, name)]
        known = [each for each in steered if each is not None]
        rows.append((name, likely, _mean(bound) if plain else NOTHING, _mean(known) if any(known) else NOTHING))
    note = (
        "In nats. log p: of the answer, by the model at temperature 1. Best-of-N: KL divergence of the best of n from "
        "one sample, ln n - (n - 1)/n. Control: KL divergence of the last controls from the prior over them, as the "
        "method itself reports it. The three are unlike things."
    )
    header = ("method", "log p", "KL of Best-of-N", "KL of the control")
    return Table("Distance from the model", header, tuple(rows), note)


def _flat(results: Results, name: str) -> list[Answer]:
    return [answer for same in results.answers_of(name) for answer in same]


# -- curves -----------------------------------------------------------------------------------------------------------


def plots(results: Results) -> tuple[str, ...]:
    """Reward and held-out reward over samples, tokens and seconds."""
    values: list[Value] = ["reward", "gold"] if results.has_gold else ["reward"]
    drawn = [
        line_plot(f"{_VALUES[value].capitalize()} over {told}", told, _VALUES[value], _lines(results, cost, value))
        for cost, told in _COSTS.items()
        for value in values
    ]
    return tuple(filter(None, drawn))


def _lines(results: Results, cost: Cost, value: Value) -> list[Series]:
    lines = []
    for number, name in enumerate(results.methods):
        spent, reached = results.curve(name, cost, value)
        kept = _thinned(spent)
        lines.append(Series(name, [spent[index] for index in kept], [reached[index] for index in kept], number))
    return lines


def _thinned(costs: Sequence[float]) -> list[int]:
    """Indices of some of the rising costs: the last one up to each of so many costs at equal ratios."""
    if len(costs) <= _SHOWN:
        return list(range(len(costs)))
    ratio = costs[-1] / costs[0]
    wanted = [costs[0] * ratio ** (step / (_SHOWN - 1)) for step in range(_SHOWN - 1)]
    return sorted({*(bisect_right(costs, cost) - 1 for cost in wanted), len(costs) - 1})


# -- as text ----------------------------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """All tables in Markdown."""
    return "\n\n".join(map(_markdown_table, report.tables)) + "\n"


def _markdown_table(table: Table) -> str:
    rule = "|---" + "|---:" * (len(table.header) - 1) + "|"
    rows = [_markdown_row(row) for row in table.rows]
    lines = [f"### {table.title}", "", _markdown_row(table.header), rule, *rows]
    return "\n".join([*lines, "", table.note] if table.note else lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _average(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _mean(values: Sequence[float]) -> str:
    mean = _average(values)
    return f"{mean:,.0f}" if mean >= 100 else f"{mean:.3g}"


def _score(found: Estimate) -> str:
    error = "" if math.isnan(found.standard_error) else f" ± {found.standard_error:.3f}"
    return f"{found.mean:.3f}{error}".replace("-", "−")


def _difference(found: Estimate) -> str:
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]".replace("-", "−")


def _share(found: Estimate) -> str:
    return f"{found.mean:.0%} [{found.low:.0%}, {found.high:.0%}]"
