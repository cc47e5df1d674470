"""What the docs and examples show is run as it stands, in this process, so that the demo's models are loaded once."""

import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from langchain_aisp import __version__, cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language, padded with empty lines so that an error names the document's own line."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text[: match.start(1)].count("\n") + match[1] for match in found]


def commands(program: str) -> list[str]:
    """Every command of the documents' shell blocks that calls the program."""
    lines = [
        line for path in DOCUMENTS for block in blocks(path.read_text("utf-8"), "bash") for line in block.split("\n")
    ]
    return [line.split(" #")[0] for line in lines if line.startswith(f"{program} ")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_the_code_in_a_document_runs_from_top_to_bottom(path: Path) -> None:
    namespace: dict[str, object] = {"__name__": path.stem}
    for block in blocks(path.read_text("utf-8"), "python"):
        exec(compile(block, str(path), "exec"), namespace)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs_and_prints_something(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 1


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) < 40


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_a_link_to_a_file_leads_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text("utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_every_file_of_the_readme_tree_exists() -> None:
    [tree] = re.findall(r"## Files\n\n```\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    folder = ROOT
    for line in tree.splitlines():
        parent = folder if line.startswith(" ") else ROOT
        path = parent / line.split()[0]
        assert path.exists(), f"README names {path.relative_to(ROOT)}"
        folder = path if not line.startswith(" ") else folder


def test_the_version_is_that_of_the_changelog() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    [newest, *_] = re.findall(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert project["version"] == newest
    assert __version__ in (newest, "0.0.0")  # the latter where the package is not installed


@pytest.mark.parametrize("line", commands("langchain-aisp"))
def test_a_command_line_of_the_docs_is_understood(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, arguments)  # raises for an unknown option or a value out of range


@pytest.mark.parametrize("line", commands("make"))
def test_a_make_target_of_the_docs_exists(line: str) -> None:
    target = line.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
