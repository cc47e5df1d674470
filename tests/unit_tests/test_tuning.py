"""Tuning: the same prompts for all settings, bad ones stopped, a killed study that goes on as if nothing had been."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from langchain_aisp import AISPChatModel, cli, methods
from langchain_aisp.evaluation.arms import parse_arms
from langchain_aisp.evaluation.datasets import PromptRecord
from langchain_aisp.tuning import SPACES, News, Options, Range, Tuned, Tuning, constructor, search_space, summary, tune
from langchain_aisp.types import Sampling
from tests.toy import ToyEngine, ToyReward, spells

pytest.importorskip("optuna")

PROMPTS = tuple(
    PromptRecord(f"toy/{number}", ({"role": "user", "content": f"Go on, {number}."},)) for number in range(6)
)
SAMPLING = Sampling(max_tokens=6)


def tuning(method: str = "best_of_n", only: str | None = None, **parts: Any) -> Tuning:
    usual = {
        "engine": ToyEngine(),
        "reward": ToyReward(spells("abcdef")),
        "prompts": PROMPTS,
        "samples": 8,
        "sampling": SAMPLING,
        "trials": 5,
    }
    return Tuning(method=method, space=search_space(method, only), **{**usual, **parts})


def finish(asked: Tuning, path: Path) -> tuple[list[News], Tuned]:
    *news, found = tune(asked, path)
    assert isinstance(found, Tuned)
    return [each for each in news if isinstance(each, News)], found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[News], Tuned]:
    """A study that nothing interrupted."""
    return finish(tuning(), tmp_path_factory.mktemp("study") / "study.db")


# -- what is tuned ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SPACES)
def test_every_end_of_every_range_is_a_method_with_the_same_samples(method: str) -> None:
    for end in ("low", "high"):
        options = {}
        for name, setting in SPACES[method].items():
            value = setting.values[0] if isinstance(setting, Options) else getattr(setting, end)
            options[name] = setting.written(int(min(value, 8)) if getattr(setting, "whole", False) else value)
        arm = tuning(method).arm(options)
        assert arm.samples == (None if method == "args" else 8)


def test_what_the_method_s_options_fix_is_not_tuned() -> None:
    assert "sigma" not in search_space("published:sigma=0.5")
    assert tuning("published:sigma=0.5").arm({"alpha": "0.95"}).method.sigma == 0.5


def test_named_settings_are_tuned_alone_and_between_their_bounds() -> None:
    space = search_space("published", "sigma=0.1:2, decode")
    assert list(space) == ["sigma", "decode"]
    assert space["sigma"] == Range(0.1, 2, log=True)


@pytest.mark.parametrize(
    ("method", "only", "complaint"),
    [
        ("magic", None, "'magic' cannot be tuned; choose one of aisp, best_of_n"),
        ("aisp", "sigma", "'sigma' cannot be tuned of aisp; possible are iterations"),
        ("aisp", "cooling=low", "must be two numbers"),
        ("aisp", "cooling=1:0", "are no range"),
        ("published", "sigma=0:1", "are no range"),
        ("published", "decode=0:1", "has no bounds"),
        ("best_of_n:temperature=1,top_p=1", None, "fixes everything"),
    ],
)
def test_what_cannot_be_tuned_is_refused_with_what_can(method: str, only: str | None, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        search_space(method, only)


def test_two_methods_at_a_time_are_refused() -> None:
    with pytest.raises(ValueError, match="one method is tuned at a time"):
        Tuning(ToyEngine(), ToyReward(spells("a")), "aisp,best_of_n", PROMPTS, SPACES["aisp"])


# -- the study --------------------------------------------------------------------------------------------------------


def test_the_default_comes_first_and_the_best_setting_last(finished: tuple[list[News], Tuned]) -> None:
    news, found = finished
    assert [each.answered for each in news if each.trial == 0] == [1, 2, 3, 4, 5, 6]
    assert {each.trial for each in news} == set(range(6))
    means = [sum(tried.rewards) for tried in found.tried]
    assert means == sorted(means, reverse=True)
    assert found.default in found.tried
    assert found.best.gain(found.default).mean >= 0
    assert found.stopped + len(found.tried) == 6


def test_all_settings_answer_the_same_prompts_with_the_same_samples(tmp_path: Path) -> None:
    engine = ToyEngine()
    _, found = finish(tuning("aisp", engine=engine, trials=2), tmp_path / "study.db")
    asked = [wave.prompt.key for wave in engine.waves]
    assert len(set(asked)) == len(PROMPTS)
    assert sum(map(len, engine.waves)) == 8 * sum(len(tried.rewards) for tried in found.tried)


def test_a_temperature_that_is_clearly_better_is_found(tmp_path: Path) -> None:
    """At low temperatures the toy model ends soon, and long answers are wanted."""
    wordy = ToyReward(lambda response: float(len(response.text)))
    asked = tuning(only="temperature=0.01:3", reward=wordy, engine=ToyEngine(end_bias=3), trials=8)
    _, found = finish(asked, tmp_path / "study.db")
    assert found.best.arm.method.temperature > 1
    assert found.best.gain(found.default).mean > 0.5


def test_a_bad_setting_is_stopped_before_it_has_answered_all_prompts(tmp_path: Path) -> None:
    wordy = ToyReward(lambda response: float(len(response.text)))
    asked = tuning(only="temperature=0.01:3", reward=wordy, engine=ToyEngine(end_bias=3), trials=12)
    news, found = finish(asked, tmp_path / "study.db")
    stopped = [each for each in news if each.stopped]
    assert found.stopped == len(stopped) >= 1
    assert all(2 <= each.answered < len(PROMPTS) for each in stopped)


@pytest.mark.parametrize("moment", [3, 9, 20])
def test_a_killed_study_goes_on_as_if_nothing_had_been(
    tmp_path: Path, finished: tuple[list[News], Tuned], moment: int
) -> None:
    path = tmp_path / "study.db"
    steps = tune(tuning(), path)
    for _ in range(moment):
        next(steps)
    steps.close()
    assert finish(tuning(), path)[1] == finished[1]


def test_more_trials_go_on_with_the_study(tmp_path: Path, finished: tuple[list[News], Tuned]) -> None:
    finish(tuning(trials=2), tmp_path / "study.db")
    news, found = finish(tuning(trials=5), tmp_path / "study.db")
    assert {each.trial for each in news} == {3, 4, 5}
    assert found == finished[1]


def test_a_file_never_mixes_studies(tmp_path: Path) -> None:
    finish(tuning(trials=1), tmp_path / "study.db")
    with pytest.raises(ValueError, match="samples was 8 and is 9"):
        finish(tuning(trials=1, samples=9), tmp_path / "study.db")


def test_a_held_out_reward_is_told_and_changes_nothing(tmp_path: Path, finished: tuple[list[News], Tuned]) -> None:
    contrary = ToyReward(lambda response: -spells("abcdef")(response))
    _, found = finish(tuning(gold=contrary), tmp_path / "study.db")
    assert [tried.rewards for tried in found.tried] == [tried.rewards for tried in finished[1].tried]
    assert found.best.golds == tuple(-reward for reward in found.best.rewards)


def test_the_best_setting_is_confirmed_on_prompts_that_chose_nothing(tmp_path: Path) -> None:
    unseen = (PromptRecord("new/0", ({"role": "user", "content": "And you?"},)),)
    _, found = finish(tuning(confirm=unseen, trials=2), tmp_path / "study.db")
    default, best = found.confirmed
    assert (default.arm, best.arm) == (found.default.arm, found.best.arm)
    assert len(default.rewards) == len(best.rewards) == 1


def test_without_optuna_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"langchain-aisp\[tune\]"):
        finish(tuning(), tmp_path / "study.db")


# -- what is told -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    ["aisp:population=3,cooling=0.5,temperature=0.7", "best_of_n:top_p=0.9", "published:sigma=0.31,decode=sample"],
)
def test_the_line_to_paste_makes_the_method_that_was_tuned(spec: str) -> None:
    [arm] = parse_arms(spec, 64, SAMPLING)
    chat = eval(constructor(arm, "demo"), {"AISPChatModel": AISPChatModel, **vars(methods)})
    assert chat.method == arm.method
    assert (chat.max_tokens, chat.temperature) == (6, arm.sampling.temperature)


def test_the_summary_is_json_with_a_paired_interval(finished: tuple[list[News], Tuned]) -> None:
    told = json.loads(json.dumps(summary(finished[1], tuning()), allow_nan=False))
    assert told["best"]["gain"]["low"] <= told["best"]["gain"]["mean"] <= told["best"]["gain"]["high"]
    assert told["default"]["gain"]["mean"] == 0
    assert told["best"]["code"].startswith("AISPChatModel(model='toy', method=BestOfN(samples=8")


def test_the_command_tunes_the_demo_and_shows_the_line_to_paste(tmp_path: Path) -> None:
    out = tmp_path / "tuned.json"
    small = ("--limit", "2", "--samples", "4", "--max-tokens", "8", "--trials", "1", "--confirm", "demo:train")
    result = CliRunner().invoke(cli.app, ["tune", "--method", "aisp", "--out", str(out), *small])
    assert result.exit_code == 0, result.output
    assert "method=AISP(samples=4" in result.output.replace("\n", "")
    assert "held-out" in result.output
    told = json.loads(out.read_text("utf-8"))
    assert told["default"]["gold"] is not None
    assert told["confirmed"]["prompts"]["count"] == 2
