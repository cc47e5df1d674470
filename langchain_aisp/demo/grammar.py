"""Small phrase grammars that both write and recognise text.

A pattern such as ``"I am (so|very) sorry, {name}"`` offers one choice per pair of brackets and slots in braces.
Every realisation belongs to one split by a stable hash, so held-out phrasings are new combinations of known words.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from random import Random

_BUCKETS = ("train",) * 8 + ("dev", "test")
SPLITS = ("train", "dev", "test")
_CHOICE = re.compile(r"\(([^()]*)\)")
_SLOT = re.compile(r"\{(\w+)\}")


def split_of(text: str) -> str:
    """Returns the split of a realisation or a slot value: 80 % train, 10 % dev, 10 % test."""
    digest = hashlib.blake2b(text.lower().encode(), digest_size=4).digest()
    return _BUCKETS[int.from_bytes(digest, "big") % len(_BUCKETS)]


@cache
def values_of(split: str, values: tuple[str, ...]) -> tuple[str, ...]:
    """Keeps the slot values that belong to `split`."""
    return tuple(value for value in values if split_of(value) == split)


@dataclass(frozen=True)
class Pattern:
    """One pattern; `source` holds choices ``(a|b|)`` without nesting and slots ``{slot}``."""

    source: str

    @cached_property
    def choices(self) -> tuple[tuple[str, ...], ...]:
        """The alternatives of each piece; plain text is a piece with one alternative."""
        pieces = _CHOICE.split(self.source)
        return tuple(tuple(piece.split("|")) if index % 2 else (piece,) for index, piece in enumerate(pieces))

    @cached_property
    def slots(self) -> frozenset[str]:
        """Names of the slots in the pattern."""
        return slots_of(self.source)

    def realisations(self) -> Iterator[str]:
        """All realisations, slots still unfilled."""
        return ("".join(choice) for choice in product(*self.choices))

    @cached_property
    def by_split(self) -> dict[str, tuple[str, ...]]:
        """All realisations, by the split they belong to."""
        found: dict[str, list[str]] = {split: [] for split in SPLITS}
        for text in self.realisations():
            found[split_of(text)].append(text)
        return {split: tuple(texts) for split, texts in found.items()}

    def draw(self, rng: Random) -> str:
        """Draws a realisation, slots still unfilled."""
        return "".join(rng.choice(piece) for piece in self.choices)

    def expression(self, slots: Mapping[str, str]) -> str:
        """The regular expression of all realisations in lower case; `slots` maps a slot to its expression."""
        pieces = [sorted(piece, key=len, reverse=True) for piece in self.choices]  # the longest choice matches first
        pieces[-1] = [choice.rstrip("?!") for choice in pieces[-1]]  # a sentence may end otherwise inside another
        return "".join(f"(?:{'|'.join(_literal(choice, slots) for choice in piece)})" for piece in pieces)


def _literal(text: str, slots: Mapping[str, str]) -> str:
    pieces = _SLOT.split(text.lower())
    return "".join(slots[piece] if index % 2 else re.escape(piece) for index, piece in enumerate(pieces))


def slots_of(text: str) -> frozenset[str]:
    """Names of the slots in a pattern or a realisation."""
    return frozenset(_SLOT.findall(text))


@dataclass(frozen=True)
class Grammar:
    """A few patterns for one idea."""

    patterns: tuple[Pattern, ...]

    @classmethod
    def of(cls, *sources: str) -> "Grammar":
        """Builds a grammar from pattern sources."""
        return cls(tuple(Pattern(source) for source in sources))

    def where(self, keep: Callable[[frozenset[str]], bool]) -> "Grammar":
        """Keeps the patterns whose set of slots passes `keep`."""
        return Grammar(tuple(pattern for pattern in self.patterns if keep(pattern.slots)))

    def draw(self, rng: Random, split: str | None = None) -> str:
        """Draws a realisation, slots still unfilled; of `split` if given.

        Raises:
            ValueError: if the grammar is too small to have a realisation in `split`.
        """
        if split is None:
            return rng.choice(self.patterns).draw(rng)
        filled = [texts for pattern in self.patterns if (texts := pattern.by_split[split])]
        if not filled:
            raise ValueError(f"The grammar {self.patterns!r} has no realisation in the split {split!r}. Add choices.")
        return rng.choice(rng.choice(filled))

    def finders(self, slots: Mapping[str, str]) -> tuple[re.Pattern[str], ...]:
        """One compiled expression per pattern, to search in lower-case text at word boundaries."""
        return tuple(re.compile(rf"\b{pattern.expression(slots)}(?!\w)") for pattern in self.patterns)
