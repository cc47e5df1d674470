"""Tables, plots and the page: numbers that were put in come out, and no text of a model becomes markup."""

import re
from xml.etree import ElementTree

import pytest

from langchain_aisp.evaluation.arms import Arm
from langchain_aisp.evaluation.judge import PairJudge
from langchain_aisp.evaluation.log import RunLog
from langchain_aisp.evaluation.page import html
from langchain_aisp.evaluation.plot import Series, line_plot
from langchain_aisp.evaluation.report import build_report, markdown
from langchain_aisp.evaluation.results import load_results
from langchain_aisp.evaluation.run import evaluate
from langchain_aisp.methods import ARGS
from langchain_aisp.types import Sampling
from tests.unit_tests.evaluation.conftest import ARMS
from tests.unit_tests.evaluation.test_judge import Judging

SPITE = "<script>alert('x')</script> | & \""


def write(path, rewards, *, seconds=1.0, gold=True, seeds=(0,), only=None):
    """A file with runs by hand: for each method and prompt the rewards of its samples, one wave of one sample each."""
    config = {
        "version": "1",
        "model": "by hand",
        "reward": {"name": "r"},
        "gold": {"name": "g"} if gold else None,
        "prompts": {"name": "p"},
        "seeds": list(seeds),
        "base_logprobs": False,
        "methods": {name: "BestOfN()" if "best" in name else "Other()" for name in rewards},
    }
    with RunLog(path, config) as log:
        log.append("session", {"gpu": None})
        for name, prompts in rewards.items():
            for number, values in enumerate(prompts):
                for seed in seeds:
                    if only is None or number < only:
                        log.append("run", by_hand(name, number, seed, values, seconds, gold))
    return path


def by_hand(name, number, seed, values, seconds, gold):
    samples = [{"reward": value, "gold": -value if gold else None, "finish_reason": "stop"} for value in values]
    best = [max(values[: index + 1]) for index in range(len(values))]
    trace = [
        {
            "best": value,
            "gold": -value if gold else None,
            "samples": index + 1,
            "sampled_tokens": 10 * (index + 1),
            "seconds": seconds * (index + 1),
            "control_kl": 0.0,
        }
        for index, value in enumerate(best)
    ]
    return {
        "method": name,
        "prompt": str(number),
        "seed": seed,
        "messages": [{"role": "user", "content": SPITE}],
        "reference": None,
        "text": f"{name} says {SPITE}",
        "reward": best[-1],
        "gold": -best[-1] if gold else None,
        "finish_reason": "stop",
        "sampled_tokens": 10 * len(values),
        "reward_calls": len(values),
        "seconds": seconds * len(values),
        "reward_seconds": 0.25,
        "samples": samples,
        "trace": trace,
    }


REWARDS = {
    "best_of_n": [[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 5.0]],
    "other": [[2.0, 4.0, 5.0, 5.0], [0.0, 6.0, 6.0, 6.0]],
}


@pytest.fixture
def report(tmp_path):
    return build_report(load_results([write(tmp_path / "runs.jsonl", REWARDS)]))


def table_of(report, title):
    [table] = [table for table in report.tables if table.title.startswith(title)]
    return {row[0]: row[1:] for row in table.rows}


def test_scores_stand_beside_held_out_ones_with_paired_differences(report):
    table = table_of(report, "Scores")
    assert table["best_of_n"] == ("4.000 ± 1.000", "", "−4.000 ± 1.000", "")
    assert table["other"][0] == "5.500 ± 0.500"
    assert table["other"][1] == "+1.500 [+1.000, +2.000]"
    assert table["other"][3] == "−1.500 [−2.000, −1.000]"


def test_costs_are_means_per_answer(report):
    assert table_of(report, "Costs")["other"] == ("4", "40", "4", "4", "0.25")


def test_the_baseline_s_rewards_are_reached_with_fewer_samples_and_seconds(report):
    table = table_of(report, "To reach best_of_n")
    assert table["1"] == ("0.000", "1, 1 s")
    assert table["2"] == ("1.000", "1, 1 s")  # means 0, 1, 2, 4 against 1, 5, 5.5, 5.5
    assert table["4"][0] == "4.000"
    assert table["4"][1].startswith("2, 2")


def test_at_equal_seconds_a_slower_method_is_read_where_the_baseline_stopped(tmp_path):
    slow = {"other": [[2.0, 4.0], [0.0, 6.0]], "slow": [[9.0], [9.0]]}
    paths = [write(tmp_path / "a.jsonl", {"best_of_n": REWARDS["best_of_n"]})]
    paths += [
        write(tmp_path / f"{name}.jsonl", {name: slow[name]}, seconds=at) for name, at in (("other", 3), ("slow", 5))
    ]
    table = table_of(build_report(load_results(paths)), "At equal seconds")
    assert table["best_of_n"][0] == "4.000 ± 1.000"
    assert table["other"][:2] == ("1.000 ± 1.000", "−3.000 [−5.000, −1.000]")  # after 4 s it has one sample
    assert table["other"][-1] == "2 of 2"
    assert table["slow"] == ("–", "–", "–", "–", "0 of 2")


def test_win_rates_are_by_the_held_out_reward(report):
    assert table_of(report, "Win rates by held-out reward")["best_of_n"] == ("", "100% [100%, 100%]")
    assert table_of(report, "Win rates by held-out reward")["other"] == ("0% [0%, 0%]", "")


def test_without_a_held_out_reward_the_report_says_so(tmp_path):
    found = build_report(load_results([write(tmp_path / "runs.jsonl", REWARDS, gold=False)]))
    assert "may be the reward model's mistakes" in found.tables[0].note
    assert table_of(found, "Scores")["other"][2:] == ("–", "–")
    assert table_of(found, "Win rates by reward")["other"][0] == "100% [100%, 100%]"
    assert len(found.plots) == 3


def test_a_judge_s_verdicts_are_shown_from_both_sides(tmp_path):
    results = load_results([write(tmp_path / "runs.jsonl", REWARDS)])
    judge = PairJudge(Judging(lambda first, second: f"Verdict: {'first' if first.startswith('other') else 'second'}"))
    table = table_of(build_report(results, judge=judge), "Win rates by the judge")
    assert table["other"][0] == "100% [100%, 100%] (0%; 0)"
    assert table["best_of_n"][1] == "0% [0%, 0%] (0%; 0)"


def test_only_prompts_that_all_methods_have_answered_are_compared(tmp_path):
    whole = write(tmp_path / "a.jsonl", {"best_of_n": REWARDS["best_of_n"]})
    half = write(tmp_path / "b.jsonl", {"other": REWARDS["other"]}, only=1)
    results = load_results([whole, half])
    assert results.prompts == ("0",)
    assert results.methods == ("best_of_n", "other")
    assert table_of(build_report(results), "Scores")["best_of_n"][0] == "3.000"
    none = write(tmp_path / "c.jsonl", {"third": REWARDS["other"]}, only=0)
    with pytest.raises(ValueError, match="no prompt has been answered by every method"):
        load_results([whole, none])


def test_files_that_cannot_be_compared_are_refused(tmp_path):
    first = write(tmp_path / "a.jsonl", REWARDS)
    with pytest.raises(ValueError, match="differ in gold"):
        load_results([first, write(tmp_path / "b.jsonl", {"third": REWARDS["other"]}, gold=False)])
    with pytest.raises(ValueError, match="holds other again"):
        load_results([first, write(tmp_path / "c.jsonl", {"other": REWARDS["other"]})])


def test_seeds_are_averaged_within_a_prompt(tmp_path):
    results = load_results([write(tmp_path / "runs.jsonl", REWARDS, seeds=(0, 1, 2))])
    assert results.numbers("other", "reward") == [5.0, 6.0]
    assert table_of(build_report(results), "Scores")["other"][0] == "5.500 ± 0.500"


def test_an_unknown_baseline_is_named_with_those_there_are(tmp_path):
    results = load_results([write(tmp_path / "runs.jsonl", REWARDS)])
    assert build_report(results, baseline="other").baseline == "other"
    with pytest.raises(ValueError, match="best_of_n, other"):
        build_report(results, baseline="greedy")


def test_the_page_needs_nothing_from_anywhere_and_runs_nothing(report):
    page = html(report)
    assert not re.search(r"https?:|\bsrc=|<script|<link|@import|url\(|\bon\w+=", page.replace(SPITE, ""))
    assert "&lt;script&gt;" in page
    assert "prefers-color-scheme: dark" in page
    assert page.count("<svg") == len(report.plots) == 6
    for colour in ("--c0", "--paper", "--ink"):
        assert page.count(f"{colour}:") == 2  # a light and a dark one


def test_the_page_is_well_formed(report):
    body = html(report).partition("<body>")[2].partition("</body>")[0]
    ElementTree.fromstring(f"<body>{body}</body>")


def test_markdown_has_every_table_and_every_row_as_many_cells(report):
    text = markdown(report)
    for table in report.tables:
        assert f"### {table.title}" in text
    for block in text.split("### ")[1:]:
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) == 1


def test_a_report_of_true_runs_agrees_with_them(comparison, tmp_path):
    runs = [news.run for news in evaluate(comparison(), tmp_path / "runs.jsonl") if news.run is not None]
    results = load_results([tmp_path / "runs.jsonl"])
    for arm in ARMS:
        own = [run for run in runs if run.method == arm.label]
        mean = sum(run.reward for run in own) / len(own)
        assert sum(results.numbers(arm.label, "reward")) / 3 == pytest.approx(mean)
        costs, values = results.curve(arm.label, "samples", "reward")
        assert costs == [float(number) for number in range(1, 9)]
        assert values[-1] == pytest.approx(mean)
        assert values == sorted(values)
    found = build_report(results)
    assert "<svg" in html(found)


def test_a_method_that_writes_one_answer_is_not_credited_with_what_it_passed_over(comparison, tmp_path):
    sampling = Sampling(max_tokens=4)
    arms = (Arm("args", ARGS(weight=1.0, candidates=3), sampling),)
    runs = [
        news.run
        for news in evaluate(comparison(arms=arms, seeds=(0,)), tmp_path / "runs.jsonl")
        if news.run is not None
    ]
    results = load_results([tmp_path / "runs.jsonl"])
    _, values = results.curve("args", "samples", "reward")
    assert values[-1] == pytest.approx(sum(run.reward for run in runs) / len(runs))


def test_equal_runs_give_the_same_page(comparison, tmp_path):
    for name in ("a", "b"):
        list(evaluate(comparison(seeds=(0,)), tmp_path / f"{name}.jsonl"))
    tables = [build_report(load_results([tmp_path / f"{name}.jsonl"])).tables[0] for name in ("a", "b")]
    assert tables[0] == tables[1]


def test_a_plot_has_a_line_per_series_and_places_points_by_their_numbers():
    svg = line_plot("T", "x", "y", [Series("a", [1, 2, 4], [0, 1, 2], 0), Series("b", [1, 4], [2, 2], 9)])
    root = ElementTree.fromstring(svg)
    lines = [group.find("polyline") for group in root.iter("g")]
    first, second = ([tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in lines)
    assert first[1][0] - first[0][0] == pytest.approx(first[2][0] - first[1][0], abs=0.2)  # a logarithmic axis
    assert first[0][1] > first[1][1] > first[2][1]  # upwards is less in SVG
    assert second[0][1] == second[1][1] == first[2][1]
    assert lines[1].get("stroke-dasharray") is not None
    assert [group.find("title").text for group in root.iter("g")] == ["a", "b"]


@pytest.mark.parametrize("ys", [[1.0, 1.0], [1e-9, 2e-9], [-5e6, 5e6], [float("nan"), 3.0]])
def test_a_plot_of_flat_tiny_huge_or_missing_values_can_be_drawn(ys):
    for log_x in (True, False):
        svg = line_plot("T", "x", "y", [Series("a", [1.0, 1e6], ys, 0)], log_x=log_x)
        assert "nan" not in svg
        ElementTree.fromstring(svg)


def test_a_plot_of_nothing_is_empty():
    assert line_plot("T", "x", "y", [Series("a", [], [], 0)]) == ""
