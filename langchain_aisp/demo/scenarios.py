"""Writes customer-service scenarios and answers in six independent parts.

Deterministic and without torch. Slot values, phrasings of users and of answers all come from the scenario's split,
so a test scenario holds names, order numbers and sentences that no train scenario holds.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from random import Random

from langchain_aisp.demo.checker import PARTS, Checks, Facts, Message, Scenario, action_grammar, topics
from langchain_aisp.demo.grammar import SPLITS, Grammar, Pattern, slots_of, split_of, values_of
from langchain_aisp.demo.phrases import (
    ABRUPT,
    ACKNOWLEDGE,
    ASK_ORDER,
    COLOURS,
    CONNECTIVES,
    CUSTOMERS,
    FAREWELL,
    FORBIDDEN,
    GIVE_ORDER,
    GREETINGS,
    INTENTS,
    INTROS,
    MORE,
    ORDER_LINES,
    POLICIES,
    RUDE,
    SAFE,
    SHOP_HEADS,
    SHOP_KINDS,
    SHOP_TAILS,
    SIGNATURES,
    SYSTEM_HEADS,
    SYSTEM_JOINS,
    SYSTEM_PLAIN,
    TAILS,
    THINGS,
    TONE,
    UNSAFE,
    VAGUE_ACKNOWLEDGE,
    VAGUE_ACTION,
    WELCOME,
)

GOOD = 0.4  # share of good parts; 0.4 ** 6 makes a perfect answer rare
LAYOUTS = (
    ("tone", "acknowledgement", "action", "policy", "privacy", "closing"),
    ("tone", "acknowledgement", "action", "privacy", "policy", "closing"),
    ("tone", "acknowledgement", "policy", "action", "privacy", "closing"),
    ("tone", "privacy", "acknowledgement", "action", "policy", "closing"),
    ("acknowledgement", "tone", "action", "policy", "privacy", "closing"),
)
_MERGED = 0.3
_MOST_PIECES = 59
_PIECES = re.compile(r"\d|[^\W\d]+|[^\w\s]")
_BRACKETS = re.compile(r"\(([^()]*)\)")
_SHOPS = tuple(head + tail for head in SHOP_HEADS for tail in SHOP_TAILS)
_ITEMS = tuple(f"{colour} {thing}" for colour in COLOURS for thing in THINGS)


def scenarios(split: str, count: int, seed: int = 0) -> list[Scenario]:
    """Writes `count` scenarios of a split; the same arguments give the same list.

    Raises:
        ValueError: if `split` is not "train", "dev" or "test".
    """
    if split not in SPLITS:
        raise ValueError(f"Got the split {split!r}. Possible: {', '.join(SPLITS)}.")
    rng = Random(f"{split}/{seed}")
    return [scenario(split, rng) for _ in range(count)]


def scenario(split: str, rng: Random) -> Scenario:
    """Writes one scenario."""
    intent = rng.choice(tuple(INTENTS))
    facts = _facts(intent, split, rng)
    system, facts = _system(intent, facts, split, rng)
    turns = rng.choices((_one_turn, _introduced, _asked, _later), (0.6, 0.15, 0.1, 0.15))[0]
    messages = system + turns(intent, facts, split, rng)
    return Scenario(intent, facts, messages, split)


@dataclass(frozen=True)
class Draft:
    """An answer in pieces: one sentence per part, which of them are good, and how they are put together."""

    sentences: tuple[str, ...]  # in the order of PARTS
    labels: Checks
    layout: tuple[str, ...]
    merge: tuple[str, str] | None  # the part that is joined to the one before it, and the connective

    @property
    def text(self) -> str:
        """The answer as a customer reads it."""
        text = ""
        for part in self.layout:
            text = self._append(text, part)
        return text

    @property
    def pieces(self) -> int:
        """Words, digits and punctuation marks: about the number of tokens."""
        return len(_PIECES.findall(self.text))

    def _append(self, text: str, part: str) -> str:
        sentence = self.sentences[PARTS.index(part)]
        if self.merge and self.merge[0] == part and text.endswith("."):
            return text[:-1] + self.merge[1] + _lower_first(sentence)
        return f"{text} {sentence}".lstrip()


def draft(scenario: Scenario, rng: Random, good: float = GOOD) -> Draft:
    """Writes an answer whose parts are good with probability `good`, independently."""
    labels = Checks(*(rng.random() < good for _ in PARTS))
    return next(answer for answer in _drafts(scenario, labels, rng) if answer.pieces <= _MOST_PIECES)


def _drafts(scenario: Scenario, labels: Checks, rng: Random) -> Iterator[Draft]:
    """Endless phrasings of the same labels: length decides which one is taken, never whether parts are good."""
    while True:
        sentences = tuple(sentence(scenario, part, getattr(labels, part), rng) for part in PARTS)
        merged = rng.random() < _MERGED
        merge = (rng.choice(("action", "policy", "privacy")), rng.choice(CONNECTIVES)) if merged else None
        yield Draft(sentences, labels, rng.choice(LAYOUTS), merge)


def redraw(scenario: Scenario, answer: Draft, part: str, good: bool, rng: Random) -> Draft:
    """Writes one part of a draft anew and leaves the rest as it is."""
    sentences = list(answer.sentences)
    sentences[PARTS.index(part)] = sentence(scenario, part, good, rng)
    return replace(answer, sentences=tuple(sentences), labels=replace(answer.labels, **{part: good}))


def sentence(scenario: Scenario, part: str, good: bool, rng: Random) -> str:
    """Writes one part of an answer as a sentence."""
    return finish(_WRITERS[part](scenario, good, rng))


def compose(scenario: Scenario, rng: Random, good: float = GOOD) -> tuple[str, Checks]:
    """Writes an answer and returns it with the true labels of its parts."""
    answer = draft(scenario, rng, good)
    return answer.text, answer.labels


# --- parts of an answer


def _tone(scenario: Scenario, good: bool, rng: Random) -> str:
    mood = rng.choices(scenario.moods, (3, 1)[: len(scenario.moods)])[0]
    return (TONE[mood] if good else RUDE).draw(rng, scenario.split)


def _acknowledgement(scenario: Scenario, good: bool, rng: Random) -> str:
    if good:
        fitting = ACKNOWLEDGE.where(lambda slots: _fits(slots, scenario))
        return fill(fitting.draw(rng, scenario.split), _true_slots(scenario, rng))
    if rng.random() < 0.35:
        return VAGUE_ACKNOWLEDGE.draw(rng, scenario.split)
    sentence = ACKNOWLEDGE.draw(rng, scenario.split)
    return fill(sentence, _wrong_slots(scenario, slots_of(sentence), rng))


def _fits(slots: frozenset[str], scenario: Scenario) -> bool:
    stated = scenario.facts.stated.keys()
    customer_slots = slots - {"topic"}
    return customer_slots <= stated and bool(customer_slots or not stated)


def _true_slots(scenario: Scenario, rng: Random) -> dict[str, str]:
    return {**scenario.facts.stated, "topic": rng.choice(INTENTS[scenario.intent].topics)}


def _wrong_slots(scenario: Scenario, used: frozenset[str], rng: Random) -> dict[str, str]:
    """True values except one of the slots in use, and except what the customer never said."""
    false = {
        "order": order_number(scenario.split, rng, like=scenario.facts.order),
        "item": _other(values_of(scenario.split, _ITEMS), scenario.facts.item, rng),
        "name": _other(values_of(scenario.split, CUSTOMERS), scenario.facts.name, rng),
        "topic": rng.choice([topic for topic in topics() if topic not in INTENTS[scenario.intent].topics]),
    }
    slots = {**false, **_true_slots(scenario, rng)}
    if all(slots[slot] != false[slot] for slot in used):
        slot = rng.choice(sorted(used))
        slots[slot] = false[slot]
    return slots


def _action(scenario: Scenario, good: bool, rng: Random) -> str:
    if good:
        return action_grammar(scenario.intent).draw(rng, scenario.split)
    if rng.random() < 0.4:
        return VAGUE_ACTION.draw(rng, scenario.split)
    return action_grammar(_other(tuple(INTENTS), scenario.intent, rng)).draw(rng, scenario.split)


def _policy(scenario: Scenario, good: bool, rng: Random) -> str:
    policy, number = POLICIES[scenario.policy], scenario.facts.policy_number
    if good:
        return fill(policy.statement.draw(rng, scenario.split), {"n": str(number)})
    if rng.random() < 0.5:
        return fill(FORBIDDEN.draw(rng, scenario.split), {"n": str(rng.choice((20, 25, 30, 40, 50, 60, 70, 80, 90)))})
    if rng.random() < 0.7:
        wrong = rng.choice([value for value in policy.values if value != number])
        return fill(policy.statement.draw(rng, scenario.split), {"n": str(wrong)})
    other = POLICIES[_other(tuple(POLICIES), scenario.policy, rng)]
    return fill(other.statement.draw(rng, scenario.split), {"n": str(other.default)})


def _privacy(scenario: Scenario, good: bool, rng: Random) -> str:
    return (SAFE if good else UNSAFE).draw(rng, scenario.split)


def _closing(scenario: Scenario, good: bool, rng: Random) -> str:
    return (FAREWELL if good else ABRUPT).draw(rng, scenario.split)


_WRITERS = {
    "tone": _tone,
    "acknowledgement": _acknowledgement,
    "action": _action,
    "policy": _policy,
    "privacy": _privacy,
    "closing": _closing,
}


# --- conversations


def _facts(intent: str, split: str, rng: Random) -> Facts:
    physical = INTENTS[intent].physical
    return Facts(
        policy_number=POLICIES[INTENTS[intent].policy].default,
        order=order_number(split, rng) if physical and rng.random() < 0.6 else None,
        item=rng.choice(values_of(split, _ITEMS)) if physical and rng.random() < 0.6 else None,
        name=rng.choice(values_of(split, CUSTOMERS)) if rng.random() < 0.6 else None,
    )


def order_number(split: str, rng: Random, like: str | None = None) -> str:
    """Draws an order number of the split; `like` gives its length and differs from it in two digits at least."""
    digits = len(like) if like else rng.choices((4, 5, 6), (0.25, 0.6, 0.15))[0]
    while True:
        number = str(rng.randrange(10 ** (digits - 1), 10**digits))
        far = like is None or sum(a != b for a, b in zip(number, like, strict=True)) >= 2
        if far and split_of(number) == split:
            return number


def _system(intent: str, facts: Facts, split: str, rng: Random) -> tuple[tuple[Message, ...], Facts]:
    """A system prompt or none; a shop's own rule replaces the default."""
    kind = rng.choices(("shop", "plain", "none"), (0.55, 0.1, 0.35))[0]
    if kind == "none":
        return (), facts
    if kind == "plain":
        return _turns(("system", finish(SYSTEM_PLAIN.draw(rng)))), facts
    names = rng.sample([name for name in POLICIES if name != INTENTS[intent].policy], rng.randint(1, 3))
    names.insert(rng.randint(0, len(names)), INTENTS[intent].policy)
    numbers = {name: rng.choice(POLICIES[name].values) for name in names}
    rules = " ".join(finish(fill(POLICIES[name].rule.draw(rng), {"n": str(numbers[name])})) for name in names)
    slots = {"shop": rng.choice(values_of(split, _SHOPS)), "kind": rng.choice(SHOP_KINDS)}
    head = finish(fill(SYSTEM_HEADS.draw(rng), slots))
    facts = replace(facts, policy_number=numbers[INTENTS[intent].policy])
    return _turns(("system", f"{head} {rng.choice(SYSTEM_JOINS)}{rules}")), facts


def _one_turn(intent: str, facts: Facts, split: str, rng: Random) -> tuple[Message, ...]:
    return _turns(("user", _request(intent, facts, split, rng)))


def _introduced(intent: str, facts: Facts, split: str, rng: Random) -> tuple[Message, ...]:
    """The customer says hello first; the request follows."""
    if facts.name is None:
        return _one_turn(intent, facts, split, rng)
    hello = fill(INTROS.draw(rng, split), facts.stated)
    welcome = fill(WELCOME.draw(rng), facts.stated)
    request = _request(intent, replace(facts, name=None), split, rng)
    return _turns(("user", finish(hello)), ("assistant", finish(welcome)), ("user", request))


def _asked(intent: str, facts: Facts, split: str, rng: Random) -> tuple[Message, ...]:
    """The agent asks for the order number; the customer gives it."""
    if facts.order is None:
        return _one_turn(intent, facts, split, rng)
    request = _request(intent, replace(facts, order=None), split, rng)
    given = fill(GIVE_ORDER.draw(rng), facts.stated)
    return _turns(("user", request), ("assistant", finish(ASK_ORDER.draw(rng))), ("user", finish(given)))


def _later(intent: str, facts: Facts, split: str, rng: Random) -> tuple[Message, ...]:
    """One to four other requests of the same customer were answered before."""
    messages: tuple[Message, ...] = ()
    for turn in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        other = rng.choice([name for name, value in INTENTS.items() if value.physical >= INTENTS[intent].physical])
        earlier = facts if turn == 0 else replace(facts, order=None, item=None, name=None)
        request = _request(other, earlier, split, rng)
        answered = draft(Scenario(other, facts, (), split), rng)
        messages += _turns(("user", request), ("assistant", answered.text))
    request = _request(intent, replace(facts, order=None, item=None, name=None), split, rng, greet=0)
    return messages + _turns(("user", f"{MORE.draw(rng, split)} {request}"))


def _request(intent: str, facts: Facts, split: str, rng: Random, *, greet: float = 0.3) -> str:
    """The customer's message: greeting or name, request, order number, a closing line; in varied order."""
    stated = facts.stated
    says = finish(_says(INTENTS[intent].says, facts.item is not None, rng).draw(rng, split))
    if facts.item and "{item}" not in says:
        says += rng.choice((" It is about the {item}.", " I mean the {item}.", " The {item}, that is."))
    lines = [fill(says, stated)]
    if facts.order:
        lines.insert(rng.randint(0, 1), finish(fill(ORDER_LINES.draw(rng, split), stated)))
    if rng.random() < 0.3:
        lines.append(finish(TAILS.draw(rng, split)))
    return _typed(" ".join(_signed(lines, facts, split, rng, greet)), rng)


def _says(grammar: Grammar, item_known: bool, rng: Random) -> Grammar:
    """Prefers sentences that name the item where it is known, and takes the item out where it is not."""
    naming = _naming(grammar)
    if item_known and naming.patterns and rng.random() < 0.7:
        return naming
    return _nameless(grammar)


@cache
def _naming(grammar: Grammar) -> Grammar:
    return grammar.where(lambda slots: "item" in slots)


@cache
def _nameless(grammar: Grammar) -> Grammar:
    return Grammar(tuple(Pattern(_without_item(pattern.source)) for pattern in grammar.patterns))


def _without_item(source: str) -> str:
    """Writes a pattern that names no item: drops the choices with it, or says "it"."""
    pieces = _BRACKETS.sub(lambda match: f"({_choices_without_item(match[1])})", source)
    for words in ("the {item}", "my {item}", "a {item}"):
        pieces = pieces.replace(words, "it")
    return pieces.replace("{item}", "item")


def _choices_without_item(choices: str) -> str:
    kept = [choice for choice in choices.split("|") if "{item}" not in choice]
    return "|".join(kept) or choices


def _signed(lines: list[str], facts: Facts, split: str, rng: Random, greet: float) -> list[str]:
    if facts.name and rng.random() < 0.7:
        return [finish(fill(INTROS.draw(rng, split), facts.stated)), *lines]
    if facts.name:
        return [*lines, finish(fill(SIGNATURES.draw(rng), facts.stated))]
    return [capital(GREETINGS.draw(rng, split)), *lines] if rng.random() < greet else lines


def _typed(text: str, rng: Random) -> str:
    """Some customers type without capitals or full stops."""
    style = rng.random()
    text = text.lower() if style < 0.1 else text
    return text.rstrip(".") if 0.05 < style < 0.35 else text


# --- small tools


def _turns(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple({"role": role, "content": content} for role, content in turns)


def fill(text: str, slots: Mapping[str, object]) -> str:
    """Puts values into the slots of a text."""
    for slot, value in slots.items():
        text = text.replace("{" + slot + "}", str(value))
    return text


def _other(values: tuple[str, ...], value: str | None, rng: Random) -> str:
    return rng.choice([other for other in values if other != value])


def capital(text: str) -> str:
    """Starts a text with a capital."""
    return text[:1].upper() + text[1:]


def finish(sentence: str) -> str:
    """Makes a sentence of words: a capital, and a full stop where nothing else ends it."""
    sentence = capital(sentence.strip())
    return sentence if sentence[-1] in ".!?" else sentence + "."


def _lower_first(sentence: str) -> str:
    first = sentence.split(" ", 1)[0]
    return sentence if first == "I" else sentence[:1].lower() + sentence[1:]
