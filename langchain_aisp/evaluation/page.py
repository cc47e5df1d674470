"""A report as one HTML file that needs nothing else: no script, no font, no picture from anywhere; light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from langchain_aisp.evaluation.plot import COLOURS
from langchain_aisp.evaluation.report import Report, Table
from langchain_aisp.evaluation.results import Results, prompt_text

_EXAMPLES = 12
_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b0468c", "#8a6d00", "#2f8fd0", "#444444", "#b3202c")
_DARK = ("#5db3f0", "#ff9a4d", "#3fd6a6", "#f29ccf", "#f0d84a", "#9ad4ff", "#cccccc", "#ff7a80")
_STYLE = """\
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c1e21; --faint: #5f6670; --rule: #d9dce1; --panel: #f5f6f8;
LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171a; --ink: #e8eaed; --faint: #a0a7b1; --rule: #363b42; --panel: #1f2226;
DARK }
}
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 75rem; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 0.3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 0.4rem; }
p.note, dd, dt { color: var(--faint); font-size: 0.88rem; margin: 0.3rem 0; max-width: 60rem; }
dt { font-weight: 600; } dd { overflow-wrap: anywhere; white-space: pre-wrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { border-bottom: 1px solid var(--rule); padding: 0.3rem 0.9rem 0.3rem 0; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--faint); font-weight: 600; }
tr.baseline td { background: var(--panel); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem; }
svg { background: var(--panel); border-radius: 6px; width: 100%; height: auto; }
svg text { fill: var(--faint); font: 11px system-ui, sans-serif; }
svg text.title { fill: var(--ink); font-size: 13px; font-weight: 600; }
svg text.tick, svg text.label { text-anchor: middle; } svg text.end { text-anchor: end; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .line polyline { fill: none; stroke-width: 2; }
ul.legend { display: flex; flex-wrap: wrap; gap: 0.3rem 1.4rem; list-style: none; padding: 0; margin: 0.6rem 0; }
ul.legend i { border-radius: 3px; display: inline-block; height: 0.8rem; margin-right: 0.45rem; width: 0.8rem; }
details { border-top: 1px solid var(--rule); padding: 0.5rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
blockquote { background: var(--panel); border-radius: 6px; margin: 0.5rem 0; padding: 0.5rem 0.9rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
blockquote b { color: var(--faint); display: block; font-size: 0.85rem; white-space: normal; }
"""


def html(report: Report) -> str:
    """The whole page; every text of models and data sets is escaped."""
    results = report.results
    title = f"{results.config['model']}: {len(results.methods)} methods on {results.config['prompts']['name']}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{escape(_summary(results))}</p>',
        *(_table(table, report.baseline) for table in report.tables[:1]),
        "<h2>Curves</h2>",
        _legend(results.methods),
        f'<div class="plots">{"".join(report.plots)}</div>',
        *(_table(table, report.baseline) for table in report.tables[1:]),
        "<h2>Answers</h2>",
        *_examples(results),
        "<h2>Settings</h2>",
        _settings(results),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    opening = f'<!doctype html>\n<html lang="en"><head>{head}<style>{_style()}</style></head>\n<body>'
    return "\n".join([opening, *body, "</body></html>\n"])


def _summary(results: Results) -> str:
    optimised = f"Optimised: {results.config['reward']['name']}."
    held_out = results.config["gold"]["name"] if results.has_gold else "none, so a gain may be the reward's mistakes"
    return f"{optimised} Held out: {held_out}. Made with langchain-aisp {results.config['version']}."


def _style() -> str:
    return _STYLE.replace("LIGHT", _colours(_LIGHT)).replace("DARK", _colours(_DARK)) + _classes()


def _colours(palette: Sequence[str]) -> str:
    return " ".join(f"--c{number}: {colour};" for number, colour in enumerate(palette))


def _classes() -> str:
    """Each series' colour for its line, its points and its mark in the legend."""
    rules = (
        f"svg .c{n} polyline {{ stroke: var(--c{n}); }} svg .c{n} circle, i.c{n} {{ fill: var(--c{n}); "
        f"background: var(--c{n}); }}"
        for n in range(COLOURS)
    )
    return "\n".join(rules)


def _table(table: Table, baseline: str) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "".join(_row(row, row[0] == baseline) for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    body = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<h2>{escape(table.title)}</h2>\n{body}\n{note}"


def _row(cells: Iterable[str], is_baseline: bool) -> str:
    mark = ' class="baseline"' if is_baseline else ""
    return f"<tr{mark}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _legend(methods: Sequence[str]) -> str:
    """The methods' colours; those of the second round are dashed in the plots."""
    marks = (
        f'<li><i class="c{number % COLOURS}"></i>{escape(name)}{" (dashed)" * (number >= COLOURS)}</li>'
        for number, name in enumerate(methods)
    )
    return f'<ul class="legend">{"".join(marks)}</ul>'


def _examples(results: Results) -> Iterable[str]:
    """The first prompts and every method's answer with the first seed."""
    seed = results.config["seeds"][0]
    for prompt in results.prompts[:_EXAMPLES]:
        runs = {name: results.answers[name, prompt, seed].run for name in results.methods}
        asked = runs[results.methods[0]]
        quotes = [_quote(f"{turn['role']}", str(turn["content"])) for turn in asked["messages"]]
        if asked["reference"] is not None:
            quotes.append(_quote("reference", asked["reference"]))
        quotes += [_quote(f"{name} · {_judged(run)}", run["text"]) for name, run in runs.items()]
        yield f"<details><summary>{escape(prompt_text(asked['messages'])[:160])}</summary>{''.join(quotes)}</details>"


def _judged(run: dict[str, Any]) -> str:
    gold = "" if run["gold"] is None else f", held out {run['gold']:.3f}"
    return f"reward {run['reward']:.3f}{gold}"


def _quote(who: str, text: str) -> str:
    return f"<blockquote><b>{escape(who)}</b>{escape(text)}</blockquote>"


def _settings(results: Results) -> str:
    environments = {f"environment {number}": each for number, each in enumerate(results.environments, start=1)}
    told = {**results.config, **environments}
    items = (f"<dt>{escape(name)}</dt><dd>{escape(_told(value))}</dd>" for name, value in told.items())
    return f"<details><summary>What pins these numbers</summary><dl>{''.join(items)}</dl></details>"


def _told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)
