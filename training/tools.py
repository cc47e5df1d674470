"""What the demo's reward model learns about tools: whether an answer tells what they returned."""

from collections.abc import Iterator
from random import Random

from langchain_aisp.demo.scenarios import draft, scenario
from langchain_aisp.demo.tool_dialogues import tool_dialogue
from training.rows import Encoder, Judged, Row


def judged(encoder: Encoder, rng: Random) -> Iterator[Row]:
    """Endless rows: final answers that use what the tools returned, and answers that do not."""
    while True:
        made = tool_dialogue("train", rng)
        foreign = draft(scenario("train", rng), rng).text
        bad = [*(Judged.whole(text, 2.0) for text in made.wrong), Judged.whole(foreign, 1.0), Judged.whole("", -1.5)]
        yield encoder.judged(made.answered, [*(Judged.whole(text, 5.0) for text in made.answers), *bad])
