"""Prompts to evaluate on: HH-RLHF, SHP, the demo's scenarios, or any file of JSON lines.

Where rows come from (hub, folder, file) and what they hold (four formats) are apart: every source gives rows, and the
keys of a row tell which reader makes prompts of it. Nothing of other people's data ships with the package.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

from langchain_aisp.demo import Facts, Scenario, compose, gold_reward, scenarios
from langchain_aisp.rewards import as_reward
from langchain_aisp.types import Chat, Reward, require

HH_RLHF = "Anthropic/hh-rlhf"
SHP = "stanfordnlp/SHP"

Row: TypeAlias = Mapping[str, Any]

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_DEMO_COUNT = 60  # scenarios are written on demand and without end


@dataclass(frozen=True)
class PromptRecord:
    """A conversation to answer.

    Attributes:
        id: Unique within its data set; it names the prompt in logs and pairs the methods.
        messages: Role/content turns, the last one not the assistant's.
        metadata: What else the data set tells of it, as JSON.
        reference: An answer that people gave or liked, where there is one.
    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None


def load_prompts(spec: str, *, limit: int | None = None, shuffle: int | None = None) -> tuple[PromptRecord, ...]:
    """The prompts that a short text names, as on the command line.

    Args:
        spec: ``demo:SPLIT``, ``hh-rlhf:SPLIT``, ``hh-rlhf/SUBSET:SPLIT``, ``shp:SPLIT``, ``shp/SUBSET:SPLIT``, or the
            path of a file of JSON lines, see ``read_prompts``.
        limit: At most so many prompts.
        shuffle: Seed of the order in which they are taken; None takes them as they come.

    Raises:
        ValueError: The text names nothing that is known.
    """
    require(limit is None or limit >= 1, f"limit must be at least 1, got {limit}; None takes all prompts")
    name, _, split = spec.partition(":")
    dataset, _, subset = name.partition("/")
    if dataset == "demo":
        records = demo_prompts(split or "dev", _DEMO_COUNT if limit is None else limit)
    elif dataset in _DATASETS and not Path(spec).exists():
        records = _DATASETS[dataset](split or "test", subset=subset or None)
    else:
        records = read_prompts(spec)
    if shuffle is not None:
        records = Random(shuffle).sample(records, len(records))
    return tuple(records[:limit])


def hh_rlhf(split: str = "test", *, subset: str | None = None, source: str = HH_RLHF) -> list[PromptRecord]:
    r"""Prompts of Anthropic's HH-RLHF (MIT licence), each once, with the chosen answer as reference.

    A prompt is all of a dialogue up to and including its last ``"\n\nAssistant:"``, as turns.

    Args:
        split: ``train`` or ``test``.
        subset: A folder of the data set such as ``harmless-base``; all of them unless given.
        source: Hub id, folder, or a file of JSON lines with ``chosen``, gzipped or not.
    """
    return _read_hh(_rows(source, subset, split), _named("hh-rlhf", subset, split))


def shp(split: str = "test", *, subset: str | None = None, source: str = SHP) -> list[PromptRecord]:
    """Posts of the Stanford Human Preferences data set, each once, with the most liked answer as reference.

    Its texts are Reddit's: they are loaded where they are used and must not be passed on.

    Args:
        split: ``train``, ``validation`` or ``test``.
        subset: A domain such as ``askculinary``; all of them unless given.
        source: Hub id, folder, or a file of JSON lines, gzipped or not.
    """
    return _read_shp(_rows(source, subset, split), _named("shp", subset, split))


def read_prompts(path: str | Path) -> list[PromptRecord]:
    """Prompts of a file of JSON lines, gzipped if its name ends in ``.gz``.

    The first line tells the format: ``messages`` (role/content dicts; a last turn of the assistant becomes the
    reference), ``prompt`` (a string, or messages), ``chosen`` (HH-RLHF) or ``history`` (SHP). Rows of the first two may
    have an ``id`` and a ``reference``; their other keys become metadata. A line that is a list is read as messages.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not JSON or has no prompt, or two rows share an id.
    """
    path = Path(path)
    if not path.is_file():
        known = "demo:SPLIT, hh-rlhf[/SUBSET]:SPLIT, shp[/SUBSET]:SPLIT"
        raise FileNotFoundError(f"there are no prompts at {path}; name a file of JSON lines, or one of {known}")
    rows = list(_lines(path))
    require(bool(rows), f"{path} holds no prompts; it needs one JSON object per line")
    reader = next((_READERS[key] for key in _READERS if key in rows[0]), None)
    if reader is None:
        raise ValueError(f"{path} has the keys {sorted(rows[0])}; one of {', '.join(_READERS)} must hold the prompt")
    return _with_unique_ids(reader(rows, path.name), str(path))


def demo_prompts(split: str = "dev", count: int = _DEMO_COUNT, *, seed: int = 0) -> list[PromptRecord]:
    """Customers of the embedded demo, with a faultless answer as reference.

    Args:
        split: ``train``, ``dev`` or ``test``; choose settings on dev and look at test once.
        count: How many; fewer are the first of more.
        seed: Other seeds give other customers.
    """
    found = enumerate(scenarios(split, count, seed))
    return [_demo_record(scenario, f"demo/{split}/{seed}/{index}") for index, scenario in found]


def demo_gold(prompts: Sequence[PromptRecord]) -> Reward:
    """The demo's exact checker as a held-out reward: the good parts of an answer, 0 to 6.

    Args:
        prompts: Those of ``demo_prompts`` that will be answered.
    """
    checkers = {_identity(prompt.messages): gold_reward(_scenario_of(prompt)) for prompt in prompts}

    def demo_checker(chat: Chat, responses: Sequence[str]) -> list[float]:
        """Good parts of each answer."""
        return checkers[_identity(chat)](tuple(chat), responses)

    return as_reward(demo_checker, name="demo gold", fingerprint="demo-gold")


def fingerprint(prompts: Sequence[PromptRecord]) -> str:
    """A hash of the prompts' ids and messages: equal for equal prompts in the same order."""
    told = json.dumps([[prompt.id, prompt.messages] for prompt in prompts], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


# -- sources ----------------------------------------------------------------------------------------------------------


def _rows(source: str, subset: str | None, split: str) -> Iterable[Row]:
    """Rows of a file of JSON lines, or of whatever ``datasets`` can load."""
    if Path(source).is_file():
        return _lines(Path(source))
    try:
        from datasets import load_dataset
    except ImportError as missing:
        message = f"loading {source} needs the package datasets: pip install 'langchain-aisp[eval]'"
        raise ImportError(message) from missing
    rows: Iterable[Row] = load_dataset(source, data_dir=subset, split=split)
    return rows


def _lines(path: Path) -> Iterator[Row]:
    """The JSON objects of a file, one a line."""
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parsed(line, f"line {number} of {path}")


def _parsed(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}; prompts are read one object per line") from error
    if isinstance(row, list):
        return {"messages": row}
    require(isinstance(row, dict), f"{where} is a {type(row).__name__}, not an object or a list of messages")
    return row  # type: ignore[no-any-return]


# -- readers ----------------------------------------------------------------------------------------------------------


def _read_chats(rows: Iterable[Row], name: str) -> list[PromptRecord]:
    """Rows with ``messages``, or with a ``prompt`` that is a text or a list of messages."""
    return [_chat_record(row, f"{name}/{index}") for index, row in enumerate(rows)]


def _chat_record(row: Row, default_id: str) -> PromptRecord:
    given = row.get("messages", row.get("prompt"))
    turns = [{"role": "user", "content": given}] if isinstance(given, str) else given
    readable = isinstance(turns, list) and all(isinstance(turn, dict) and "content" in turn for turn in turns)
    require(readable, f"row {default_id} has no prompt: it must be a text or a list of messages, got {given!r}")
    reference = row.get("reference")
    if turns and turns[-1].get("role") == "assistant":
        *turns, last = turns
        reference = last["content"] if reference is None else reference
    require(bool(turns), f"row {default_id} has no message to answer")
    rest = {key: row[key] for key in row.keys() - {"id", "messages", "prompt", "reference"}}
    return PromptRecord(str(row.get("id", default_id)), tuple(turns), rest, reference)


def _read_hh(rows: Iterable[Row], name: str) -> list[PromptRecord]:
    """Rows with a ``chosen`` dialogue; the same prompt again is left out."""
    records: dict[str, PromptRecord] = {}
    for index, row in enumerate(rows):
        prompt, answer = split_dialogue(row["chosen"])
        record = PromptRecord(f"{name}/{index}", parse_dialogue(prompt), reference=answer)
        records.setdefault(_identity(record.messages), record)
    return list(records.values())


def split_dialogue(text: str) -> tuple[str, str]:
    r"""A dialogue's prompt, up to and including its last ``"\n\nAssistant:"``, and the answer that follows."""
    start, found, answer = text.rpartition(_ASSISTANT)
    require(bool(found), f"a dialogue of HH-RLHF has {_ASSISTANT!r} in it, this one does not: {text[:80]!r}")
    return start + found, answer.strip()


def parse_dialogue(prompt: str) -> tuple[Mapping[str, str], ...]:
    r"""The turns of a text that parts them by ``"\n\nHuman:"`` and ``"\n\nAssistant:"``.

    The empty turn that the prompt ends with is left out, as other empty ones are; what one side says in several turns
    in a row becomes one turn, since chat templates want them to take turns.
    """
    _, *parts = _SPEAKER.split(prompt)
    turns: list[dict[str, str]] = []
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        role, content = _ROLES[speaker], text.strip()
        if content and turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{content}"
        elif content:
            turns.append({"role": role, "content": content})
    require(bool(turns), f"a dialogue of HH-RLHF begins with {_HUMAN!r}, this one does not: {prompt[:80]!r}")
    return tuple(turns)


def _read_shp(rows: Iterable[Row], name: str) -> list[PromptRecord]:
    """Rows with a ``history``, one for each pair of answers to a post; of each post the best answer is kept."""
    best: dict[str, tuple[float, PromptRecord]] = {}
    for row in rows:
        post = str(row["post_id"])
        liked = "A" if row["labels"] == 1 else "B"
        score = float(row.get(f"score_{liked}", 0))
        if post not in best or score > best[post][0]:
            turns = ({"role": "user", "content": row["history"]},)
            about = {"post_id": post, "domain": row.get("domain"), "reference_score": score}
            best[post] = score, PromptRecord(f"{name}/{post}", turns, about, row[f"human_ref_{liked}"])
    return [record for _, record in best.values()]


_READERS: dict[str, Callable[[Iterable[Row], str], list[PromptRecord]]] = {
    "messages": _read_chats,
    "prompt": _read_chats,
    "chosen": _read_hh,
    "history": _read_shp,
}
_DATASETS: dict[str, Callable[..., list[PromptRecord]]] = {"hh-rlhf": hh_rlhf, "shp": shp}


# -- the demo ---------------------------------------------------------------------------------------------------------


def _demo_record(scenario: Scenario, name: str) -> PromptRecord:
    about = {"intent": scenario.intent, "facts": asdict(scenario.facts), "split": scenario.split}
    answer, _ = compose(scenario, Random(name), good=1.0)
    return PromptRecord(name, scenario.messages, about, answer)


def _scenario_of(prompt: PromptRecord) -> Scenario:
    about = prompt.metadata
    require("facts" in about, f"{prompt.id} is no prompt of the demo, so its checker cannot judge the answers")
    return Scenario(about["intent"], Facts(**about["facts"]), prompt.messages, about["split"])


# -- small tools ------------------------------------------------------------------------------------------------------


def _identity(chat: Chat) -> str:
    return json.dumps([dict(turn) for turn in chat], sort_keys=True, default=str)


def _named(name: str, subset: str | None, split: str) -> str:
    return "/".join(part for part in (name, subset, split) if part)


def _with_unique_ids(records: list[PromptRecord], path: str) -> list[PromptRecord]:
    seen: set[str] = set()
    for record in records:
        require(record.id not in seen, f"{path} has two prompts with the id {record.id!r}; ids pair the methods")
        seen.add(record.id)
    return records
