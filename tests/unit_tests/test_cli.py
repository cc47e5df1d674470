"""The command line: what it prints, what it refuses, and how it fails."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from langchain_aisp import __version__, cli

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--samples", "8", "--iterations", "2", "--max-tokens", "16")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the program and returns exit code, standard output and standard error, each without line breaks."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["langchain-aisp", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        output = capsys.readouterr()
        return int(exit_.value.code or 0), " ".join(output.out.split()), " ".join(output.err.split())

    return call


def test_the_version_is_the_package_s(run: Run) -> None:
    assert run("--version") == (0, f"langchain-aisp {__version__}", "")


def test_a_call_without_a_command_shows_the_commands(run: Run) -> None:
    _, out, err = run()
    assert "ask" in out + err
    assert "demo" in out + err


def test_ask_prints_an_answer_and_its_reward(run: Run) -> None:
    code, out, err = run("ask", "My parcel is late.", *SMALL)
    assert (code, err) == (0, "")
    assert "answer" in out
    assert "reward" in out
    assert " 8 " in out  # the samples


@pytest.mark.parametrize("method", list(cli.MethodName))
def test_every_method_spends_all_its_samples(method: cli.MethodName) -> None:
    built = cli.build_method(method, samples=24, iterations=3)
    assert built.iterations >= 1


def test_the_same_seed_prints_the_same_answer(run: Run) -> None:
    answers = [run("ask", "My parcel is late.", *SMALL, "--seed", "3")[1].split("method")[0] for _ in range(2)]
    assert answers[0] == answers[1]


def test_demo_compares_three_methods_and_tells_both_rewards(run: Run) -> None:
    code, out, err = run("demo", *SMALL, "--prompts", "2")
    assert (code, err) == (0, "")
    for word in ("customer 2 of 2", "one sample", "Best-of-N", "AISP", "gold", "mean of 2 customers"):
        assert word in out


def test_output_that_nobody_watches_holds_no_control_characters(run: Run) -> None:
    _, out, err = run("ask", "My parcel is late.", *SMALL)
    assert "\x1b" not in out + err
    assert "\r" not in out + err


def test_a_reward_of_the_user_s_own_module_is_found(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shortness.py").write_text("def reward(chat, responses):\n    return [-len(r) for r in responses]\n")
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("ask", "My parcel is late.", *SMALL, "--reward", "shortness:reward")
    assert code == 0
    assert "-" in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--reward", "no_such_module:reward"), "no_such_module"),
        (("--reward", "math:no_such_function"), "no_such_function"),
        (("--reward", "math:pi"), "must name a function"),
        (("--model", "some/model"), "needs --reward"),
        (("--samples", "0"), "--samples"),
        (("--method", "magic"), "magic"),
    ],
)
def test_a_wrong_option_is_named_without_a_traceback(run: Run, arguments: tuple[str, ...], complaint: str) -> None:
    code, out, err = run("ask", "Hello", *arguments)
    assert code == 2
    assert complaint in err
    assert "Traceback" not in out + err


def test_a_reward_that_raises_is_named_without_a_traceback(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_reward.py").write_text("def judge(chat, responses):\n    raise KeyError('no key')\n")
    monkeypatch.chdir(tmp_path)
    code, _, err = run("ask", "Hello", *SMALL, "--reward", "broken_reward:judge")
    assert code == 1
    assert "judge" in err
    assert "Traceback" not in err


def test_a_model_that_is_not_there_is_named_without_a_traceback(run: Run, tmp_path: Path) -> None:
    folder = str(tmp_path / "nothing")
    code, _, err = run("ask", "Hello", *SMALL, "--model", folder, "--reward", "demo")
    assert code == 1
    assert "nothing" in err
    assert "Traceback" not in err


def test_without_rich_or_typer_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"langchain-aisp\[cli\]"):
        importlib.reload(cli)


def test_a_sparkline_rises_from_the_lowest_bar_to_the_highest() -> None:
    assert cli.sparkline([0.0, 0.5, 1.0], low=0.0, high=1.0) == "▁▅█"
    assert cli.sparkline([2.0, 2.0], low=2.0, high=2.0) == "██"
