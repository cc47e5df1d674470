"""The table of docs/performance.md: why models do not share their prompt, in the engine's own words."""

import logging
import re
from pathlib import Path

from langchain_aisp.engine.choice import choose_cache
from tests.architectures import ARCHITECTURES, build

DOCUMENT = Path(__file__).parents[2] / "docs" / "performance.md"
BETWEEN = re.compile(r"<!-- caches:begin -->\n(.*?)<!-- caches:end -->", re.DOTALL)


class Notes(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def reasons(notes: Notes) -> dict[str, list[str]]:
    """Titles of architectures by the engine's reason against ``slots``, the examples' details left out."""
    found: dict[str, list[str]] = {}
    for one in ARCHITECTURES:
        if one.cache == "slots":
            continue
        notes.messages.clear()
        cache = choose_cache(build(one))
        [message] = [message for message in notes.messages if " cannot use slots: " in message]
        reason = re.sub(r"\b\d+ of its \d+ layers", "not all layers", message.split("slots: ")[1].split(": ")[0])
        found.setdefault(reason, []).append(one.title + ("" if cache.name == "expanded" else f" ({cache.name})"))
    return found


def table(found: dict[str, list[str]]) -> str:
    """As Markdown, the commonest reason first."""
    shared = sum(one.cache == "slots" for one in ARCHITECTURES)
    rows = [f"| {reason} | {', '.join(titles)} |" for reason, titles in sorted(found.items(), key=lambda x: -len(x[1]))]
    head = [f"{shared} of {len(ARCHITECTURES)} architectures share their prompt (`slots`). The others take `expanded`,"]
    head += ["or none where it says so:", "", "| Why not `slots` | Architectures |", "|---|---|"]
    return "\n".join([*head, *rows, ""])


def test_the_table_says_why_models_do_not_share_their_prompt() -> None:
    notes, logger = Notes(), logging.getLogger("langchain_aisp")
    before = logger.level
    logger.addHandler(notes)
    logger.setLevel(logging.INFO)
    try:
        expected = table(reasons(notes))
    finally:
        logger.removeHandler(notes)
        logger.setLevel(before)
    [written] = BETWEEN.findall(DOCUMENT.read_text("utf-8"))
    assert written == expected, f"docs/performance.md should have, between its marks:\n{expected}"
