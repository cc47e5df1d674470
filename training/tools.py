"""What the demo's models learn about tools: rows for the language model and comparisons for the reward model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

from langchain_aisp.demo import tool_dialogues
from langchain_aisp.demo.chitchat import TALKS, chat
from langchain_aisp.demo.scenarios import draft, scenario
from langchain_aisp.demo.tool_dialogues import Call, tool_dialogue
from langchain_aisp.demo.toolbox import ARGUMENTS
from langchain_aisp.tools.formats import DEMO
from training.rows import Encoder, Judged, Row

LESSONS = 6  # in a row of them
WRONG = 0.15  # share of final answers that a reward should reject
JSON = 0.08  # share of rows that answer in JSON
IN_JSON = ("Answer in JSON.", "As JSON, please.", "Reply with a JSON object.", "Give me JSON.")


def written(encoder: Encoder, rng: Random) -> Iterator[Row]:
    """Endless rows for the language model: calls, answers that follow their results, and answers in JSON."""
    while True:
        if rng.random() < JSON:
            yield _in_json(encoder, rng)
            continue
        made = tool_dialogue("train", rng)
        answers = [rng.choice(made.wrong) if rng.random() < WRONG else answer for answer in made.answers]
        if made.calls:
            yield encoder.written(made.messages, [calls_text(made.calls)], made.schemas)
        yield encoder.written(made.answered, answers, made.schemas)


def lessons(encoder: Encoder, rng: Random) -> Iterator[Row]:
    """Endless rows of short dialogues: whom to call, what to copy, what to tell of the result, and little else."""
    while True:
        made = tool_dialogues.lessons("train", rng, LESSONS)
        yield encoder.dialogues(made, made[0].schemas)


def judged(encoder: Encoder, rng: Random) -> Iterator[Row]:
    """Endless rows for the reward model: final answers that use what the tools returned, and answers that do not."""
    while True:
        made = tool_dialogue("train", rng)
        foreign = draft(scenario("train", rng), rng).text
        bad = [*(Judged.whole(text, 2.0) for text in made.wrong), Judged.whole(foreign, 1.0), Judged.whole("", -1.5)]
        yield encoder.judged(made.answered, [*(Judged.whole(text, 5.0) for text in made.answers), *bad])


def calls_text(calls: Sequence[Call]) -> str:
    """Calls as the demo model writes them."""
    return DEMO.write([(call.name, call.arguments) for call in calls])


def _in_json(encoder: Encoder, rng: Random) -> Row:
    """An answer that is a JSON object: strings, numbers and truth values, all short, with keys of any kind."""
    name, says, answer = chat(rng)
    answers = [_object([answer, *(TALKS[name].answers.draw(rng, "train") for _ in range(3))], rng) for _ in range(3)]
    return encoder.written([{"role": "user", "content": f"{says} {rng.choice(IN_JSON)}"}], answers)


def _object(texts: Sequence[str], rng: Random) -> str:
    keys = rng.sample(ARGUMENTS, rng.randint(1, 4))
    found: Mapping[str, Any] = {key: _value(text, rng) for key, text in zip(keys, texts, strict=False)}
    return json.dumps(found, ensure_ascii=False)


def _value(text: str, rng: Random) -> Any:
    words = text.split()
    return rng.choice((text, " ".join(words[: rng.randint(1, 4)]), rng.randrange(100), rng.random() < 0.5, words[:2]))
