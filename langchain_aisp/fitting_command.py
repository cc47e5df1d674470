"""The command ``fit-value`` of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from transformers.utils.logging import disable_progress_bar

from langchain_aisp.engine import TransformersEngine
from langchain_aisp.evaluation.datasets import load_prompts
from langchain_aisp.fitting import fit_value
from langchain_aisp.types import Sampling


def register(app: typer.Typer) -> None:
    """Add the command to an app."""
    app.command("fit-value")(fit_value_network)


def fit_value_network(
    out: Annotated[Path, typer.Option(help="Where the network is kept, a file of safetensors.")],
    model: Annotated[str, typer.Option(help="Model id, folder, or 'demo'.")] = "demo",
    reward: Annotated[
        str | None, typer.Option(help="module:function, or a reward model; needed unless the model is 'demo'.")
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(help="demo:train, hh-rlhf[/SUBSET]:SPLIT, shp[/SUBSET]:SPLIT, or a file of JSON lines."),
    ] = "demo:train",
    limit: Annotated[int, typer.Option(min=1, help="At most so many prompts.")] = 64,
    samples_per_prompt: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 96,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature.")] = 1.0,
    hidden: Annotated[
        int | None, typer.Option(min=1, help="Width of the inner layers; that of the pre-logits unless given.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Most passes over the answers.")] = 100,
    seed: Annotated[int, typer.Option(help="The same seed gives the same network.")] = 0,
) -> None:
    """Fit a value network for RE-Control to answers of the model itself."""
    from langchain_aisp.cli import load_reward  # it registers this command, and so imports this module

    disable_progress_bar()  # transformers' own
    console = Console(highlight=False)
    chats = [record.messages for record in load_prompts(prompts, limit=limit)]
    judge = load_reward(reward, model)
    with console.status(f"answering {len(chats)} prompts and fitting"):
        found = fit_value(
            TransformersEngine.shared(model),
            judge,
            chats,
            sampling=Sampling(max_tokens=max_tokens, temperature=temperature),
            samples_per_prompt=samples_per_prompt,
            hidden=hidden,
            epochs=epochs,
            seed=seed,
        )
    found.network.save(out)
    console.print(f"{len(chats) * samples_per_prompt} answers to {len(chats)} prompts; rewards of unseen prompts:")
    console.print(f"{found.explained:.0%} of their variance is foretold")
    console.print(f"[dim]written: {escape(str(out))}, {escape(repr(found.network))}[/]")
