"""Pairs of answers: which are chosen, where they come from, and that a killed export ends with the same file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from langchain_aisp import __version__, cli
from langchain_aisp.evaluation.arms import Arm
from langchain_aisp.evaluation.datasets import PromptRecord
from langchain_aisp.evaluation.run import Evaluation, evaluate
from langchain_aisp.methods import AISP, BestOfN
from langchain_aisp.preferences import Choice, Export, convert_log, export_preferences
from langchain_aisp.types import Problem, Response, Sampling
from tests.toy import ToyEngine, ToyReward

SAMPLING = Sampling(max_tokens=6)
ARM = Arm("best_of_n", BestOfN(samples=8), SAMPLING)
PROMPTS = tuple(
    PromptRecord(f"toy/{number}", ({"role": "user", "content": f"Go on, {number}."},)) for number in range(4)
)
TWO = Choice(pairs_per_prompt=2)


def judge(response: Response) -> float:
    """A reward by which hardly any two texts are equal."""
    return float(sum(map(ord, response.text)) % 97)


def export(choice: Choice = TWO, **parts: object) -> Export:
    usual = {"engine": ToyEngine(end_bias=2), "reward": ToyReward(judge), "arms": (ARM,), "prompts": PROMPTS}
    return Export(Evaluation(**{**usual, **parts}), choice)


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write(exported: Export, path: Path) -> list[dict[str, Any]]:
    list(export_preferences(exported, path))
    return rows_in(path)


def samples(*rewards: float, **fields: object) -> list[dict[str, Any]]:
    return [
        {"text": f"text {row}", "reward": reward, "finish_reason": "stop", "iteration": 0, "row": row, **fields}
        for row, reward in enumerate(rewards)
    ]


def chosen_from(choice: Choice, rewards: list[float]) -> list[tuple[float, float]]:
    return [(good["reward"], bad["reward"]) for good, bad in choice.pairs(samples(*rewards))]


# -- which responses become pairs -------------------------------------------------------------------------------------


def test_the_best_and_the_worst_make_the_first_pair_and_further_ones_go_inwards() -> None:
    assert chosen_from(Choice(pairs_per_prompt=5), [3, 1, 4, 2, 5]) == [(5, 1), (4, 2)]


def test_a_pair_is_at_least_the_margin_apart() -> None:
    assert chosen_from(Choice(pairs_per_prompt=5, margin=3), [3, 1, 4, 2, 5]) == [(5, 1)]
    assert chosen_from(Choice(margin=4.5), [3, 1, 4, 2, 5]) == []


def test_quantiles_say_where_in_the_ranking_the_two_sides_begin() -> None:
    choice = Choice(pairs_per_prompt=3, chosen_quantile=0.75, rejected_quantile=0.25)
    assert chosen_from(choice, [1, 2, 3, 4, 5]) == [(4, 2)]


def test_responses_that_were_cut_off_or_came_before_make_no_pair() -> None:
    assert Choice().pairs([*samples(1, 2), *samples(9, finish_reason="length")]) == [
        (samples(1, 2)[1], samples(1, 2)[0])
    ]
    assert Choice().pairs(samples(1, 2, text="the same")) == []


@given(st.lists(st.integers(-3, 3), max_size=12), st.integers(1, 6), st.integers(0, 4))
def test_whatever_the_rewards_a_chosen_one_is_better_and_no_response_is_used_twice(
    rewards: list[int], pairs: int, margin: int
) -> None:
    found = Choice(pairs, margin).pairs(samples(*rewards))
    used = [side["text"] for pair in found for side in pair]
    assert len(used) == len(set(used))
    assert len(found) <= pairs
    assert all(good["reward"] - bad["reward"] >= max(margin, 1) for good, bad in found)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"pairs_per_prompt": 0}, "pairs_per_prompt must be at least 1"),
        ({"margin": -1}, "margin must not be negative"),
        ({"chosen_quantile": 0.2, "rejected_quantile": 0.3}, "above the rejected one's"),
    ],
)
def test_a_choice_that_makes_no_pair_is_refused(settings: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Choice(**settings)


# -- the file ---------------------------------------------------------------------------------------------------------


def test_a_pair_has_the_form_that_trl_reads_and_tells_where_it_comes_from(tmp_path: Path) -> None:
    first, *_ = rows = write(export(), tmp_path / "pairs.jsonl")
    assert first["prompt"] == [{"role": "user", "content": "Go on, 0."}]
    for side in ("chosen", "rejected"):
        [message] = first[side]
        assert message.keys() == {"role", "content"}
        assert first[f"{side}_reward"] == judge(Response(message["content"]))
    assert first["chosen_reward"] > first["rejected_reward"]
    told = ("prompt_id", "seed", "model", "reward", "reward_fingerprint", "version")
    assert [first[name] for name in told] == ["toy/0", 0, "toy", "toy", "toy", __version__]
    assert repr(ARM.method) in first["method"]
    assert len({tuple(row) for row in rows}) == 1, "all lines have the same columns"


def test_the_sample_that_a_pair_names_is_the_one_it_shows(tmp_path: Path) -> None:
    asked = export()
    for row in write(asked, tmp_path / "pairs.jsonl"):
        prompt = asked.evaluation.engine.encode(row["prompt"], seed=row["seed"])
        method = ARM.method
        state = method.init(Problem(prompt, SAMPLING, ToyEngine().head))
        said = asked.evaluation.engine.decode(method.propose(state)).responses
        for side in ("chosen", "rejected"):
            assert said[row[f"{side}_sample"][1]].text == row[side][0]["content"]


@pytest.mark.parametrize("kept_share", [0.0, 0.3, 0.55, 0.8, 0.99, 1.0])
def test_an_export_killed_at_any_moment_ends_with_the_same_file(tmp_path: Path, kept_share: float) -> None:
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    write(export(), whole)
    content = whole.read_bytes()
    killed.write_bytes(content[: int(len(content) * kept_share)])
    write(export(), killed)
    assert killed.read_bytes() == content


def test_searches_that_are_done_are_not_run_again(tmp_path: Path) -> None:
    write(export(), tmp_path / "pairs.jsonl")
    engine = ToyEngine(end_bias=2)
    write(export(engine=engine), tmp_path / "pairs.jsonl")
    assert engine.waves == []


@pytest.mark.parametrize(
    "other",
    [
        export(choice=Choice(margin=1)),
        export(seeds=(0, 1)),
        export(prompts=PROMPTS[:2]),
        replace(export(), adapter="lora"),
        export(arms=(Arm("aisp", AISP(samples=8, iterations=2), SAMPLING),)),
    ],
    ids=["choice", "seeds", "prompts", "adapter", "method"],
)
def test_a_file_never_mixes_exports(tmp_path: Path, other: Export) -> None:
    path = tmp_path / "pairs.jsonl"
    write(export(), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="begun with another export"):
        write(other, path)
    assert path.read_bytes() == before


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"note": "mine"}\n')
    with pytest.raises(ValueError, match="is no file of pairs"):
        write(export(), path)
    assert path.read_text() == '{"note": "mine"}\n'


# -- a log of runs ----------------------------------------------------------------------------------------------------


def test_a_log_gives_the_same_pairs_without_sampling(tmp_path: Path) -> None:
    asked = export()
    list(evaluate(asked.evaluation, tmp_path / "runs.jsonl"))
    count = convert_log(tmp_path / "runs.jsonl", tmp_path / "converted.jsonl", asked.choice)
    converted, sampled = rows_in(tmp_path / "converted.jsonl"), write(asked, tmp_path / "sampled.jsonl")
    assert count == len(converted) == len(sampled) > 4
    hashes = {row.pop("export") for row in converted} | {row.pop("export") for row in sampled}
    assert len(hashes) == 2, "a log pins less than an export"
    assert converted == sampled


def test_a_pair_that_two_methods_found_is_written_once(tmp_path: Path) -> None:
    twice = (ARM, Arm("again", BestOfN(samples=8, samples_per_wave=4), SAMPLING))
    list(evaluate(export(arms=twice).evaluation, tmp_path / "runs.jsonl"))
    count = convert_log(tmp_path / "runs.jsonl", tmp_path / "pairs.jsonl")
    assert count == len(PROMPTS)


def test_a_conversion_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        convert_log(tmp_path / "runs.jsonl", tmp_path / "pairs.jsonl")


# -- the command ------------------------------------------------------------------------------------------------------


def call(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["export-preferences", *map(str, arguments)])


def test_the_command_samples_the_demo_and_datasets_reads_what_it_wrote(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    out = tmp_path / "pairs.jsonl"
    result = call("--out", out, "--limit", 2, "--samples", 6, "--max-tokens", 48)
    assert result.exit_code == 0, result.output
    assert "pairs" in result.output
    rows = datasets.Dataset.from_list(rows_in(out))
    assert {"prompt", "chosen", "rejected", "chosen_gold"} <= set(rows.column_names)


def test_options_that_a_log_would_ignore_are_refused(tmp_path: Path) -> None:
    result = call("--out", tmp_path / "pairs.jsonl", "--log", "runs.jsonl", "--samples", 6, "--model", "demo")
    assert isinstance(result.exception, ValueError)
    assert "--model, --samples would do nothing" in str(result.exception)
