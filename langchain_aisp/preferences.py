"""Best and worst answers as preference pairs, one JSON line each, in TRL's conversational format.

A file holds pairs and nothing else, so that any loader reads it; where a pair comes from stands in its own columns.
Runs are sampled anew, or taken from a log of ``langchain-aisp eval``; what becomes of a run is the same function.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from langchain_aisp.align import Iteration
from langchain_aisp.evaluation.arms import Arm
from langchain_aisp.evaluation.datasets import PromptRecord
from langchain_aisp.evaluation.log import read_log
from langchain_aisp.evaluation.run import Evaluation, Progress, answer
from langchain_aisp.types import require

Row: TypeAlias = dict[str, Any]
_ABOUT = ("model", "revision", "adapter", "reward", "reward_fingerprint", "choice", "export", "version")


@dataclass(frozen=True)
class Choice:
    """Which of the complete, distinct responses to a prompt become pairs.

    The responses are ranked by reward. The first pair is the one at ``chosen_quantile`` and the one at
    ``rejected_quantile``; every further pair goes one rank inwards from both.

    Attributes:
        pairs_per_prompt: Most pairs of one search.
        margin: Least difference of the rewards; equal rewards make no pair.
        chosen_quantile: 1 begins with the best response.
        rejected_quantile: 0 begins with the worst; higher ones leave out what any model knows to be bad.
    """

    pairs_per_prompt: int = 1
    margin: float = 0.0
    chosen_quantile: float = 1.0
    rejected_quantile: float = 0.0

    def __post_init__(self) -> None:
        """Reject choices that make no pair."""
        require(self.pairs_per_prompt >= 1, f"pairs_per_prompt must be at least 1, got {self.pairs_per_prompt}")
        require(self.margin >= 0, f"margin must not be negative, got {self.margin}; 0 takes any difference")
        require(
            0 <= self.rejected_quantile < self.chosen_quantile <= 1,
            "quantiles must be in [0, 1] and the chosen one's above the rejected one's, "
            f"got {self.chosen_quantile} and {self.rejected_quantile}",
        )

    def pairs(self, samples: Sequence[Row]) -> list[tuple[Row, Row]]:
        """Chosen and rejected samples, out of samples with ``text``, ``reward`` and ``finish_reason``."""
        distinct: dict[str, Row] = {}
        for sample in samples:
            if sample["finish_reason"] == "stop":
                distinct.setdefault(sample["text"], sample)
        ranked = sorted(distinct.values(), key=lambda sample: -sample["reward"])
        first, last = (round((1 - each) * (len(ranked) - 1)) for each in (self.chosen_quantile, self.rejected_quantile))
        inwards = zip(ranked[first:], reversed(ranked[: last + 1]), strict=False)
        wide = [(good, bad) for good, bad in inwards if self._is_wide(good["reward"] - bad["reward"])]
        return wide[: self.pairs_per_prompt]

    def _is_wide(self, gap: float) -> bool:
        return gap > 0 and gap >= self.margin


@dataclass(frozen=True)
class Export:
    """What is sampled, and which pairs are kept of it.

    Attributes:
        evaluation: Model, reward, methods, prompts and seeds.
        choice: Which responses become pairs.
        adapter: Adapters that the engine's model was loaded with, for the record.
    """

    evaluation: Evaluation
    choice: Choice = field(default_factory=Choice)
    adapter: str | None = None

    @property
    def searches(self) -> list[tuple[PromptRecord, int, Arm]]:
        """What is run, in this order."""
        asked = self.evaluation
        return [(prompt, seed, arm) for prompt in asked.prompts for seed in asked.seeds for arm in asked.arms]

    @property
    def config(self) -> Row:
        """What pins the pairs, as JSON."""
        model = getattr(self.evaluation.engine, "model", None)
        revision = getattr(getattr(model, "config", None), "_commit_hash", None)  # known of models from the hub
        return {**self.evaluation.config, "revision": revision, "adapter": self.adapter}


def export_preferences(export: Export, path: str | Path) -> Iterator[Progress]:
    """Run what the file does not hold yet, and append the pairs of each search once it is done.

    A process that is killed loses the search under way only; the same call goes on after the last pair in the file,
    and the file ends up the same. Searches that made no pair leave no trace, so those after the last pair run again.

    Args:
        export: What to run.
        path: The file; folders are made. A log of runs is not needed for it, see ``convert_log`` if there is one.

    Yields:
        News after each iteration and each search.

    Raises:
        ValueError: The file was begun with another export.
    """
    path, searches, config = Path(path), export.searches, export.config
    path.parent.mkdir(parents=True, exist_ok=True)
    done = _resume(path, export, config)
    for number, (prompt, seed, arm) in enumerate(searches[done:], start=done):
        for step in answer(export.evaluation, arm, prompt, seed):
            if isinstance(step, Iteration):
                yield Progress(number, len(searches), arm.label, iteration=step)
            else:
                _append(path, preference_rows(asdict(step), config, export.choice))
                yield Progress(number + 1, len(searches), arm.label, run=step)


def convert_log(log: str | Path, path: str | Path, choice: Choice | None = None) -> int:
    """Write the pairs of a log of runs; nothing is sampled. A pair that several runs have is written once.

    Args:
        log: A file that ``langchain-aisp eval`` wrote.
        path: The file of pairs; it must not exist.
        choice: Which responses become pairs.

    Returns:
        The number of pairs.

    Raises:
        FileNotFoundError: There is no such log.
        ValueError: It is no log, or ``path`` exists.
    """
    path = Path(path)
    require(not path.exists(), f"{path} exists already; a log is converted as a whole, so name a new file")
    config, lines = read_log(log)
    found: dict[str, Row] = {}
    for line in lines:
        if line["kind"] == "run":
            for row in preference_rows(line, config, choice or Choice()):
                found.setdefault(json.dumps([row["prompt"], row["chosen"], row["rejected"]]), row)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.unlink(missing_ok=True)
    _append(unfinished, list(found.values()))
    unfinished.replace(path)
    return len(found)


def preference_rows(run: Mapping[str, Any], config: Mapping[str, Any], choice: Choice) -> list[Row]:
    """The pairs of one run.

    Args:
        run: Fields of a ``Run``, as a log keeps them.
        config: What pins the run, as in the first line of a log.
        choice: Which responses become pairs.

    Returns:
        ``prompt`` (messages), ``chosen`` and ``rejected`` (a message each, in a list), and where they come from.
    """
    pairs = choice.pairs(run["samples"])
    about = {
        "prompt_id": run["prompt"],
        "method": config["methods"][run["method"]],
        "seed": run["seed"],
        **_about(config, choice),
    }
    return [
        {
            "prompt": [dict(turn) for turn in run["messages"]],
            **_sides(chosen, rejected),
            "pair": number,
            "pairs": len(pairs),
            **about,
        }
        for number, (chosen, rejected) in enumerate(pairs)
    ]


def _sides(chosen: Row, rejected: Row) -> Row:
    """Message, rewards and place of both samples; first the columns that trainers read."""
    named = {"chosen": chosen, "rejected": rejected}
    messages = {name: [{"role": "assistant", "content": sample["text"]}] for name, sample in named.items()}
    numbers = {f"{name}_{kind}": sample[kind] for name, sample in named.items() for kind in ("reward", "gold")}
    places = {f"{name}_sample": [sample["iteration"], sample["row"]] for name, sample in named.items()}
    return {**messages, **numbers, **places}


def _about(config: Mapping[str, Any], choice: Choice) -> Row:
    """What all pairs of a file share; ``export`` is a hash of everything that pins them."""
    pinned = json.dumps([config, repr(choice)], sort_keys=True)
    return {
        "model": config["model"],
        "revision": config.get("revision"),
        "adapter": config.get("adapter"),
        "reward": config["reward"]["name"],
        "reward_fingerprint": config["reward"]["fingerprint"],
        "choice": repr(choice),
        "export": hashlib.sha256(pinned.encode()).hexdigest()[:16],
        "version": config["version"],
    }


def _resume(path: Path, export: Export, config: Row) -> int:
    """How many searches are done; what a killed process left of the last one is cut off."""
    lines = _whole_lines(path)
    rows = [_parsed(line, path) for line in lines]
    if rows and rows[-1]["pair"] + 1 < rows[-1]["pairs"]:
        unfinished = rows[-1]["pair"] + 1
        del rows[-unfinished:], lines[-unfinished:]
    if path.exists():
        _require_same(rows, export, config, path)
        os.truncate(path, sum(map(len, lines)))
    if not rows:
        return 0
    keys = [(prompt.id, seed, arm.settings) for prompt, seed, arm in export.searches]
    return keys.index((rows[-1]["prompt_id"], rows[-1]["seed"], rows[-1]["method"])) + 1


def _require_same(rows: Sequence[Row], export: Export, config: Row, path: Path) -> None:
    wanted = _about(config, export.choice)
    unlike = {name: row[name] for row in rows for name in _ABOUT if row[name] != wanted[name]}
    told = "; ".join(f"{name} was {value!r} and is {wanted[name]!r}" for name, value in unlike.items())
    require(
        not unlike,
        f"{path} was begun with another export: {told}. The hash 'export' also stands for prompts, seeds and methods. "
        "Ask for the same again to go on with it, or write to another file",
    )


def _parsed(line: bytes, path: Path) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path} holds a line that is no JSON: {error}; write to another file") from error
    known = isinstance(row, dict) and {"pair", "pairs", "prompt_id", "seed", "method", *_ABOUT} <= row.keys()
    require(known, f"{path} is no file of pairs that this command wrote; write to another file")
    return row  # type: ignore[no-any-return]


def _whole_lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [line for line in file if line.endswith(b"\n")]


def _append(path: Path, rows: Sequence[Row]) -> None:
    """Write rows and wait until they are on the disk."""
    with path.open("ab") as file:
        file.write(b"".join(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())
