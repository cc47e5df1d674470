"""The command ``tune`` of the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils.logging import disable_progress_bar

from langchain_aisp.engine import TransformersEngine
from langchain_aisp.evaluation.commands import load_gold, read_seeds, rich_table
from langchain_aisp.evaluation.datasets import load_prompts
from langchain_aisp.evaluation.metrics import Estimate, estimate
from langchain_aisp.evaluation.report import NOTHING, Table
from langchain_aisp.tuning import (
    SPACES,
    News,
    Tried,
    Tuned,
    Tuning,
    constructor,
    import_optuna,
    search_space,
    summary,
    tune,
)
from langchain_aisp.types import Sampling

_SHOWN = 5  # settings of the table


def register(app: typer.Typer) -> None:
    """Add the command to an app."""
    app.command("tune")(tune_method)


def tune_method(
    out: Annotated[Path, typer.Option(help="Where the result is written (JSON); the study lies beside it, in .db.")],
    method: Annotated[
        str, typer.Option(help=f"One of {', '.join(SPACES)}; options stay fixed, as in aisp:population=4.")
    ] = "aisp",
    settings: Annotated[
        str | None, typer.Option(help="Tune these alone, with bounds or without, as in sigma=0.1:2,iterations.")
    ] = None,
    model: Annotated[str, typer.Option(help="Model id, folder, or 'demo'.")] = "demo",
    reward: Annotated[
        str | None, typer.Option(help="What is optimised: module:function, or a reward model's id or folder.")
    ] = None,
    gold: Annotated[str | None, typer.Option(help="Held-out reward to report, named alike; 'none' for none.")] = None,
    prompts: Annotated[
        str,
        typer.Option(help="demo:dev, hh-rlhf[/SUBSET]:SPLIT, shp[/SUBSET]:SPLIT, or a file of JSON lines."),
    ] = "demo:dev",
    limit: Annotated[int | None, typer.Option(min=2, help="At most so many prompts.")] = None,
    shuffle: Annotated[int | None, typer.Option(help="Seed of their order; without it they come as they are.")] = None,
    confirm: Annotated[
        str | None, typer.Option(help="Prompts that the default and the best setting answer at the end.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Settings to try; more of them go on with the study.")] = 30,
    samples: Annotated[int, typer.Option(min=1, help="Responses that each search may decode.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 96,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature where it is not tuned.")] = 1.0,
    seeds: Annotated[str, typer.Option(help="Every prompt is answered once per seed, as in 0,1,2.")] = "0",
    seed: Annotated[int, typer.Option(help="Seed of the settings that are proposed.")] = 0,
) -> None:
    """Tune a method's settings for a model and a reward; each is compared with the default at equal samples."""
    from langchain_aisp.cli import load_reward  # it registers this command, and so imports this module

    import_optuna()  # before a model is loaded in vain
    disable_progress_bar()  # transformers' own
    space = search_space(method, settings)
    chosen = load_prompts(prompts, limit=limit, shuffle=shuffle)
    unseen = load_prompts(confirm, limit=limit, shuffle=shuffle) if confirm else ()
    tuning = Tuning(
        engine=TransformersEngine.shared(model),
        reward=load_reward(reward, model),
        method=method,
        prompts=chosen,
        space=space,
        samples=samples,
        sampling=Sampling(max_tokens=max_tokens, temperature=temperature),
        trials=trials,
        gold=load_gold(gold, (*chosen, *unseen)),
        seeds=read_seeds(seeds),
        confirm=unseen,
        dataset=prompts,
        seed=seed,
    )
    found = watch(tune(tuning, out.with_suffix(".db")), tuning)
    out.write_text(json.dumps(summary(found, tuning), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    console = Console(highlight=False)
    show(found, tuning, console)
    console.print(f"[dim]written: {escape(str(out))}[/]")


def watch(steps: Iterable[News | Tuned], tuning: Tuning) -> Tuned:
    """Work through the steps behind a progress bar on standard error, and return the last one."""
    console = Console(stderr=True, highlight=False)
    prompts = len(tuning.prompts)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(complete_style="green", finished_style="green"),
        MofNCompleteColumn(),
        TextColumn("gain {task.fields[gain]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=(tuning.trials + 1) * prompts, gain=NOTHING)
        for step in steps:
            if isinstance(step, Tuned):
                return step
            done = (step.trial + 1) * prompts if step.stopped else step.trial * prompts + step.answered
            bar.update(task, completed=done, description=escape(step.settings), gain=f"{step.gain:+.3f}")
    raise AssertionError("the last step is the outcome")


def show(found: Tuned, tuning: Tuning, console: Console) -> None:
    """The best settings against the default, and the line to paste."""
    shown = [*found.tried[:_SHOWN], *(() if found.default in found.tried[:_SHOWN] else (found.default,))]
    note = (
        f"{len(tuning.prompts)} prompts, {len(tuning.seeds)} seed{'s' * (len(tuning.seeds) > 1)} each; "
        f"{len(found.tried)} settings answered all of them, {found.stopped} were stopped early. Mean ± standard error; "
        "paired differences from the default with 95 % bootstrap intervals. These prompts chose the setting, so its "
        "differences flatter it"
    )
    note += "." if found.confirmed else ": --confirm tests it on others."
    console.print(rich_table(table("Settings", shown, found.default, note)), "")
    if found.confirmed is not None:
        default, best = found.confirmed
        rows = [best] if best.arm == default.arm else [best, default]
        console.print(rich_table(table("On prompts that chose nothing", rows, default, "")), "")
    kind = type(found.best.arm.method).__name__
    console.print(
        "from langchain_aisp import AISPChatModel", f"from langchain_aisp.methods import {kind}", "", sep="\n"
    )
    console.print(escape(constructor(found.best.arm, tuning.engine.name)), soft_wrap=True)


def table(title: str, tried: Iterable[Tried], default: Tried, note: str) -> Table:
    """Rewards and held-out rewards of settings, and their differences from the default."""
    rows = tuple(
        (
            each.arm.label,
            _score(estimate(each.rewards)),
            "" if each is default else _difference(each.gain(default)),
            _score(estimate(each.golds)) if each.golds else NOTHING,
            "" if each is default else _difference(each.gold_gain(default)),
        )
        for each in tried
    )
    return Table(title, ("setting", "reward", "difference", "held-out reward", "difference"), rows, note)


def _score(number: Estimate) -> str:
    return f"{number.mean:.3f} ± {number.standard_error:.3f}"


def _difference(number: Estimate | None) -> str:
    return NOTHING if number is None else f"{number.mean:+.3f} [{number.low:+.3f}, {number.high:+.3f}]"
