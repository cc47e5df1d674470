"""The command that fits a value network."""

import sys
from pathlib import Path

import pytest

from langchain_aisp import cli
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.methods import ValueNetwork


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["langchain-aisp", "fit-value", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_a_value_network_is_fitted_and_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "value.safetensors"
    small = "--limit 2 --samples-per-prompt 4 --max-tokens 12 --hidden 8 --epochs 2".split()
    assert call(monkeypatch, "--out", str(path), *small) == 0
    value, shown = ValueNetwork.load(path), " ".join(capsys.readouterr().out.split())
    assert value.width == TransformersEngine.shared("demo").head.width
    assert "8 answers to 2 prompts" in shown
    assert value.fingerprint in shown


def test_a_model_without_a_reward_is_an_error_of_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = call(monkeypatch, "--out", str(tmp_path / "value.safetensors"), "--model", "other")
    assert code != 0
    assert "needs --reward" in " ".join(capsys.readouterr().err.split())
