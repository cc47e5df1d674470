"""The layers import downwards only; the sides of the search never import each other."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "langchain_aisp"
LIBRARIES = {"langchain", "langchain_core", "pydantic", "rich", "tokenizers", "transformers", "typer"}  # torch is free
RECORDS = {".types", ".noise", ".sampling", ".templating", ".futures"}
ALLOWED = {  # part of the package -> the parts (with a dot) and the libraries it may import
    "demo": {".demo"},
    "types": set(),
    "noise": RECORDS,
    "sampling": RECORDS,
    "templating": {".types", "transformers"},  # transformers for type checkers only
    "methods": RECORDS | {".methods"},
    "engine": RECORDS | {".engine", ".demo", "tokenizers", "transformers"},  # .demo: where the model "demo" lies
    "tools": {".types", ".tools"},
    "futures": {".types"},
    "ahead": RECORDS,
    "rewards": RECORDS | {".rewards", ".tools", ".ahead", "transformers"},
    "align": RECORDS | {".ahead"},
}


def imported(path: Path) -> set[str]:
    """What a module imports anywhere in it: ".part" for parts of the package, plain names for libraries."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the package imports its own modules by their full name"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {"." + name.split(".")[1] if name.startswith("langchain_aisp.") else name.split(".")[0] for name in names}


def modules_of(part: str) -> list[Path]:
    return sorted((PACKAGE / part).rglob("*.py")) or [PACKAGE / f"{part}.py"]


@pytest.mark.parametrize("part", ALLOWED)
def test_a_layer_imports_only_what_lies_below_it(part: str) -> None:
    for path in modules_of(part):
        watched = {name for name in imported(path) if name.startswith(".") or name in LIBRARIES}
        assert watched <= ALLOWED[part], f"{path.relative_to(PACKAGE)} imports {sorted(watched - ALLOWED[part])}"
