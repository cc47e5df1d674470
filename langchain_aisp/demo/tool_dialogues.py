"""Dialogues with tools: what is asked, which calls are right, what the tools return, what a good answer says.

Deterministic and without torch. Tools, values and phrasings come from one split, so a test dialogue holds tools that no
training dialogue holds. Half of the dialogues are about made-up tools, which can only be called by reading the prompt;
the rest are a shop's: orders, refunds, appointments, and requests that need no tool or lack a number.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from langchain_aisp.demo.checker import Message
from langchain_aisp.demo.chitchat import chat
from langchain_aisp.demo.grammar import split_of, values_of
from langchain_aisp.demo.phrases import ASK_ORDER, CUSTOMERS, FAREWELL, GREETINGS, INTROS, RUDE, TONE
from langchain_aisp.demo.scenarios import capital, fill, finish, order_number, scenario
from langchain_aisp.demo.tool_phrases import (
    ABOUT,
    ANSWERS,
    AWAY,
    BARE,
    DOING,
    ERRORS,
    FAILURES,
    LACKING,
    NAMED,
    REMARKS,
    SERVICES,
    STATES,
    WEATHER,
    Service,
)
from langchain_aisp.demo.toolbox import DAYS, OBJECTS, Argument, Tool, foreign, made_up, place, tool

MOST_TOOLS = 4
LETTERS = "ABCDEFGHKLMNPRSTX"  # of codes
KINDS = {"made_up": 45, "service": 25, "parallel": 6, "no_tool": 14, "incomplete": 5, "failed": 5}

Turn = Mapping[str, Any]  # a message, with "tool_calls" in an assistant's that calls


@dataclass(frozen=True)
class Call:
    """A right call."""

    name: str
    arguments: Mapping[str, Any]

    @property
    def openai(self) -> dict[str, Any]:
        """The call in the form of the OpenAI API, its arguments as a dict."""
        return {"type": "function", "function": {"name": self.name, "arguments": dict(self.arguments)}}


@dataclass(frozen=True)
class ToolDialogue:
    """One request with the tools at hand.

    Attributes:
        tools: What may be called.
        messages: The conversation, the customer's turn last.
        answers: Good final answers.
        wrong: Final answers that a good labeller rejects: a false value, or rude and empty.
        calls: The right calls; empty where an answer needs none.
        results: What each call returns.
        mentions: What of the results a good final answer says.
        kind: One of ``KINDS``.
    """

    tools: tuple[Tool, ...]
    messages: tuple[Message, ...]
    answers: tuple[str, ...]
    wrong: tuple[str, ...]
    calls: tuple[Call, ...] = ()
    results: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()
    kind: str = ""

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The tools in the form of the OpenAI API."""
        return [each.schema for each in self.tools]

    @property
    def answered(self) -> tuple[Turn, ...]:
        """The conversation up to the results of the calls, which the final answer follows."""
        if not self.calls:
            return self.messages
        calling = {"role": "assistant", "content": "", "tool_calls": [call.openai for call in self.calls]}
        return (*self.messages, calling, *({"role": "tool", "content": result} for result in self.results))

    def uses_results(self, text: str) -> bool:
        """Whether a final answer says what the tools returned."""
        return all(
            re.search(rf"(?<![\w.]){re.escape(mention)}(?!\w)", text, re.IGNORECASE) for mention in self.mentions
        )


def tool_dialogues(split: str, count: int, seed: int = 0) -> list[ToolDialogue]:
    """Writes `count` dialogues of a split; the same arguments give the same list."""
    rng = Random(f"tools/{split}/{seed}")
    return [tool_dialogue(split, rng) for _ in range(count)]


def tool_dialogue(split: str, rng: Random, kind: str | None = None) -> ToolDialogue:
    """Writes one dialogue, of `kind` if given."""
    kind = kind or rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
    drafts = iter(lambda: _WRITERS[kind](split, rng), None)
    return next(
        replace(made, kind=kind) for made in drafts if not (made.mentions and any(map(made.uses_results, made.wrong)))
    )


def lessons(split: str, rng: Random, count: int) -> list[ToolDialogue]:
    """Writes `count` dialogues with the same tools at hand, each of one short request: what has to be read, no more."""
    made_up = _among(_tool(split, rng), split, rng, odds=(1, 3, 3, 2))
    asked: list[Tool | Service] = [*made_up, *(service for service in SERVICES if rng.random() < 0.25)]
    tools = tuple(each.tool if isinstance(each, Service) else each for each in rng.sample(asked, len(asked)))
    dialogues = (_with(rng.choice(asked), split, rng) for _ in range(count))
    return [replace(made, tools=tools, messages=made.messages[-1:]) for made in dialogues]


def _with(asked: Tool | Service, split: str, rng: Random) -> ToolDialogue:
    """A dialogue in which this tool is needed."""
    if isinstance(asked, Service):
        return _at_the_shop(asked, split, rng)
    return _about(asked, (_arguments(asked, split, rng),), split, rng)


# --- made-up tools


def _made_up(split: str, rng: Random) -> ToolDialogue:
    """One of a few made-up tools is asked for by name or by what it does."""
    return _with(_tool(split, rng), split, rng)


def _parallel(split: str, rng: Random) -> ToolDialogue:
    """Two questions at once to one tool with one argument."""
    asked = next(made for made in iter(lambda: _tool(split, rng), None) if len(made.arguments) == 1)
    first, second = _arguments(asked, split, rng), _arguments(asked, split, rng)
    return _about(asked, (first, second) if first != second else (first,), split, rng)


def _about(asked: Tool, given: Sequence[Mapping[str, Any]], split: str, rng: Random) -> ToolDialogue:
    """A request, its calls and their results."""
    thing = asked.name.split("_")[-1]
    results = [_result(thing, rng) for _ in given]
    said, mentions = zip(*results, strict=True)
    falsely = _result(thing, rng)[1]
    return ToolDialogue(
        tools=_among(asked, split, rng),
        messages=_messages(_request(asked, given, split, rng), split, rng),
        answers=tuple(_answer(thing, given, mentions, split, rng) for _ in range(2)),
        wrong=(_answer(thing, given, (falsely,) * len(given), split, rng), finish(RUDE.draw(rng, split))),
        calls=tuple(Call(asked.name, arguments) for arguments in given),
        results=said,
        mentions=mentions,
    )


def _tool(split: str, rng: Random) -> Tool:
    """A made-up tool whose name is of the split."""
    return next(made for made in iter(lambda: tool(rng), None) if split_of(made.name) == split)


def _among(asked: Tool, split: str, rng: Random, odds: Sequence[int] = (4, 3, 2, 1)) -> tuple[Tool, ...]:
    """The tool in question among others that are about other things; `odds` of none, one, two or three of them."""
    tools = {asked.name.split("_")[-1]: asked}
    for _ in range(rng.choices(range(MOST_TOOLS), odds)[0]):
        other = _tool(split, rng)
        tools.setdefault(other.name.split("_")[-1], other)
    return tuple(rng.sample(list(tools.values()), len(tools)))


def _request(asked: Tool, given: Sequence[Mapping[str, Any]], split: str, rng: Random) -> str:
    """The customer's words for these calls."""
    verb, thing = asked.name.split("_")[0], asked.name.split("_")[-1]
    values = " and ".join(_spoken(asked, arguments, rng) for arguments in given)
    slots = {"tool": asked.name, "thing": thing, "verb": verb, "Verb": verb.capitalize(), "values": values}
    doing = DOING if verb in asked.about.lower() else ABOUT
    grammar = rng.choice((NAMED, ABOUT, doing)) if given[0] else BARE
    return fill(grammar.draw(rng, split), {**slots, "written": _written(asked, given, rng)})


def _spoken(asked: Tool, arguments: Mapping[str, Any], rng: Random) -> str:
    """The arguments in words: a lone one by its value, several with their names."""
    quote = rng.choice(("", "", "'", '"'))
    said = []
    for argument in asked.arguments:
        if argument.name in arguments:
            value = arguments[argument.name]
            word = f"{quote}{value}{quote}" if isinstance(value, str) else _literal(value)
            bare = len(arguments) == 1 and not isinstance(value, bool) and rng.random() < 0.8
            said.append(word if bare else f"{argument.name.replace('_', ' ')} {word}")
    return rng.choice((", ", " and ")).join(said)


def _written(asked: Tool, given: Sequence[Mapping[str, Any]], rng: Random) -> str:
    """The calls as programmers write them."""
    named = rng.random() < 0.5 or any(len(arguments) > 1 for arguments in given)
    inside = (
        ", ".join(f"{key}={_literal(value)}" if named else _literal(value) for key, value in arguments.items())
        for arguments in given
    )
    return " and ".join(f"{asked.name}({each})" for each in inside)


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _arguments(asked: Tool, split: str, rng: Random) -> dict[str, Any]:
    """Values for all required arguments and some of the others."""
    given = [each for each in asked.arguments if each.required or rng.random() < 0.5]
    return {each.name: _value(each, split, rng) for each in given}


def _value(argument: Argument, split: str, rng: Random) -> Any:
    if argument.type == "integer":
        return rng.choice((rng.randrange(10), rng.randrange(100), rng.randrange(10_000)))
    if argument.type == "number":
        return rng.choice((rng.randrange(100), round(rng.random() * 100, 1), round(rng.random() * 10, 2)))
    if argument.type == "boolean":
        return rng.random() < 0.5
    if argument.name in _PLACES:
        return place(split, rng)
    return rng.choice((_word, _word, _words, _code, _day, _person, _foreign))(split, rng)


_PLACES = {"location", "city", "place", "from_city", "to_city", "start", "end"}


def _word(split: str, rng: Random) -> str:
    return next(word for word in iter(lambda: made_up(rng), None) if split_of(word) == split)


def _words(split: str, rng: Random) -> str:
    return " ".join(rng.choice((made_up(rng), rng.choice(OBJECTS))) for _ in range(rng.randint(2, 3)))


def _code(split: str, rng: Random) -> str:
    letter = rng.choice(LETTERS)
    return rng.choice(
        (f"{letter}{rng.randrange(100, 9999)}", order_number(split, rng), f"{letter}-{rng.randrange(99)}")
    )


def _day(split: str, rng: Random) -> str:
    return rng.choice(DAYS)


def _person(split: str, rng: Random) -> str:
    return rng.choice(values_of(split, CUSTOMERS))


def _foreign(split: str, rng: Random) -> str:
    return foreign(rng)


def _result(thing: str, rng: Random) -> tuple[str, str]:
    """What a tool returns, and what of it an answer has to say."""
    value = rng.choice((str(rng.randrange(1000)), f"{rng.random() * 100:.1f}", made_up(rng), rng.choice(DAYS)))
    value = rng.choice(WEATHER).replace("_", " ") if rng.random() < 0.35 else value
    said = json.dumps({rng.choice((thing, "result", "value")): value})
    return rng.choice((value, value, said, f"The {thing} is {value}.", f"It is {value}.", f"It's {value}.")), value


def _answer(thing: str, given: Sequence[Mapping[str, Any]], results: Sequence[str], split: str, rng: Random) -> str:
    """A final answer with these results."""
    if len(results) > 1:
        parts = [
            f"{next(iter(arguments.values()))}: {result}" for arguments, result in zip(given, results, strict=True)
        ]
        return finish(f"The {thing} is as follows. {', '.join(parts)}")
    values = list(given[0].values())
    naming = ANSWERS if values and isinstance(values[0], str) else ANSWERS.where(lambda slots: "value" not in slots)
    first = finish(
        fill(naming.draw(rng, split), {"thing": thing, "value": values[0] if values else "", "result": results[0]})
    )
    return f"{first} {finish(FAREWELL.draw(rng, split))}" if rng.random() < 0.4 else first


def _messages(request: str, split: str, rng: Random) -> tuple[Message, ...]:
    """The request, with a greeting or a remark around it, after small talk or a system prompt now and then."""
    lines = [finish(request)]
    if rng.random() < 0.25:
        lines.insert(0, capital(GREETINGS.draw(rng, split)))
    if rng.random() < 0.25:
        lines.append(finish(REMARKS.draw(rng, split)))
    messages: list[Message] = []
    if rng.random() < 0.4:
        messages += [message for message in scenario(split, rng).messages if message["role"] == "system"]
    if rng.random() < 0.15:
        _, says, reply = chat(rng)
        messages += [{"role": "user", "content": says}, {"role": "assistant", "content": reply}]
    return (*messages, {"role": "user", "content": " ".join(lines)})


# --- the shop's tools


def _service(split: str, rng: Random) -> ToolDialogue:
    """One of the shop's tools is needed."""
    return _at_the_shop(rng.choice(SERVICES), split, rng)


def _failed(split: str, rng: Random) -> ToolDialogue:
    """The shop's tool finds no such order."""
    return _at_the_shop(replace(rng.choice(SERVICES[:2]), returns=ERRORS, tells=FAILURES, shown=()), split, rng)


def _at_the_shop(asked: Service, split: str, rng: Random) -> ToolDialogue:
    slots, others = _slots(split, rng), _slots(split, rng)
    usual = next(service for service in SERVICES if service.tool is asked.tool)
    false = {**slots, **{key: others[key] for key in usual.shown}}
    name = rng.choice(values_of(split, CUSTOMERS))
    opening = finish(fill(INTROS.draw(rng, split), {"name": name})) if rng.random() < 0.4 else ""
    request = finish(fill(asked.says.draw(rng, split), slots))
    return ToolDialogue(
        tools=_shop_tools(asked.tool, split, rng),
        messages=_messages(f"{opening} {request}".strip(), split, rng),
        answers=tuple(_politely(fill(asked.tells.draw(rng, split), slots), split, rng) for _ in range(2)),
        wrong=(
            _politely(fill(usual.tells.draw(rng, split), false), split, rng),
            f"{finish(RUDE.draw(rng, split))} {finish(FAREWELL.draw(rng, split))}",
        ),
        calls=(Call(asked.tool.name, {argument.name: slots[argument.name] for argument in asked.tool.arguments}),),
        results=(fill(asked.returns.draw(rng), slots),),
        mentions=tuple(slots[key] for key in asked.shown),
    )


def _slots(split: str, rng: Random) -> dict[str, str]:
    return {
        "order_number": order_number(split, rng),
        "day": rng.choice(DAYS),
        "time": f"{rng.randrange(8, 20)}:{rng.choice(('00', '15', '30', '45'))}",
        "state": rng.choice(STATES) if rng.random() < 0.6 else f"{rng.choice(AWAY)} {place(split, rng)}",
        "reference": f"{rng.choice(LETTERS)}{rng.randrange(100, 9999)}",
    }


def _politely(told: str, split: str, rng: Random) -> str:
    """A message between a friendly sentence and a goodbye, of which either may be missing."""
    before = finish(TONE["neutral"].draw(rng, split)) if rng.random() < 0.5 else ""
    after = finish(FAREWELL.draw(rng, split)) if rng.random() < 0.6 else ""
    return " ".join(part for part in (before, finish(told), after) if part)


def _shop_tools(asked: Tool | None, split: str, rng: Random) -> tuple[Tool, ...]:
    """Some of the shop's tools, and now and then a made-up one."""
    chosen = [service.tool for service in SERVICES if service.tool is asked or rng.random() < 0.5]
    made = [_tool(split, rng)] if rng.random() < 0.3 or not chosen else []
    return tuple(rng.sample([*chosen, *made], len(chosen) + len(made)))


# --- requests without a call


def _no_tool(split: str, rng: Random) -> ToolDialogue:
    """Small talk, though tools are at hand."""
    name, says, answer = chat(rng)
    other = next(talk[2] for talk in iter(lambda: chat(rng), None) if talk[0] != name)
    messages: tuple[Message, ...] = ({"role": "user", "content": says},)
    return ToolDialogue(_shop_tools(None, split, rng), messages, (answer,), (other,))


def _incomplete(split: str, rng: Random) -> ToolDialogue:
    """The number of the order is missing, so the answer asks for it."""
    asked = rng.choice(SERVICES[:2])
    messages = _messages(LACKING.draw(rng, split), split, rng)
    good = tuple(finish(ASK_ORDER.draw(rng)) for _ in range(2))
    wrong = (_politely(fill(asked.tells.draw(rng, split), _slots(split, rng)), split, rng),)
    return ToolDialogue(_shop_tools(asked.tool, split, rng), messages, good, wrong)


_WRITERS = {
    "made_up": _made_up,
    "service": _service,
    "parallel": _parallel,
    "no_tool": _no_tool,
    "incomplete": _incomplete,
    "failed": _failed,
}
