"""The commands ``eval`` and ``report`` on the demo, offline."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from langchain_aisp import cli
from langchain_aisp.evaluation.log import read_log

SMALL = ("--prompts", "demo:dev", "--limit", "2", "--samples", "8", "--max-tokens", "12")


def call(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """What one call of ``eval`` has written."""
    out = tmp_path_factory.mktemp("runs") / "runs.jsonl"
    methods = "best_of_n,aisp:iterations=2,published"
    result = call("eval", "--model", "demo", "--reward", "demo", "--methods", methods, *SMALL, "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "held-out" in result.output
    return out


def test_eval_keeps_every_sample_and_takes_the_demo_s_checker_as_held_out(runs):
    config, lines = read_log(runs)
    assert config["gold"]["name"] == "demo gold"
    assert list(config["methods"]) == ["best_of_n", "aisp:iterations=2", "published"]
    kept = [line for line in lines if line["kind"] == "run"]
    assert len(kept) == 6
    assert all(len(run["samples"]) == 8 and 0 <= run["gold"] <= 6 for run in kept)


def test_the_same_call_again_does_nothing_and_another_is_refused(runs):
    before = runs.read_bytes()
    again = ("eval", "--methods", "best_of_n,aisp:iterations=2,published", "--out", str(runs))
    assert call(*again, *SMALL).exit_code == 0
    assert runs.read_bytes() == before
    other = call(*again, *SMALL[:-1], "13")
    assert isinstance(other.exception, ValueError)
    assert "another configuration" in str(other.exception)
    assert runs.read_bytes() == before


def test_report_prints_tables_and_writes_a_page_and_markdown(runs, tmp_path):
    page, text = tmp_path / "report.html", tmp_path / "report.md"
    result = call("report", str(runs), "--html", str(page), "--markdown", str(text), "--baseline", "published")
    assert result.exit_code == 0, result.output
    for title in ("Scores", "Costs", "At equal seconds", "To reach published", "Win rates", "Texts", "Distance"):
        assert title in result.output
    assert page.read_text("utf-8").count("<svg") == 6
    assert "### Scores" in text.read_text("utf-8")


def test_report_asks_a_judge_that_a_function_makes(runs, tmp_path, monkeypatch):
    (tmp_path / "judges.py").write_text(
        "class Judge:\n    def batch(self, prompts, config=None):\n        return ['Verdict: first'] * len(prompts)\n"
    )
    monkeypatch.chdir(tmp_path)
    result = call("report", str(runs), "--judge", "judges:Judge")
    assert result.exit_code == 0, result.output
    assert "Win rates by the judge" in result.output
    for wrong in ("judges:Nobody", "nowhere:Judge", "judges:__name__"):
        assert "--judge" in str(call("report", str(runs), "--judge", wrong).exception)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("eval", "--methods", "magic"), "best_of_n"),
        (("eval", "--recipe", "magic"), "llama3-8b-ultrarm"),
        (("eval", "--prompts", "nowhere.jsonl"), "demo:SPLIT"),
        (("eval", "--seeds", "a"), "--seeds"),
        (("report",), "langchain-aisp eval --out nothing.jsonl makes such a file"),
    ],
)
def test_a_wrong_option_is_named(tmp_path, arguments, complaint):
    path = str(tmp_path / "nothing.jsonl")
    result = call(*arguments, *(("--out", path) if arguments[0] == "eval" else (path,)))
    assert complaint in str(result.exception)
    assert not Path(path).exists()
