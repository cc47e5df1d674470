"""Reward, gold reward and cost of the default AISP and its rivals on four pairs: does it win wherever one looks?

Why: one pair proves little, so there are four of different characters (`benchmarks.pairs`). Two steps, each of which
can be asked for alone. `--dev` runs every rival's grid on dev prompts at the full budget, takes of the settings near
the highest mean reward that of the likeliest answers, the same rule for all, and writes it down in
`results/quality-settings.json`, which is never overwritten. `--test` runs these settings on test prompts, once: the
files of the runs refuse others. All answer the same prompts with the same seed on the same engine, at equal numbers of
samples; the gold reward judges what is best after each iteration, and nothing is chosen by it. A separate Best-of-N of
the default's first wave shows whether any answer is worse than that; a separate search with a quarter of the samples,
since one that is to be long begins broadly, shows how soon Best-of-N is reached. Its temperature is chosen like the
others', at its own budget. Each file of runs can be read by `langchain-aisp report` too.

A rival that gives one answer (ARGS, RE-Control) stands as it is and as many samples. ARGS as it is asks for about as
many rewards as all the others; with eight chains for eight times as many. The budget of the others is in samples.

Runs are kept one by one, so a benchmark that was stopped goes on where it was. Workers are processes of one thread
each; with as many of them as cores, seconds are those of a busy machine, for all rivals alike.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import pstdev
from typing import Any

import torch

from benchmarks.common import RESULTS, mean_with_interval, save
from benchmarks.pairs import PAIRS, RUNS, Opened, Pair, Sources, add_sources, open_pair, sources_of
from langchain_aisp.align import align
from langchain_aisp.evaluation.arms import Arm, parse_arms
from langchain_aisp.evaluation.log import RunLog, read_log
from langchain_aisp.evaluation.results import Results, load_results
from langchain_aisp.evaluation.run import Run, answer, environment
from langchain_aisp.fitting import fit_value
from langchain_aisp.methods import BestOfN
from langchain_aisp.types import Sampling, require

SEED = 0
WAVE = 32
POINTS = 64  # of a curve
AT_ONCE = 256  # rows of Best-of-N, which adapts to nothing: with so many, it is fastest on both models
OURS, YARDSTICK, FIRST, QUARTER = "aisp", "best_of_n", "first wave", "aisp at a quarter"
COSTS = ("samples", "sampled_tokens", "reward_calls", "seconds", "reward_seconds")

Grids = dict[str, list[str]]
"""For each rival what its setting is chosen from, in the language of ``parse_arms``."""


def grids(pair: Pair, samples: int) -> Grids:
    """The rivals; a grid of one leaves nothing to choose."""
    wave, at = min(WAVE, samples), [f"temperature={each:g}" for each in pair.temperatures]
    warm, hot = at[-4], at[-2]
    plain = f"best_of_n:samples_per_wave={AT_ONCE}"
    published = f"published:samples_per_iteration={wave}"
    best_of = f"recontrol:best_of={samples},steps=10"
    return {
        "greedy": ["greedy"],
        YARDSTICK: [*(f"{plain},{each}" for each in at), *(f"{plain},{each},top_p=0.9" for each in at[-2:])],
        OURS: [f"aisp:{each}" for each in at],
        QUARTER: [f"aisp:samples={max(1, samples // 4)},{each}" for each in at],
        "aisp at temperature 1": ["aisp"],
        "published": [
            *(f"{published},sigma={sigma},reward_temperature=0.5" for sigma in (0.35, 0.5, 0.7071, 1.0, 1.5, 2.2)),
            *(f"{published},sigma=1.0,reward_temperature={each}" for each in (0.3, 1.0)),
        ],
        "args": [f"args:weight={weight}" for weight in (0.1, 0.5, 1.5, 6, 25, 100)],
        "args in 8 chains": [
            f"args:weight={weight},chains=8,temperature={each}" for weight in (0.5, 1.5, 6, 25) for each in (0.3, 1.0)
        ],
        "recontrol": [f"recontrol:steps=10,step_size={size}" for size in (0.1, 0.3, 1.0)],
        "recontrol best of n": [f"{best_of},step_size={size},{each}" for size in (0.1, 0.5) for each in (warm, hot)],
        "qalign": [f"qalign:reward_temperature={beta},{each}" for beta in (0.1, 0.5) for each in (warm, hot)],
        "misvo": [
            f"misvo:samples_per_iteration={wave},learning_rate={rate},{each}"
            for rate in (0.1, 0.3)
            for each in (warm, hot)
        ],
    }


def first_wave(spec: str, samples: int) -> str:
    """Best-of-N of the size of the default's first wave, at the temperature of its setting."""
    [ours] = parse_arms(spec, samples, Sampling())
    size = math.ceil(samples / ours.method.iterations)
    return f"{YARDSTICK}:samples={size},temperature={ours.sampling.temperature:g}"


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class Questions:
    """The first prompts of a split of a pair.

    Attributes:
        pair: Its name.
        sources: What it is opened from.
        split: ``train``, ``dev`` or ``test``.
        count: How many prompts.
    """

    pair: str
    sources: Sources
    split: str
    count: int

    def open(self) -> Opened:
        """Models and prompts, once per process."""
        return open_pair(self.pair, self.sources, self.split, self.count)

    def file(self, folder: Path, label: str) -> Path:
        """Where an arm's runs are kept."""
        return folder / f"{self.pair}.{self.split}.{re.sub(r'[^A-Za-z0-9.=]+', '_', label)}.jsonl"


Maker = Callable[[], Arm]
"""Makes an arm in the process that runs it: a value network is better read from its file than sent."""

Task = tuple[Questions, Maker, int]


def run_arms(asked: Questions, makers: Sequence[Maker], folder: Path, workers: int) -> dict[str, Path]:
    """Answer every prompt by every arm, but for what the files hold already; one file per arm.

    All arms answer a prompt before the next one comes, so that what was stopped early is paired.

    Args:
        asked: The prompts.
        makers: Of the arms.
        folder: Where the files are.
        workers: Processes.

    Returns:
        The files by the arms' labels.

    Raises:
        ValueError: A file was begun with other settings.
    """
    opened = asked.open()
    arms = [make() for make in makers]
    paths = {arm.label: asked.file(folder, arm.label) for arm in arms}
    with ExitStack() as stack:
        logs = {arm.label: stack.enter_context(RunLog(paths[arm.label], opened.evaluation(arm).config)) for arm in arms}
        tasks: list[Task] = [
            (asked, make, index)
            for index, prompt in enumerate(opened.prompts)
            for arm, make in zip(arms, makers, strict=True)
            if (arm.label, prompt.id, SEED) not in logs[arm.label].done
        ]
        for log in logs.values():
            if len(log.done) < len(opened.prompts):
                log.append("session", environment())
        with hands(workers) as work:
            for done, line in enumerate(work(run, tasks), start=1):
                logs[line["method"]].append("run", line)
                print(f"\r{opened.name}: {done} of {len(tasks)} runs", end="", flush=True)
    print(f"\r{opened.name}: all runs are there  ")
    return paths


@contextmanager
def hands(workers: int) -> Iterator[Callable[[Callable[[Task], Any], Sequence[Task]], Iterable[Any]]]:
    """What does the tasks: this process, or several others of one thread each, in whatever order."""
    if workers == 1:
        yield map
    else:
        context = multiprocessing.get_context("spawn")
        with context.Pool(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.imap_unordered
            pool.close()  # so that the processes end by themselves and clean up
            pool.join()


def run(task: Task) -> dict[str, Any]:
    """One arm's answer to one prompt, as a line of a file; the prompt is read before the clock starts."""
    asked, make, index = task
    opened, arm = asked.open(), make()
    prompt = opened.prompts[index]
    align(opened.engine, opened.reward, BestOfN(samples=1), prompt.messages, sampling=Sampling(max_tokens=1))
    *_, found = answer(opened.evaluation(arm), arm, prompt, SEED)
    assert isinstance(found, Run)
    return slim(found)


def slim(found: Run) -> dict[str, Any]:
    """A run without the texts and tokens of its samples, a tenth of its size."""
    samples = [
        {"reward": each.reward, "gold": each.gold, "finish_reason": each.finish_reason} for each in found.samples
    ]
    return {**asdict(replace(found, samples=())), "samples": samples}


def arm_of(spec: str, label: str, max_tokens: int, samples: int, value: Path) -> Arm:
    """The arm that a setting names, under a label; RE-Control's network is in a file."""
    written = spec.replace("recontrol:", f"recontrol:value={value},")
    [arm] = parse_arms(written, samples, Sampling(max_tokens=max_tokens))
    return replace(arm, label=label)


# ---------------------------------------------------------------------------------------------------------------------
# What was found


def rows(results: Results, reference: str) -> dict[str, dict[str, Any]]:
    """Each arm's rewards and costs, and how far the reference is ahead of it, paired by prompt."""
    measures = ("reward", "gold", "base_logprob")
    table = {}
    for name in results.methods:
        found = {measure: results.numbers(name, measure) for measure in measures}
        ours = {measure: results.numbers(reference, measure) for measure in measures}
        ahead = {
            measure: mean_with_interval([a - b for a, b in zip(ours[measure], found[measure], strict=True)])
            for measure in ("reward", "gold")
        }
        table[name] = {
            **{measure: mean_with_interval(values) for measure, values in found.items()},
            f"{reference}_ahead": ahead,
            "by_prompt": {measure: [round(value, 4) for value in values] for measure, values in found.items()},
            **{cost: mean(results.numbers(name, cost)) for cost in COSTS},
        }
    return table


def mean(values: Sequence[float]) -> float:
    """The average."""
    return sum(values) / len(values)


Trace = Sequence[Mapping[str, float]]
"""The numbers of one run after each of its iterations."""


def traces(path: Path, prompts: Sequence[str]) -> list[Trace]:
    """How an arm's runs on some prompts went."""
    found: dict[str, Trace] = {line["prompt"]: line["trace"] for line in read_log(path)[1] if line["kind"] == "run"}
    return [found[prompt] for prompt in prompts]


def curve(runs: Sequence[Trace]) -> list[dict[str, float]]:
    """Mean best reward, its gold reward and the costs at some 64 numbers of samples, from the first that all runs have.

    Runs end their iterations at samples of their own; each stands as it did after the last one that was over.
    """
    least, most = (int(max(run[end]["samples"] for run in runs)) for end in (0, -1))
    names = ("best", "gold", *COSTS)
    points = []
    for samples in range(most, least - 1, -max(1, most // POINTS)):
        now = [next(point for point in reversed(run) if point["samples"] <= samples) for run in runs]
        points.append({name: mean([point[name] for point in now]) for name in names} | {"samples": float(samples)})
    return points[::-1]


def reached(ours: Sequence[Mapping[str, float]], theirs: Mapping[str, float]) -> dict[str, Any] | None:
    """Where a curve reaches the end of another one, and what share of its costs that took; None if it never does."""
    there = next((point for point in ours if point["best"] >= theirs["best"]), None)
    if there is None:
        return None
    shares = {cost: there[cost] / theirs[cost] for cost in COSTS if theirs[cost] > 0}
    ours_alone, theirs_alone = (each["seconds"] - each["reward_seconds"] for each in (there, theirs))
    return {
        **{cost: there[cost] for cost in COSTS},
        "shares": {**shares, "seconds_without_reward": ours_alone / max(theirs_alone, 1e-9)},
    }


def compare(
    paths: Mapping[str, Path], reference: str, yardstick: str | None = None, sooner: Sequence[str] = ()
) -> dict[str, Any]:
    """All that is told of some arms.

    Args:
        paths: Their files, by label.
        reference: The arm that all are compared with.
        yardstick: An arm whose reward the reference is to reach with less.
        sooner: Arms that may reach it, too.
    """
    results = load_results(list(paths.values()))
    curves = {name: curve(traces(path, results.prompts)) for name, path in paths.items()}
    told: dict[str, Any] = {
        "prompts": len(results.prompts),
        "prompt_ids": list(results.prompts),
        "arms": rows(results, reference),
    }
    for name, points in curves.items():
        told["arms"][name]["curve"] = points
    if yardstick is not None:
        end = curves[yardstick][-1]
        told["reached"] = {name: reached(curves[name], end) for name in (reference, *sooner)}
    return told


def show(title: str, told: Mapping[str, Any], reference: str) -> None:
    """A comparison as a table for people."""
    print(f"\n{title}, {told['prompts']} prompts; how far {reference} is ahead, with 95 % intervals")
    costs = f"{'tokens':>7} {'s':>6} {'of it reward':>12}"
    print(f"{'':24} {'reward':>7} {'gold':>6} {'log p':>7}  {'reward':^24} {'gold':^24} {costs}")
    for name, row in told["arms"].items():
        ahead = row[f"{reference}_ahead"]
        print(
            f"{name:24} {row['reward']['mean']:7.3f} {row['gold']['mean']:6.2f} {row['base_logprob']['mean']:7.1f}  "
            f"{_interval(ahead['reward'])} {_interval(ahead['gold'])} "
            f"{row['sampled_tokens']:7.0f} {row['seconds']:6.2f} {row['reward_seconds']:12.2f}"
        )
    for name, found in told.get("reached", {}).items():
        if found is None:
            print(f"{name} does not reach {YARDSTICK}'s reward")
        else:
            shares = ", ".join(
                f"{share:.3f} of its {cost.replace('_', ' ')}" for cost, share in found["shares"].items()
            )
            print(f"{name} reaches {YARDSTICK}'s reward with {found['samples']:.0f} samples: {shares}")


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['mean']:+7.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


# ---------------------------------------------------------------------------------------------------------------------
# Dev, then test


@dataclass(frozen=True)
class Plan:
    """Sizes of a comparison, and where it keeps what.

    Attributes:
        samples: Responses that a search may decode.
        dev: Prompts that settings are chosen on.
        test: Prompts that they are compared on.
        train: Prompts whose answers value networks learn from.
        answers: Answers to each of these.
        workers: Processes.
        folder: Runs and value networks.
        settings: The file of frozen settings.
    """

    samples: int = 512
    dev: int = 12
    test: int = 60
    train: int = 64
    answers: int = 16
    workers: int = 2
    folder: Path = RUNS / "quality"
    settings: Path = RESULTS / "quality-settings.json"

    def frozen(self) -> dict[str, Any]:
        """Settings that were chosen, by pair."""
        return json.loads(self.settings.read_text(encoding="utf-8")) if self.settings.exists() else {}

    def chosen(self, pair: str) -> dict[str, str]:
        """Settings that were chosen for rivals of a pair.

        Raises:
            ValueError: They were chosen at another number of samples.
        """
        known = self.frozen().get(pair, {"samples": self.samples, "chosen": {}})
        require(
            known["samples"] == self.samples,
            f"{pair}: settings were chosen at {known['samples']} samples, --samples is {self.samples}",
        )
        chosen: dict[str, str] = known["chosen"]
        return chosen

    def freeze(
        self, pair: str, chosen: Mapping[str, str], dev_rewards: Mapping[str, float], explained: float | None
    ) -> None:
        """Write down what was chosen for rivals of a pair; what is there already stays."""
        known = self.frozen()
        before = known.get(pair, {"chosen": {}, "dev_rewards": {}})
        known[pair] = {
            "samples": self.samples,
            "dev_prompts": self.dev,
            "value_network_explains": explained,
            **before,
            "chosen": {**chosen, **before["chosen"]},
            "dev_rewards": {**before["dev_rewards"], **dev_rewards},
        }
        self.settings.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")

    def makers(self, pair: str, settings: Mapping[str, str]) -> list[Maker]:
        """Makers of arms for a pair, of settings by label."""
        size, value = PAIRS[pair].max_tokens, self.value(pair)
        return [partial(arm_of, spec, label, size, self.samples, value) for label, spec in settings.items()]

    def value(self, pair: str) -> Path:
        """Where a pair's value network is kept."""
        return self.folder / f"{pair}.value.safetensors"


def fit_network(pair: str, sources: Sources, plan: Plan) -> float:
    """Fit RE-Control's network for a pair on answers to train prompts, unless it is there.

    Returns:
        The share of the rewards' variance that it explains on prompts that it has not seen.
    """
    path, told = plan.value(pair), plan.value(pair).with_suffix(".json")
    if not (path.exists() and told.exists()):
        opened = Questions(pair, sources, "train", plan.train).open()
        chats = [prompt.messages for prompt in opened.prompts]
        sampling = Sampling(max_tokens=PAIRS[pair].max_tokens)
        fit = fit_value(opened.engine, opened.reward, chats, sampling=sampling, samples_per_prompt=plan.answers)
        plan.folder.mkdir(parents=True, exist_ok=True)
        fit.network.save(path)
        told.write_text(json.dumps({"explained": fit.explained}), encoding="utf-8")
    explained: float = json.loads(told.read_text(encoding="utf-8"))["explained"]
    return explained


def careful(results: Results, grid: Sequence[str]) -> str:
    """Of the settings within one standard error of the highest mean reward, that of the likeliest answers.

    What a setting gains beyond that may be chance, and the further answers are from the model, the more of a gain is
    the reward's mistakes. Gold chooses nothing.

    Source: the rule of one standard error, Breiman et al., Classification and Regression Trees, 1984, section 3.4.3.
    """
    rewards = {spec: results.numbers(spec, "reward") for spec in grid}
    best = rewards[max(grid, key=lambda spec: mean(rewards[spec]))]

    def is_near(spec: str) -> bool:
        behind = [a - b for a, b in zip(best, rewards[spec], strict=True)]
        return mean(behind) <= pstdev(behind) / math.sqrt(max(1, len(behind) - 1))

    return max(filter(is_near, grid), key=lambda spec: mean(results.numbers(spec, "base_logprob")))


def choose_on_dev(pair: str, sources: Sources, plan: Plan) -> None:
    """Run the grids of the rivals for which nothing was chosen yet on dev prompts, and freeze the choice.

    Raises:
        ValueError: Others were chosen with another number of samples.
    """
    known = plan.chosen(pair)
    candidates = {rival: grid for rival, grid in grids(PAIRS[pair], plan.samples).items() if rival not in known}
    if not candidates:
        print(f"{pair}: its settings are frozen; to choose some anew, take them out of {plan.settings.name}")
        return
    steered = any(rival.startswith("recontrol") for rival in candidates)
    explained = fit_network(pair, sources, plan) if steered else None
    specs = [spec for grid in candidates.values() if len(grid) > 1 for spec in grid]
    asked = Questions(pair, sources, "dev", plan.dev)
    paths = run_arms(asked, plan.makers(pair, dict(zip(specs, specs, strict=True))), plan.folder, plan.workers)
    results = load_results(list(paths.values()))
    rewards = {spec: mean(results.numbers(spec, "reward")) for spec in specs}
    chosen = {rival: careful(results, grid) if len(grid) > 1 else grid[0] for rival, grid in candidates.items()}
    if OURS in chosen:
        chosen[FIRST] = first_wave(chosen[OURS], plan.samples)
    plan.freeze(pair, chosen, rewards, explained)
    print("\n".join(f"{rival}: {spec}" for rival, spec in chosen.items()))


def compare_on_test(pair: str, sources: Sources, plan: Plan) -> dict[str, Any]:
    """Run the frozen settings on test prompts and compare.

    Raises:
        ValueError: No settings were chosen, or with another number of samples.
    """
    settings = plan.chosen(pair)
    missing = [rival for rival in grids(PAIRS[pair], plan.samples) if rival not in settings]
    require(not missing, f"{pair}: nothing was chosen yet for {', '.join(missing)}; run --dev first")
    fit_network(pair, sources, plan)
    asked = Questions(pair, sources, "test", plan.test)
    paths = run_arms(asked, plan.makers(pair, settings), plan.folder, plan.workers)
    told = compare(paths, OURS, YARDSTICK, sooner=[QUARTER])
    show(f"{pair} at {plan.samples} samples", told, OURS)
    ours, floor = (told["arms"][name]["by_prompt"]["reward"] for name in (OURS, FIRST))
    below = sum(answer < least - 1e-3 for answer, least in zip(ours, floor, strict=True))
    print(f"prompts whose answer is worse than that of a Best-of-N of the first wave's size: {below}")
    return {"settings": settings, **told, "prompts_below_the_first_wave": below}


def possible(names: Sequence[str], sources: Sources) -> list[str]:
    """The pairs that can be opened; the others are named with the reason."""
    reasons = {name: sources.missing(PAIRS[name].needs) for name in names}
    for name, reason in reasons.items():
        if reason is not None:
            print(f"{name} is left out: {reason}")
    return [name for name, reason in reasons.items() if reason is None]


def main() -> None:
    """Choose on dev prompts, then compare on test prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    step = parser.add_mutually_exclusive_group()
    step.add_argument("--dev", action="store_true", help="only choose settings and freeze them")
    step.add_argument("--test", action="store_true", help="only run the frozen settings, once")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    add_sources(parser)
    parser.add_argument("--samples", type=int, default=Plan.samples)
    parser.add_argument("--dev-prompts", type=int, default=Plan.dev)
    parser.add_argument("--prompts", type=int, default=Plan.test, help="test prompts")
    parser.add_argument("--train-prompts", type=int, default=Plan.train, help="of the value networks")
    parser.add_argument("--workers", type=int, default=Plan.workers, help="processes of one thread each")
    parser.add_argument("--runs", type=Path, default=Plan.folder, help="where single runs are kept")
    parser.add_argument("--settings", type=Path, default=Plan.settings, help="the file of frozen settings")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan(
        samples=args.samples,
        dev=args.dev_prompts,
        test=args.prompts,
        train=args.train_prompts,
        workers=args.workers,
        folder=args.runs,
        settings=args.settings,
    )
    sources = sources_of(args)
    pairs = possible(args.pairs, sources)
    for pair in pairs:
        if not args.test:
            choose_on_dev(pair, sources, plan)
        if not args.dev:
            told = compare_on_test(pair, sources, plan)
            save(f"quality-{pair}", {"pair": pair, "samples": plan.samples, **told})


if __name__ == "__main__":
    main()
