"""Whether words, passages or numbers occur in texts: case, spaces and thousands separators aside."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any

from langchain_aisp.rewards.rules import plain


@dataclass(frozen=True)
class Said:
    """What texts say.

    Attributes:
        text: All of it, without case and with single spaces.
        numbers: The numbers in it.
    """

    text: str
    numbers: frozenset[Decimal]

    def holds(self, value: str | float | Decimal) -> bool:
        """Whether a passage or number was said."""
        return self._holds_text(plain(value)) if isinstance(value, str) else Decimal(str(value)) in self.numbers

    def _holds_text(self, passage: str) -> bool:
        """Whether the passage occurs, not as a part of a longer word or number."""
        found = (match.span() for match in re.finditer(re.escape(passage), self.text))
        return any(not (self._goes_on(start) or self._goes_on(end)) for start, end in found)

    def _goes_on(self, at: int) -> bool:
        """Whether a word or number goes on across this place; scripts without case have no spaces, or do not tell."""
        before, after = self.text[max(at - 2, 0) : at], self.text[at : at + 2]
        beside = before[-1:] + after[:1]
        within_word = len(beside) == 2 and all(sign.islower() or sign.isdigit() for sign in beside)
        return within_word or any(map(_PARTED.fullmatch, (before + after[:1], before[-1:] + after)))


_PARTED = re.compile(r"\d[.,]\d")
# A sign that follows a digit is a hyphen, not a minus; commas part groups of three digits.
_NUMBER = re.compile(r"(?<!\w)-?\d+(?:,\d{3})*(?:\.\d+)?")
_WORD = re.compile(r"(?:(?<!\w)-(?=\d))?\w+(?:[.,:/@-]\w+)*")
_QUOTED = re.compile(
    "|".join(
        [rf"(?<!\w){mark}(?=\S)(.+?)(?<=\S){mark}(?!\w)" for mark in "\"'"]  # none within a word, as in "don't"
        + [f"{opening}(.+?)[{closing}]" for opening, closing in ("“”", "\u2018\u2019", "«»", "「」", ("„", "“”"))]
    )
)
_NUMERALS = "zero one two three four five six seven eight nine ten eleven twelve".split()


@lru_cache(maxsize=64)
def said_in(texts: tuple[str, ...]) -> Said:
    """What texts say; a wave asks about hundreds of calls in one conversation."""
    text = "\n".join(map(plain, texts))
    words = set(re.findall(r"\w+", text))
    digits = {Decimal(found.replace(",", "")) for found in _NUMBER.findall(text)}
    return Said(text, frozenset(digits | {Decimal(value) for value, word in enumerate(_NUMERALS) if word in words}))


def number_in(word: str) -> Decimal | None:
    """The number that a word is, as numbers are looked for in texts; None if it is none."""
    return Decimal(word.replace(",", "")) if _NUMBER.fullmatch(word) else None


@lru_cache(maxsize=64)
def spelled_out(text: str) -> tuple[str | Decimal, ...]:
    """What a text spells out letter by letter: passages in quotes, numbers, words with a digit or an underscore."""
    quoted = [match[match.lastindex or 0] for match in _QUOTED.finditer(text)]
    words = [word for word in _WORD.findall(_QUOTED.sub(" ", text)) if re.search(r"[\d_]", word)]
    values = (word if (number := number_in(word)) is None else number for word in quoted + words if plain(word))
    return tuple(dict.fromkeys(values))


def values_in(value: Any) -> Iterator[str | float]:
    """The strings and numbers in a value, however deep; truth values, null and blank strings are left out."""
    if isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from values_in(item)
    elif (isinstance(value, str) and plain(value)) or type(value) in (int, float):  # a truth value is an int, too
        yield value
