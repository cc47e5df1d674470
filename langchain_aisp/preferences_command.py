"""The command ``export-preferences`` of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from transformers.utils.logging import disable_progress_bar

from langchain_aisp.engine import TransformersEngine
from langchain_aisp.evaluation.arms import METHODS, parse_arms
from langchain_aisp.evaluation.commands import load_gold, read_seeds, watch
from langchain_aisp.evaluation.datasets import load_prompts
from langchain_aisp.evaluation.run import Evaluation
from langchain_aisp.preferences import Choice, Export, convert_log, export_preferences
from langchain_aisp.types import Sampling, require

_SAMPLING = (
    "model revision adapter reward gold method prompts limit shuffle samples max_tokens temperature seeds".split()
)


def register(app: typer.Typer) -> None:
    """Add the command to an app."""
    app.command("export-preferences")(export_pairs)


def export_pairs(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Where the pairs are kept, one JSON line each; the same call goes on.")],
    log: Annotated[Path | None, typer.Option(help="Take the samples of this file of eval; nothing is run.")] = None,
    model: Annotated[str | None, typer.Option(help="Model id, folder, or 'demo', which is the default.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the hub.")] = None,
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter on top of the model.")] = None,
    reward: Annotated[
        str | None, typer.Option(help="module:function, or a reward model; needed unless the model is 'demo'.")
    ] = None,
    gold: Annotated[str | None, typer.Option(help="Held-out reward that is written beside the other one.")] = None,
    method: Annotated[str | None, typer.Option(help=f"One of {', '.join(METHODS)}, with options or without.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="demo:train, hh-rlhf[/SUBSET]:SPLIT, shp[/SUBSET]:SPLIT, or a file of JSON lines."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many prompts.")] = None,
    shuffle: Annotated[int | None, typer.Option(help="Seed of their order; without it they come as they are.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Responses to each prompt; 32 unless given.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest response in tokens; 96 unless given.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="Sampling temperature; 1 unless given.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Every prompt is answered once per seed, as in 0,1.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Most pairs of one search.")] = Choice.pairs_per_prompt,
    margin: Annotated[float, typer.Option(min=0, help="Least difference of the rewards.")] = Choice.margin,
    chosen_quantile: Annotated[
        float, typer.Option(min=0, max=1, help="Where in the ranking the chosen ones begin; 1 is the best.")
    ] = Choice.chosen_quantile,
    rejected_quantile: Annotated[
        float, typer.Option(min=0, max=1, help="Where the rejected ones begin; 0 is the worst.")
    ] = Choice.rejected_quantile,
) -> None:
    """Write best and worst responses as pairs for preference training (TRL's DPO)."""
    disable_progress_bar()  # transformers' own
    choice = Choice(pairs, margin, chosen_quantile, rejected_quantile)
    console = Console(highlight=False)
    if log is not None:
        _refuse_sampling(context.params)
        written = convert_log(log, out, choice)
    else:
        from langchain_aisp.cli import load_reward  # it registers this command, and so imports this module

        chosen = load_prompts(prompts or "demo:train", limit=limit, shuffle=shuffle)
        options = {"revision": revision, "adapter": adapter}
        sampling = Sampling(max_tokens or 96, temperature=1.0 if temperature is None else temperature)
        evaluation = Evaluation(
            engine=TransformersEngine.shared(model or "demo", **{k: v for k, v in options.items() if v is not None}),
            reward=load_reward(reward, model or "demo"),
            arms=parse_arms(method or "best_of_n", samples or 32, sampling),
            prompts=chosen,
            gold=load_gold(gold, chosen),
            seeds=read_seeds(seeds or "0"),
            dataset=prompts or "demo:train",
        )
        watch(export_preferences(Export(evaluation, choice, adapter), out), evaluation.total)
        written = len(out.read_bytes().splitlines())
    console.print(f"{written} pairs", f"[dim]in {escape(str(out))}[/]")


def _refuse_sampling(options: Mapping[str, Any]) -> None:
    """Raise ValueError if an option would have no effect on a log."""
    given = [f"--{name.replace('_', '-')}" for name in _SAMPLING if options[name] is not None]
    require(not given, f"--log takes the samples that are there: {', '.join(given)} would do nothing, leave it out")
