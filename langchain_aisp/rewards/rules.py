"""Rules a text must keep, as a reward: patterns, topics, length, personal data. Each says what it found, and where."""

from __future__ import annotations

import re
import unicodedata
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from math import isfinite
from typing import Literal, Protocol, TypeAlias

from torch import Tensor

from langchain_aisp.rewards.asking import Settled
from langchain_aisp.rewards.base import shorten
from langchain_aisp.rewards.callable import CallableReward
from langchain_aisp.rewards.fingerprint import stable_fingerprint
from langchain_aisp.rewards.foreign import settled_fingerprint
from langchain_aisp.types import Chat, Response, Ticket, require

PersonalData: TypeAlias = Literal["email", "phone", "card", "iban"]
Unit: TypeAlias = Literal["characters", "words"]

PERSONAL_DATA: tuple[PersonalData, ...] = ("email", "phone", "card", "iban")


class Finder(Protocol):
    """Looks for one thing in a text."""

    def find(self, text: str) -> tuple[str, ...]:
        """The passages that were found; empty when there are none."""

    @property
    def identity(self) -> str | None:
        """A text that two finders share only if they find the same; None if that cannot be promised."""


@dataclass(frozen=True)
class Rule:
    """One thing that a text must have, or must not have.

    Functions make the usual ones: ``must_match``, ``must_not_match``, ``must_satisfy``, ``length_between``,
    ``no_topic`` and ``no_personal_data``.

    Attributes:
        name: Short name, unique within a reward.
        finder: Looks for the thing.
        wanted: True: a text without it breaks the rule. False: a text with it does.
        weight: What breaking the rule costs, in units of the reward.
        reason: What is told of a text that breaks it, to be read after "the answer".
    """

    name: str
    finder: Finder
    wanted: bool
    weight: float = 1.0
    reason: str = "breaks a rule"

    def __post_init__(self) -> None:
        """Reject rules without a name or with a weight that is no cost."""
        require(bool(self.name.strip()), "a rule needs a name")
        require(isfinite(self.weight) and self.weight > 0, f"weight must be positive, got {self.weight}; it is a cost")

    def check(self, text: str) -> Violation | None:
        """How a text breaks the rule; None when it keeps it."""
        passages = self.finder.find(text)
        return None if bool(passages) == self.wanted else Violation(self, passages)

    @property
    def identity(self) -> str | None:
        """A text that two rules share only if they judge alike; None if that cannot be promised."""
        about = self.finder.identity
        return None if about is None else repr((about, self.wanted, self.weight))


@dataclass(frozen=True)
class Violation:
    """A rule that a text breaks.

    Attributes:
        rule: The rule.
        passages: What in the text breaks it; empty when something is missing.
    """

    rule: Rule
    passages: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The reason in one line."""
        found = "".join(f" ({shorten(passage)!r})" for passage in self.passages[:1])
        return f"{self.rule.name}: the answer {self.rule.reason}{found}"


@dataclass(frozen=True, eq=False)
class RuleReward(Settled):
    """Minus the weights of the rules that a candidate breaks: 0 for one that keeps them all.

    Attributes:
        rules: The rules.
        name: For error messages.
        fingerprint: Identity for cache keys; unless given, a hash of the rules, or one of this process if a rule's
            function has no stable description.
    """

    rules: Sequence[Rule]
    _: KW_ONLY
    name: str = "rules"
    fingerprint: str = ""
    _reward: CallableReward = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Reject no rules, and two of one name."""
        rules = tuple(self.rules)
        names = [rule.name for rule in rules]
        require(len(rules) > 0, "RuleReward needs at least one rule, such as no_personal_data()")
        require(len(set(names)) == len(names), f"every rule needs a name of its own, got {names}; pass name=...")
        derived = settled_fingerprint("rules", *(rule.identity for rule in rules))
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "fingerprint", self.fingerprint or derived)
        object.__setattr__(self, "_reward", CallableReward(self._scores, self.name))

    def explain(self, text: str) -> tuple[Violation, ...]:
        """The rules that a text breaks, in the order of the rules."""
        return tuple(violation for rule in self.rules if (violation := rule.check(text)) is not None)

    def submit(
        self, pairs: Sequence[tuple[Chat, Response]], *, loop: AbstractEventLoop | None = None
    ) -> Ticket[Tensor]:
        """Start checking, in a worker thread.

        Args:
            pairs: Conversations and candidates; only the text of a candidate is read.
            loop: Not needed, nothing here is awaited.

        Returns:
            A ticket for [len(pairs)] float32. Its errors are ``RewardError``.
        """
        return self._reward.submit(pairs, loop=loop)

    def _scores(self, chat: Chat, texts: Sequence[str]) -> list[float]:
        return [-sum(violation.rule.weight for violation in self.explain(text)) for text in texts]


def must_match(pattern: str, *, name: str = "", weight: float = 1.0, ignore_case: bool = True) -> Rule:
    """A text must hold what a regular expression finds.

    Raises:
        ValueError: For an expression that Python cannot read.
    """
    reason = f"has no match of {pattern!r}"
    return Rule(name or f"must match {pattern}", _Pattern(pattern, ignore_case), True, weight, reason)


def must_not_match(pattern: str, *, name: str = "", weight: float = 1.0, ignore_case: bool = True) -> Rule:
    """A text must not hold what a regular expression finds.

    Raises:
        ValueError: For an expression that Python cannot read.
    """
    reason = f"has a match of {pattern!r}"
    return Rule(name or f"must not match {pattern}", _Pattern(pattern, ignore_case), False, weight, reason)


def must_satisfy(predicate: Callable[[str], bool], *, name: str = "", weight: float = 1.0) -> Rule:
    """A text must make a function return True."""
    called = name or getattr(predicate, "__name__", type(predicate).__name__)
    return Rule(called, _Predicate(predicate), True, weight, f"does not satisfy {called}")


def length_between(
    shortest: int = 0, longest: int | None = None, *, unit: Unit = "words", name: str = "length", weight: float = 1.0
) -> Rule:
    """A text must have from ``shortest`` to ``longest`` words or characters, both included."""
    upper = "" if longest is None else f" to {longest}"
    return Rule(name, _Length(shortest, longest, unit), True, weight, f"is not {shortest}{upper} {unit} long")


def no_topic(*words: str, name: str = "", weight: float = 1.0) -> Rule:
    """A text must not hold any of some words or phrases, as whole words.

    Case, Unicode width, invisible characters and the kind of white space make no difference.
    """
    called = name or f"no {', '.join(words)}"
    return Rule(called, _Topic(words), False, weight, "speaks of what it must not")


def no_personal_data(*kinds: PersonalData, name: str = "no personal data", weight: float = 1.0) -> Rule:
    """A text must not hold e-mail addresses, telephone numbers, payment cards (Luhn) or IBANs (mod 97).

    It is a safety net, not a proof: names and postal addresses have no pattern, and local telephone numbers without
    a leading 0, a country code or the American grouping are not told from other numbers.

    Args:
        kinds: What to look for; all of it unless given.
        name: Name of the rule.
        weight: Cost of breaking it.
    """
    return Rule(name, _Personal(kinds or PERSONAL_DATA), False, weight, "has personal data")


@dataclass(frozen=True)
class _Pattern:
    """Finds what a regular expression matches."""

    pattern: str
    ignore_case: bool = True

    def __post_init__(self) -> None:
        try:
            self._compiled  # noqa: B018
        except re.error as error:
            raise ValueError(f"{self.pattern!r} is no regular expression: {error}; re.escape() quotes text") from error

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(self.pattern, re.IGNORECASE if self.ignore_case else 0)

    def find(self, text: str) -> tuple[str, ...]:
        return tuple(found[0] for found in self._compiled.finditer(text))

    @property
    def identity(self) -> str:
        return repr((type(self).__name__, self.pattern, self.ignore_case))


@dataclass(frozen=True)
class _Predicate:
    """Finds the whole text when a function says so."""

    predicate: Callable[[str], bool]

    def find(self, text: str) -> tuple[str, ...]:
        return (text,) if self.predicate(text) else ()

    @property
    def identity(self) -> str | None:
        return stable_fingerprint(self.predicate)


@dataclass(frozen=True)
class _Length:
    """Finds the whole text when its length is within limits."""

    shortest: int
    longest: int | None
    unit: Unit

    def __post_init__(self) -> None:
        require(self.shortest >= 0, f"shortest must not be negative, got {self.shortest}")
        fits = self.longest is None or self.longest >= self.shortest
        require(fits, f"longest must be at least shortest ({self.shortest}), got {self.longest}")
        require(self.unit in ("characters", "words"), f"unit is 'characters' or 'words', got {self.unit!r}")

    def find(self, text: str) -> tuple[str, ...]:
        length = len(text.split()) if self.unit == "words" else len(text)
        return (text,) if self.shortest <= length and (self.longest is None or length <= self.longest) else ()

    @property
    def identity(self) -> str:
        return repr(self)


@dataclass(frozen=True)
class _Topic:
    """Finds words and phrases, however they are written."""

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        require(bool(self.words) and all(map(plain, self.words)), f"topics must be words, got {self.words}")

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile("|".join(rf"(?<!\w){re.escape(plain(word))}(?!\w)" for word in self.words))

    def find(self, text: str) -> tuple[str, ...]:
        return tuple(found[0] for found in self._compiled.finditer(plain(text)))

    @property
    def identity(self) -> str:
        return repr((type(self).__name__, self.words))


@dataclass(frozen=True)
class _Personal:
    """Finds personal data that has a form."""

    kinds: tuple[PersonalData, ...]

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in _PERSONAL]
        require(not unknown, f"personal data of the kind {unknown} is not known; known are {list(_PERSONAL)}")

    def find(self, text: str) -> tuple[str, ...]:
        visible = _visible(text)
        return tuple(passage for kind in self.kinds for passage in _PERSONAL[kind](visible))

    @property
    def identity(self) -> str:
        return repr(self)


def _visible(text: str) -> str:
    """The text in Unicode's compatible form (full-width digits become plain ones), without invisible characters."""
    compatible = unicodedata.normalize("NFKC", text)
    return "".join(character for character in compatible if unicodedata.category(character) != "Cf")


def plain(text: str) -> str:
    """The visible text without case and with single spaces."""
    return " ".join(_visible(text).casefold().split())


_EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?!\w)")
_PHONE = re.compile(
    r"(?<![\w+])(?<!\d[ -])(?:"
    r"(?:\+|00)[1-9](?:[ .()/-]{0,2}\d){6,14}"  # with a country code
    r"|\(?0\d{1,4}\)?(?:[ ./-]{1,3}\d{2,8}){1,4}"  # with a trunk 0 and groups
    r"|\(?[2-9]\d{2}\)?[ .-]{1,2}\d{3}[ .-]\d{4}"  # the American grouping
    r")(?!\w)"
)
_DAY_OR_MONTH = r"(?:0?[1-9]|[12]\d|3[01])"
_DATE = re.compile(rf"(?<![\w.+/-]){_DAY_OR_MONTH}([./-]){_DAY_OR_MONTH}\1(?:(?:19|20)?\d{{2}})?(?![./-]?\d)")
_DIGIT_GROUPS = re.compile(r"(?<!\w)\d+(?:[ -]\d+)*(?!\w)")
_IBAN_GROUPS = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]+){1,40}(?!\w)", re.IGNORECASE)


def _emails(text: str) -> Iterator[str]:
    return (found[0] for found in _EMAIL.finditer(text))


def _phones(text: str) -> Iterator[str]:
    """Seven to fifteen digits, as the numbering plan has it, outside of dates."""
    undated = _DATE.sub(lambda found: "x" * len(found[0]), text)
    for found in _PHONE.finditer(undated):
        if 7 <= sum(map(str.isdigit, found[0])) <= 15:
            yield found[0]


def _cards(text: str) -> Iterator[str]:
    """Thirteen to nineteen digits, alone or among further groups of digits, whose check digit is right."""
    return _among_groups(_DIGIT_GROUPS, text, _is_card)


def _ibans(text: str) -> Iterator[str]:
    """A country, two check digits that are right, and the account; further words may follow."""
    return _among_groups(_IBAN_GROUPS, text, _is_iban)


def _among_groups(run: re.Pattern[str], text: str, accept: Callable[[str], bool]) -> Iterator[str]:
    """The first and longest stretches of whole groups, within runs of groups, that are accepted without separators."""
    for found in run.finditer(text):
        groups = list(re.finditer(r"[^ -]+", found[0]))
        start = 0
        while start < len(groups):
            ends = range(min(len(groups), start + _MOST_GROUPS), start, -1)
            stretches = ((end, found[0][groups[start].start() : groups[end - 1].end()]) for end in ends)
            end, passage = next(((end, part) for end, part in stretches if accept(_joined(part))), (start + 1, ""))
            if passage:
                yield passage
            start = end


_MOST_GROUPS = 19  # of single digits, in the longest card number


def _joined(passage: str) -> str:
    return passage.replace(" ", "").replace("-", "").upper()


def _is_card(digits: str) -> bool:
    """The Luhn check of ISO/IEC 7812, and a first digit that payment cards have."""
    if not (13 <= len(digits) <= 19 and digits[0] in "23456"):
        return False
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return sum(value - 9 * (value > 9) for value in doubled) % 10 == 0


def _is_iban(code: str) -> bool:
    """The check of ISO 13616: with the first four characters behind and letters as numbers, 1 modulo 97."""
    if not code.isascii() or len(code) != _IBAN_LENGTHS.get(code[:2]):
        return False
    return int("".join(str(int(sign, 36)) for sign in code[4:] + code[:4])) % 97 == 1


# Of the countries in the registry of ISO 13616: every country has one length, which rules most accidents out.
_COUNTRIES_BY_LENGTH = {
    15: "NO",
    16: "BE",
    18: "DK FI FO GL NL",
    19: "MK SI",
    20: "AT BA EE KZ LT LU XK",
    21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS VA",
    23: "AE GI IL IQ TL",
    24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "LY PT ST",
    26: "IS TR",
    27: "FR GR IT MC MR SM",
    28: "AL AZ BY CY DO GT HU LB PL SV",
    29: "BR EG PS QA UA",
    30: "JO KW MU",
    31: "MT SC",
    32: "LC",
}
_IBAN_LENGTHS = {country: length for length, listed in _COUNTRIES_BY_LENGTH.items() for country in listed.split()}

_PERSONAL: dict[PersonalData, Callable[[str], Iterable[str]]] = {
    "email": _emails,
    "phone": _phones,
    "card": _cards,
    "iban": _ibans,
}
