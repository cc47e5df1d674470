"""The command line: ``ask`` answers one message, ``demo`` shows what a search gains, ``profile`` where time goes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

from transformers.utils.logging import disable_progress_bar

from langchain_aisp import __version__, profiling
from langchain_aisp.align import Aligned, Budget, Iteration, Settings, iterate
from langchain_aisp.demo import REWARD_MODEL_PATH, Scenario, gold_reward, scenarios
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.evaluation.arms import in_iterations
from langchain_aisp.methods import AISP, BestOfN
from langchain_aisp.rewards import ClassifierReward, RewardError, as_reward
from langchain_aisp.types import Chat, Method, Reward, Sampling

try:
    import typer
    from rich import box
    from rich.console import Console, Group, RenderableType
    from rich.markup import escape
    from rich.panel import Panel
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text

    from langchain_aisp import fitting_command, preferences_command, tuning_command
    from langchain_aisp.evaluation import commands as evaluation_commands
except ImportError as missing:  # not an ImportError again: a command should end with one line, not with a traceback
    raise SystemExit(f"{missing}. The command line needs an extra: pip install 'langchain-aisp[cli]'") from missing

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
app = typer.Typer(
    help="Answers that a reward likes, found by searching at inference time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

BARS = "▁▂▃▄▅▆▇█"


class MethodName(StrEnum):
    """The searches that the command line offers."""

    AISP = "aisp"
    PUBLISHED = "published"
    BEST_OF_N = "best-of-n"


Model = Annotated[str, typer.Option(help="Model id, folder, or 'demo' for the model that comes with the package.")]
RewardName = Annotated[
    str | None, typer.Option(help="module:function, or a reward model; needed unless the model is 'demo'.")
]
Samples = Annotated[int, typer.Option(min=1, help="Responses that a search may decode in all.")]
Iterations = Annotated[
    int | None, typer.Option(min=1, help="Parts of the search that share the samples; at most one per sample.")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 takes the likeliest token.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same answer.")]


@dataclass(frozen=True)
class Outcome:
    """One line of the result table.

    Attributes:
        title: What a person calls the method.
        aligned: What the search found and spent.
        gold: Reward of the answer by the exact checker; None where no demo scenario is answered.
    """

    title: str
    aligned: Aligned
    gold: float | None = None

    @property
    def answer(self) -> str:
        """Text of the answer."""
        return self.aligned.best.response.text.strip()

    @property
    def curve(self) -> list[float]:
        """The best reward after each iteration."""
        return [step.best for step in self.aligned.trace]


@dataclass(frozen=True)
class Session:
    """What all searches of one command share."""

    engine: TransformersEngine
    reward: Reward
    sampling: Sampling
    seed: int

    def search(self, title: str, method: Method[Any], chat: Chat, budget: Budget = Budget()) -> Aligned:
        """Run one search behind a progress bar."""
        steps = iterate(self.engine, self.reward, method, chat, sampling=self.sampling, seed=self.seed, budget=budget)
        with progress_bar() as bar:
            task = bar.add_task(title, total=method.iterations, samples=0, best="–")
            while isinstance(step := next(steps), Iteration):
                bar.update(task, advance=1, samples=step.samples, best=f"{step.best:.2f}")
        return step

    def answer(self, title: str, method: Method[Any], scenario: Scenario) -> Outcome:
        """Answer a customer of the demo, and have the exact checker look at it."""
        aligned = self.search(title, method, scenario.messages)
        [gold] = gold_reward(scenario)(scenario.messages, [aligned.best.response.text])
        return Outcome(title, aligned, gold)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and leave.")] = False,
) -> None:
    """Answers that a reward likes, found by searching at inference time."""
    if version:
        out.print(f"langchain-aisp {__version__}")
        raise typer.Exit


@app.command()
def ask(
    message: Annotated[str, typer.Argument(help="What to answer.")],
    model: Model = "demo",
    method: Annotated[MethodName, typer.Option(help="How to search.")] = MethodName.AISP,
    reward: RewardName = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    samples: Samples = AISP.samples,
    iterations: Iterations = None,
    max_tokens: MaxTokens = 96,
    temperature: Temperature = 1.0,
    seconds: Annotated[float | None, typer.Option(help="Wall-clock time after which the search ends.")] = None,
    target: Annotated[float | None, typer.Option(help="Reward that is good enough.")] = None,
    seed: Seed = 0,
) -> None:
    """Answer one message with the best response that a search finds."""
    session = open_session(model, reward, max_tokens, temperature, seed)
    chat = [{"role": "system", "content": system}] if system else []
    chat.append({"role": "user", "content": message})
    budget = Budget(samples=samples, seconds=seconds, target_reward=target)
    found = Outcome(method, session.search(method, build_method(method, samples, iterations), chat, budget))
    out.print(Panel(escape(found.answer), title="answer", title_align="left", border_style="green"))
    out.print(numbers([found]))


@app.command()
def profile(
    message: Annotated[str, typer.Argument(help="What to answer.")],
    model: Model = "demo",
    method: Annotated[MethodName, typer.Option(help="How to search.")] = MethodName.AISP,
    reward: RewardName = None,
    samples: Samples = AISP.samples,
    iterations: Iterations = None,
    max_tokens: MaxTokens = 96,
    temperature: Temperature = 1.0,
    seed: Seed = 0,
    trace: Annotated[Path | None, typer.Option(help="Write every operation to this file as a Chrome trace.")] = None,
) -> None:
    """Show where the time of one request goes."""
    session = open_session(model, reward, max_tokens, temperature, seed)
    profiling.warm_up(session.engine, session.reward)
    chat = [{"role": "user", "content": message}]
    settings: Settings = {"sampling": session.sampling, "seed": seed}
    with profiling.tracing(trace):
        found = profiling.profile_request(
            session.engine, session.reward, build_method(method, samples, iterations), chat, **settings
        )
    out.print(profiling.table(found))


@app.command()
def demo(
    prompts: Annotated[int, typer.Option(min=1, help="How many customers to answer.")] = 1,
    samples: Samples = AISP.samples,
    iterations: Iterations = None,
    max_tokens: MaxTokens = 96,
    seed: Seed = 0,
) -> None:
    """Answer unseen customers by one sample, by Best-of-N and by AISP, the last two with equally many samples."""
    session = open_session("demo", None, max_tokens, 1.0, seed)
    rivals = {
        "one sample": BestOfN(samples=1),
        "Best-of-N": BestOfN(samples=samples),
        "AISP": build_method(MethodName.AISP, samples, iterations),
    }
    rows = []
    for number, scenario in enumerate(scenarios("test", prompts, seed), start=1):
        out.print(conversation(scenario.messages, f"customer {number} of {prompts}"))
        found = [session.answer(title, method, scenario) for title, method in rivals.items()]
        out.print(answers(found), numbers(found), sep="\n")
        rows.append(found)
    if prompts > 1:
        out.print(f"mean of {prompts} customers", averages(rows), sep="\n")
    out.print("[dim]reward: the small reward model that the searches climb[/]")
    out.print("[dim]gold: the good parts of the answer, 0 to 6, by an exact checker that they never see[/]")


def open_session(model: str, reward: str | None, max_tokens: int, temperature: float, seed: int) -> Session:
    """Load what the searches share."""
    disable_progress_bar()  # transformers' own
    with err.status("loading the models"):
        scored = load_reward(reward, model)
        engine = TransformersEngine.shared(model)
    return Session(engine, scored, Sampling(max_tokens=max_tokens, temperature=temperature), seed)


def load_reward(spec: str | None, model: str) -> Reward:
    """A reward from the command line: ``module:function``, a reward model, or the demo's own.

    Raises:
        typer.BadParameter: If there is none, or it cannot be imported.
    """
    if spec is None and model != "demo":
        raise typer.BadParameter(f"--model {model} needs --reward: module:function, or the id or folder of a model")
    if spec is None or spec == "demo":
        return ClassifierReward.from_pretrained(str(REWARD_MODEL_PATH))
    return as_reward(import_function(spec)) if ":" in spec else ClassifierReward.from_pretrained(spec)


def import_function(spec: str) -> Callable[..., Any]:
    """The function that ``module:function`` names; modules of the working directory are found too."""
    module_name, _, name = spec.partition(":")
    sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(f"--reward {spec} cannot be imported: {error}") from error
    if not callable(function):
        raise typer.BadParameter(f"--reward {spec} must name a function (chat, responses) -> scores, got {function!r}")
    return function  # type: ignore[no-any-return]


def build_method(name: MethodName, samples: int, iterations: int | None) -> Method[Any]:
    """A method that spends all samples, in so many iterations or as many as it likes."""
    if name is MethodName.BEST_OF_N:
        return BestOfN(samples=samples)
    options = {} if iterations is None else {"iterations": min(iterations, samples)}
    if name is MethodName.PUBLISHED:
        return AISP.published(**in_iterations(samples, options))
    return AISP(samples=samples, **options)


def progress_bar() -> Progress:
    """A bar on standard error that leaves nothing behind, and shows nothing where nobody watches."""
    return Progress(
        TextColumn("{task.description:10}"),
        BarColumn(complete_style="green", finished_style="green"),
        TextColumn("{task.fields[samples]} samples"),
        TextColumn("best reward {task.fields[best]}"),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


def conversation(messages: Chat, title: str) -> Panel:
    """What was said so far."""
    styles = {"system": "dim", "user": "bold", "assistant": "default"}
    lines = [Text(f"{m['role']}: {m['content']}", style=styles.get(m["role"], "default")) for m in messages]
    return Panel(Group(*lines), title=title, title_align="left", border_style="cyan")


def answers(outcomes: Sequence[Outcome]) -> Table:
    """Every method's answer beside its name."""
    table = Table.grid(padding=(0, 2, 1, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for outcome in outcomes:
        table.add_row(outcome.title, escape(outcome.answer))
    return table


def numbers(outcomes: Sequence[Outcome]) -> Table:
    """Reward, cost and course of every method."""
    rewards = [reward for outcome in outcomes for reward in outcome.curve]
    table = Table("method", box=box.SIMPLE_HEAD, header_style="dim", border_style="dim")
    for title in ("reward", "gold", "samples", "tokens", "seconds"):
        table.add_column(title, justify="right")
    table.add_column("best so far")
    for outcome in outcomes:
        best = outcome.aligned.best.reward == max(rewards)
        curve = sparkline(outcome.curve, min(rewards), max(rewards))
        table.add_row(*cells(outcome), curve, style="green" if best else "")
    return table


def cells(outcome: Outcome) -> list[str]:
    """One method's numbers as text."""
    aligned = outcome.aligned
    gold = "–" if outcome.gold is None else f"{outcome.gold:g}"
    costs = str(aligned.samples), str(aligned.sampled_tokens), f"{aligned.seconds:.1f}"
    return [outcome.title, f"{aligned.best.reward:.2f}", gold, *costs]


def averages(rows: Sequence[Sequence[Outcome]]) -> RenderableType:
    """Mean reward and mean gold of every method over all customers."""
    table = Table("method", box=box.SIMPLE_HEAD, header_style="dim", border_style="dim")
    for title in ("reward", "gold", "tokens", "seconds"):
        table.add_column(title, justify="right")
    for same in zip(*rows, strict=True):
        found = [outcome.aligned for outcome in same]
        table.add_row(
            same[0].title,
            f"{mean(aligned.best.reward for aligned in found):.2f}",
            f"{mean(outcome.gold or 0.0 for outcome in same):.2f}",
            f"{mean(aligned.sampled_tokens for aligned in found):.0f}",
            f"{mean(aligned.seconds for aligned in found):.1f}",
        )
    return table


def sparkline(values: Sequence[float], low: float, high: float) -> str:
    """The values as bars between ``low`` and ``high``."""
    steps = len(BARS) - 1
    return "".join(BARS[round(steps * (value - low) / (high - low))] if high > low else BARS[-1] for value in values)


evaluation_commands.register(app)
fitting_command.register(app)
tuning_command.register(app)
preferences_command.register(app)


def main() -> None:
    """Run the command; what a user can mend ends with one line on standard error and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    try:
        app()
    except (ImportError, OSError, RewardError, ValueError) as error:
        err.print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)  # a broken path cannot be copied
        sys.exit(1)


if __name__ == "__main__":
    main()
