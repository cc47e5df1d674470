"""Draws the newest results as pictures for the docs: `python -m benchmarks.plots`. What has no result is left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from benchmarks.common import RESULTS
from benchmarks.pairs import PAIRS
from langchain_aisp.evaluation.plot import HEIGHT, WIDTH, Series, line_plot

FOLDER = Path(__file__).parents[1] / "docs" / "plots"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0468c", "#8a6d00", "#5b5f97")

Lines: TypeAlias = Mapping[str, Sequence[tuple[float, float]]]
"""Points by the names of the lines."""

Drawing: TypeAlias = Callable[[Mapping[str, Any]], Iterator[tuple[str, str]]]
"""From a result to names and pictures."""


def picture(title: str, x_label: str, y_label: str, lines: Lines, *, log_x: bool = True) -> str:
    """A line plot with its legend as an SVG file that needs no page: on white, so that a dark page shows it, too."""
    names = list(lines)
    series = [
        Series(name, [x for x, _ in lines[name]], [y for _, y in lines[name]], number)
        for number, name in enumerate(names)
    ]
    head, _, body = line_plot(title, x_label, y_label, series, log_x=log_x).partition("\n")
    head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"').replace(f" {HEIGHT}", f" {HEIGHT + 22}")
    room = (WIDTH - 56) / max(len(names), 1)
    legend = "".join(
        f'<text x="{56 + number * room:.0f}" y="{HEIGHT + 12}" style="fill:{COLOURS[number]}">■ {escape(name)}</text>'
        for number, name in enumerate(names)
    )
    return f"{head}\n<style>{_style()}</style>\n{_PAPER}\n{body.removesuffix('</svg>')}{legend}\n</svg>\n"


_PAPER = f'<rect width="{WIDTH}" height="{HEIGHT + 22}" fill="#fff"/>'


def _style() -> str:
    colours = (f".c{at} polyline{{stroke:{c}}} .c{at} circle{{fill:{c}}}" for at, c in enumerate(COLOURS))
    return (
        "text{font:11px system-ui,sans-serif;fill:#4a5058} .title{font-size:13px;font-weight:600} "
        ".line polyline{fill:none;stroke-width:2} .grid{stroke:#d9dce1} "
        f".tick,.label{{text-anchor:middle}} .end{{text-anchor:end}} {' '.join(colours)}"
    )


def concurrency(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What callers at once gain, by the rows of each."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for gain in found["gains"]:
        lines.setdefault(f"{gain['rows']} rows each", []).append((gain["callers"], gain["ratio"]["median"]))
    yield "concurrency", picture("Throughput at once / in turn", "callers", "times", lines)


def scaling(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """How cost grows with each size, and what a row costs beside others."""
    lines = {}
    for name, grown in found["growth"].items():
        seconds = [median(each) for each in zip(*grown["seconds"], strict=True)]
        sizes = grown["sizes"]
        lines[name] = [(size / sizes[0], cost / seconds[0]) for size, cost in zip(sizes, seconds, strict=True)]
        if name == _ROWS:
            tokens = found["fixed"][1]
            cost_of_row = [(n, 1e6 * cost / (n * tokens)) for n, cost in zip(sizes, seconds, strict=True)]
    yield "scaling", picture("Cost of a request", "size, smallest = 1", "seconds, smallest = 1", lines, log_x=False)
    title = "What a row's token costs among other rows"
    yield "rows", picture(title, "rows decoded at once", "microseconds", {"demo": cost_of_row})


_ROWS = "samples, all at once"


def frontier(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Reward over both distances from the model, and gold over one of them."""
    surprise = "nats less likely than a plain sample"
    for name, what, label, distance in (
        ("frontier_kl", "reward", "nats, steering and selection", "kl"),
        ("frontier_surprise", "reward", surprise, "surprise"),
        ("frontier_gold", "gold", surprise, "surprise"),
    ):
        lines: dict[str, list[tuple[float, float]]] = {}
        for point in found["points"]:
            if (far := point[distance]) is not None:
                place = far["mean"] if isinstance(far, Mapping) else far
                lines.setdefault(point["family"], []).append((place, point[what]["mean"]))
        ordered = {family: sorted(points) for family, points in lines.items()}
        yield name, picture(f"{what.capitalize()} over distance from the model", label, what, ordered, log_x=False)


def quality(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Reward and gold reward of the best answer so far, as the search goes on."""
    for what, key in (("reward", "best"), ("gold reward", "gold")):
        lines = {
            name: [(point["samples"], point[key]) for point in arm["curve"]]
            for name, arm in found["arms"].items()
            if name in _SEARCHES and len(arm["curve"]) > 1
        }
        title = f"{what.capitalize()} of the best answer, {found['pair']}"
        yield f"quality_{found['pair']}_{key}", picture(title, "samples", what, lines)


_SEARCHES = ("best_of_n", "aisp", "aisp at temperature 1", "published", "qalign", "misvo")


def overoptimisation(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Gold reward of the best answer so far, by what the search looked for."""
    lines = {arm["arm"]: [(point["samples"], point["gold"]["mean"]) for point in arm["curve"]] for arm in found["arms"]}
    yield "overoptimisation", picture("Gold reward of the best answer", "samples", "gold reward", lines)


DRAWINGS: Mapping[str, Drawing] = {
    "concurrency": concurrency,
    "scaling": scaling,
    "frontier": frontier,
    "overoptimisation": overoptimisation,
    **{f"quality-{pair}": quality for pair in PAIRS},
}


def draw(results: Path = RESULTS) -> dict[str, str]:
    """All pictures of the newest results, by their file's name."""
    pictures = {}
    for benchmark, drawing in DRAWINGS.items():
        if files := sorted(results.glob(f"*-{benchmark}.json")):
            pictures |= {f"{name}.svg": text for name, text in drawing(json.loads(files[-1].read_text("utf-8")))}
    return pictures


def main() -> None:
    """Write them."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in draw().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)


if __name__ == "__main__":
    main()
