"""The commands ``eval`` and ``report`` of the command line."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table as RichTable
from transformers.utils.logging import disable_progress_bar

from langchain_aisp.align import Budget
from langchain_aisp.evaluation.arms import METHODS, parse_arms
from langchain_aisp.evaluation.coherence import load_embeddings
from langchain_aisp.evaluation.datasets import PromptRecord, demo_gold, load_prompts
from langchain_aisp.evaluation.judge import PairJudge
from langchain_aisp.evaluation.page import html as html_page
from langchain_aisp.evaluation.recipes import RECIPES, TEMPLATES, ModelRecipe, Recipe, find_recipe
from langchain_aisp.evaluation.report import Table, build_report, markdown
from langchain_aisp.evaluation.results import load_results
from langchain_aisp.evaluation.run import Evaluation, Progress, evaluate
from langchain_aisp.types import Reward, Sampling

_NONE, _DEMO = "none", "demo"


class GoldOf(StrEnum):
    """What the held-out reward judges."""

    SAMPLES = "samples"
    ANSWERS = "answers"


def register(app: typer.Typer) -> None:
    """Add the commands to an app."""
    app.command("eval")(evaluate_methods)
    app.command("report")(report_runs)


def evaluate_methods(
    out: Annotated[Path, typer.Option(help="Where runs are kept, one JSON line each; the same call goes on with it.")],
    recipe: Annotated[str | None, typer.Option(help=f"Start from one of {', '.join(RECIPES)}.")] = None,
    model: Annotated[str | None, typer.Option(help="Model id, folder, or 'demo', which is the default.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help=f"For models without one: {', '.join(TEMPLATES)}, or a file.")
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help="What is optimised: module:function, or a reward model's id or folder.")
    ] = None,
    gold: Annotated[
        str | None, typer.Option(help="Held-out reward, named alike; 'demo' for the demo's checker, 'none' for none.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help=f"Of {', '.join(METHODS)}; options as in aisp:population=4,temperature=0.4.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="demo:dev, demo:test, hh-rlhf[/SUBSET]:SPLIT, shp[/SUBSET]:SPLIT, or a file of JSON lines."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many prompts.")] = None,
    shuffle: Annotated[int | None, typer.Option(help="Seed of their order; without it they come as they are.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Responses that each search may decode.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest response, in tokens.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature where a method sets none.")] = 1.0,
    seeds: Annotated[str, typer.Option(help="Every prompt is answered once per seed, as in 0,1,2.")] = "0",
    seconds: Annotated[float | None, typer.Option(help="Wall-clock time after which a search ends.")] = None,
    base_logprobs: Annotated[
        bool, typer.Option("--base-logprobs", help="Also measure how likely the model finds each answer.")
    ] = False,
    gold_of: Annotated[GoldOf, typer.Option(help="Judge all samples, or the best answers only.")] = GoldOf.SAMPLES,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .bin weights of a recipe's reward models (weights only).")
    ] = False,
) -> None:
    """Compare methods: all of them answer the same prompts with the same seeds, and every sample is kept."""
    disable_progress_bar()  # transformers' own
    plan = find_recipe(recipe) if recipe else None
    spec = prompts or (plan.prompts if plan else "demo:dev")
    chosen = load_prompts(spec, limit=limit or (plan.limit if plan else None), shuffle=shuffle)
    talker = _model(plan, model, chat_template)
    sampling = Sampling(
        max_tokens=max_tokens or (plan.max_tokens if plan else 96), temperature=temperature, stop=talker.stop
    )
    rivals = methods or (plan.methods if plan else Recipe.methods)
    evaluation = Evaluation(
        engine=talker.load(),
        reward=_reward(plan, reward, model, allow_pickle),
        arms=parse_arms(rivals, samples or (plan.samples if plan else 64), sampling),
        prompts=chosen,
        gold=load_gold(gold, chosen, plan, allow_pickle=allow_pickle),
        seeds=read_seeds(seeds),
        budget=Budget(seconds=seconds),
        base_logprobs=base_logprobs,
        gold_of=gold_of.value,
        dataset=spec,
    )
    watch(evaluate(evaluation, out), evaluation.total)
    console = Console(highlight=False)
    for table in build_report(load_results([out])).tables[:2]:
        console.print(rich_table(table), "")
    console.print(f"[dim]all of it: langchain-aisp report {escape(str(out))} --html report.html[/]")


def report_runs(
    runs: Annotated[list[Path], typer.Argument(help="Files that eval wrote, of one model, reward and set of prompts.")],
    baseline: Annotated[str | None, typer.Option(help="The method that all are compared with.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page with plots.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the tables in Markdown.")] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(help="For coherence: a model of sentence-transformers, or pooler:MODEL for its pooler output."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="module:function that makes a LangChain chat model, which compares answers.")
    ] = None,
) -> None:
    """Show runs as tables and, if asked for, as a page."""
    disable_progress_bar()
    found = build_report(
        load_results(runs),
        baseline=baseline,
        embeddings=None if embeddings is None else load_embeddings(embeddings),
        judge=None if judge is None else PairJudge(_named(judge)()),
    )
    console = Console(highlight=False)
    for table in found.tables:
        console.print(rich_table(table), "")
    for path, written in ((html, html_page), (markdown_file, markdown)):
        if path is not None:
            path.write_text(written(found), encoding="utf-8")
            console.print(f"[dim]written: {escape(str(path))}[/]")


def watch(steps: Iterable[Progress], total: int) -> None:
    """Work through the steps, so many runs in all, behind a progress bar on standard error."""
    console = Console(stderr=True, highlight=False)
    with Bar(
        TextColumn("{task.description}"),
        BarColumn(complete_style="green", finished_style="green"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[best]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=total, best="")
        for news in steps:
            best = "" if news.iteration is None else f"best reward {news.iteration.best:.2f}"
            bar.update(task, completed=news.done, description=escape(news.method), best=best)


def rich_table(table: Table) -> RichTable:
    """A table for the terminal."""
    shown = RichTable(title=table.title, caption=escape(table.note), box=box.SIMPLE_HEAD, header_style="dim")
    shown.title_justify = shown.caption_justify = "left"
    for number, name in enumerate(table.header):
        shown.add_column(escape(name), justify="right" if number else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(escape, row))
    return shown


def _model(plan: Recipe | None, model: str | None, chat_template: str | None) -> ModelRecipe:
    """The model and how it is talked to."""
    given = plan.model if plan else ModelRecipe(_DEMO)
    template, stop = given.chat_template, given.stop
    if chat_template in TEMPLATES:
        template, stop = TEMPLATES[chat_template]
    elif chat_template is not None:
        template, stop = Path(chat_template).read_text(encoding="utf-8"), ()
    return ModelRecipe(model or given.path, template, stop)


def _reward(plan: Recipe | None, reward: str | None, model: str | None, allow_pickle: bool) -> Reward:
    """What is optimised."""
    if plan and not _is_ours(reward):
        return plan.reward.load(reward, allow_pickle=allow_pickle)
    return _loaded(reward, model or _DEMO)


def load_gold(
    gold: str | None, prompts: tuple[PromptRecord, ...], plan: Recipe | None = None, *, allow_pickle: bool = False
) -> Reward | None:
    """What judges unseen: for the demo's prompts its checker, unless another one is named."""
    is_demo = "facts" in prompts[0].metadata
    if gold == _NONE or (gold is None and plan is None and not is_demo):
        return None
    if gold == _DEMO or (gold is None and plan is None):
        return demo_gold(prompts)
    if plan and not _is_ours(gold):
        return plan.gold.load(gold, allow_pickle=allow_pickle)
    return _loaded(gold, _DEMO)


def _is_ours(spec: str | None) -> bool:
    """Whether a text names a function or the demo's reward, which a recipe's templates do not concern."""
    return spec is not None and (":" in spec or spec == _DEMO)


def _loaded(spec: str | None, model: str) -> Reward:
    from langchain_aisp.cli import load_reward  # it registers these commands, and so imports this module

    return load_reward(spec, model)


def read_seeds(text: str) -> tuple[int, ...]:
    """Seeds as on the command line, ``0,1,2``."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--seeds must be whole numbers with commas between them, got {text!r}") from error


def _named(spec: str) -> Any:
    """What ``module:name`` names; modules of the working directory are found too."""
    sys.path.insert(0, "")
    try:
        found = pkgutil.resolve_name(spec)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--judge {spec} cannot be imported: {error}; write module:function") from error
    if not callable(found):
        raise ValueError(f"--judge {spec} must name a function that makes a chat model, got {found!r}")
    return found
