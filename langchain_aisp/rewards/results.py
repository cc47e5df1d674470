"""A reward of answers that follow tools' results: whether they tell what was returned."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal

from langchain_aisp.rewards.foreign import since_last_user, text_of
from langchain_aisp.rewards.said import number_in, said_in, values_in
from langchain_aisp.types import Chat

_WORD = re.compile(r"(?:(?<!\w)-(?=\d))?[^\W_]+(?:[.,:'’-][^\W_]+)*")
_JOINING = frozenset(
    "a an and are as at be been by for has have in is it its it's of on or that the this to was".split()
)


def told_results(chat: Chat, texts: Sequence[str]) -> list[float]:
    """Share of what the tools returned that an answer tells: 1 if nothing is left out, 0 if nothing is told.

    A reward as it stands, best in a sum with one that judges how an answer is said:
    ``WeightedSum([(judge, 1.0), (told_results, 5.0)])``. What was returned are the words and numbers of the tools'
    messages since the user's last one; of JSON only the values. Words that merely join others (``the``, ``is``) do not
    count, nor do case and thousands separators. Where no tool has returned anything, every answer gets 1.

    Args:
        chat: The conversation.
        texts: n answers.

    Returns:
        n numbers from 0 to 1.
    """
    tools = [message for message in since_last_user(chat) if message["role"] == "tool"]
    facts = [fact for message in tools for fact in _facts(text_of(message))]
    return [sum(map(said_in((text,)).holds, facts)) / len(facts) if facts else 1.0 for text in texts]


def _facts(result: str) -> Iterator[str | Decimal]:
    """What a result says, word by word, numbers as numbers."""
    for word in _WORD.findall(_said_by(result)):
        number = number_in(word)
        if number is not None:
            yield number
        elif word.lower() not in _JOINING:
            yield word


def _said_by(result: str) -> str:
    """The text of a result; of JSON its values only."""
    try:
        return " ".join(map(str, values_in(json.loads(result, parse_float=str))))
    except ValueError:
        return result
