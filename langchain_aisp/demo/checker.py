"""What a scenario is, and the exact checker: which of the six parts of an answer are good, for any text.

A part is good when its grammar recognises it, its slots equal the scenario's facts, and no bad marker of it occurs.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cache

from langchain_aisp.demo.grammar import Grammar
from langchain_aisp.demo.phrases import (
    ABRUPT,
    ACKNOWLEDGE,
    ACTION_LEADS,
    FAREWELL,
    FORBIDDEN,
    INTENTS,
    POLICIES,
    RUDE,
    SAFE,
    TONE,
    UNSAFE,
    VAGUE_ACKNOWLEDGE,
    VAGUE_ACTION,
)

Message = Mapping[str, str]
_NUMBER_OF_ORDER = re.compile(r"(?<!\d)\d{4,}(?!\d)")
_EDGE = " \t\n.!?,;:"


@dataclass(frozen=True)
class Facts:
    """What the conversation states, `None` where it does not; `policy_number` stands in the rule that applies."""

    policy_number: int
    order: str | None = None
    item: str | None = None
    name: str | None = None

    @property
    def stated(self) -> dict[str, str]:
        """The facts of the customer that an answer can repeat."""
        slots = {"order": self.order, "item": self.item, "name": self.name}
        return {slot: value for slot, value in slots.items() if value is not None}


@dataclass(frozen=True)
class Scenario:
    """One conversation that ends with a user turn, and what a perfect answer would use."""

    intent: str
    facts: Facts
    messages: tuple[Message, ...]
    split: str

    @property
    def policy(self) -> str:
        """Name of the rule that this intent asks for."""
        return INTENTS[self.intent].policy

    @property
    def moods(self) -> tuple[str, ...]:
        """Tones that suit the intent; thanks suit every one."""
        mood = INTENTS[self.intent].mood
        return (mood,) if mood == "neutral" else (mood, "neutral")


@dataclass(frozen=True)
class Checks:
    """Which parts of an answer are good."""

    tone: bool = False
    acknowledgement: bool = False
    action: bool = False
    policy: bool = False
    privacy: bool = False
    closing: bool = False

    @property
    def score(self) -> int:
        """Number of good parts, 0 to 6."""
        return sum(astuple(self))


PARTS = tuple(Checks.__dataclass_fields__)


def check(scenario: Scenario, text: str) -> Checks:
    """Checks any text, whoever wrote it, as an answer in the scenario."""
    text = " ".join(text.lower().split())
    return Checks(
        tone=_tone(scenario, text),
        acknowledgement=_acknowledgement(scenario, text),
        action=_action(scenario, text),
        policy=_policy(scenario, text),
        privacy=_found(SAFE, text) and not _found(UNSAFE, text),
        closing=_closing(text),
    )


def gold_reward(scenario: Scenario) -> Callable[[Sequence[Message], Sequence[str]], list[float]]:
    """Returns the exact reward of the scenario: the number of good parts, 0.0 to 6.0, per response."""

    def gold(chat: Sequence[Message], responses: Sequence[str]) -> list[float]:
        return [float(check(scenario, response).score) for response in responses]

    return gold


def topics() -> tuple[str, ...]:
    """The names of all intents' topics."""
    return tuple(topic for intent in INTENTS.values() for topic in intent.topics)


@cache
def action_grammar(intent: str) -> Grammar:
    """Full sentences of an intent's action."""
    return Grammar.of(*(ACTION_LEADS + pattern.source for pattern in INTENTS[intent].action.patterns))


def _tone(scenario: Scenario, text: str) -> bool:
    return any(_found(TONE[mood], text) for mood in scenario.moods) and not _found(RUDE, text)


def _acknowledgement(scenario: Scenario, text: str) -> bool:
    facts = scenario.facts
    if any(number != facts.order for number in _NUMBER_OF_ORDER.findall(text)):
        return False
    mentions = list(_matches(ACKNOWLEDGE, text))
    agree = all(_agrees(scenario, mention) for mention in mentions)
    enough = any(mention.keys() & facts.stated.keys() or not facts.stated for mention in mentions)
    return agree and enough and not _found(VAGUE_ACKNOWLEDGE, text)


def _agrees(scenario: Scenario, mention: Mapping[str, str]) -> bool:
    known = {slot: value.lower() for slot, value in scenario.facts.stated.items()}
    own_topics = INTENTS[scenario.intent].topics
    return all(value in own_topics if slot == "topic" else value == known.get(slot) for slot, value in mention.items())


def _action(scenario: Scenario, text: str) -> bool:
    intents = {match.lastgroup for match in _actions().finditer(text)}
    return intents == {scenario.intent} and not _found(VAGUE_ACTION, text)


def _policy(scenario: Scenario, text: str) -> bool:
    numbers = {mention["n"] for mention in _matches(POLICIES[scenario.policy].statement, text)}
    return numbers == {str(scenario.facts.policy_number)} and not _found(FORBIDDEN, text)


def _closing(text: str) -> bool:
    text = text.rstrip(_EDGE)
    ends = (match.end() for finder in _finders(FAREWELL) for match in finder.finditer(text))
    return any(end == len(text) for end in ends) and not _found(ABRUPT, text)


@cache
def _slot_expressions() -> dict[str, str]:
    words = {"order": r"\d+", "item": r"[^\W\d]+ [^\W\d]+", "name": r"[^\W\d]+", "n": r"\d+"}
    names = "|".join(re.escape(topic) for topic in sorted(topics(), key=len, reverse=True))
    return {slot: f"(?P<{slot}>{expression})" for slot, expression in {**words, "topic": names}.items()}


@cache
def _finders(grammar: Grammar) -> tuple[re.Pattern[str], ...]:
    return grammar.finders(_slot_expressions())


@cache
def _actions() -> re.Pattern[str]:
    lead = Grammar.of(ACTION_LEADS).patterns[0].expression({})
    tails = (
        f"(?P<{name}>{'|'.join(pattern.expression({}) for pattern in intent.action.patterns)})"
        for name, intent in INTENTS.items()
    )
    return re.compile(rf"\b{lead}(?:{'|'.join(tails)})(?!\w)")


def _found(grammar: Grammar, text: str) -> bool:
    return any(finder.search(text) for finder in _finders(grammar))


def _matches(grammar: Grammar, text: str) -> Iterator[dict[str, str]]:
    return (match.groupdict() for finder in _finders(grammar) for match in finder.finditer(text))
