"""Arguments and answers out of the conversation: a model can copy a name or a number from it but not invent one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import ge, gt, le, lt
from typing import Any

from langchain_aisp.tools.lark import LINE, json_of, literal
from langchain_aisp.tools.spec import ToolSpec

_CHUNK = re.compile(r"\w+|\W")
_NUMBER = re.compile(r"(?<!\w)-?[0-9]{1,300}(?:,[0-9]{3})*(?:\.[0-9]+)?|[0-9]{1,300}")
_NUMERALS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_BOUNDS: Mapping[str, Callable[[Any, Any], bool]] = {
    "minimum": ge,
    "maximum": le,
    "exclusiveMinimum": gt,
    "exclusiveMaximum": lt,
}
_ANNOTATIONS = set("title description default examples deprecated readOnly writeOnly $comment $schema".split())
_DEFINITIONS = {"$defs", "definitions"}


def grounded_arguments(tools: Mapping[str, ToolSpec], texts: Sequence[str]) -> str:
    """Lark rules for arguments that are spans of the conversation.

    Strings become runs of whole words from one line of a text, where runs of spaces count as one space. Numbers become
    those that occur, in digits or as English words up to twelve. Strings that their schema restricts (``enum``,
    ``const``, ``format``, ``pattern``, lengths) stay as it has them, and so do truth values and null. Objects, arrays
    and ``anyOf`` are followed inside; what is composed in other ways, or by reference, stays as its schema has it.
    Where the conversation has no candidate, the schema alone counts.

    Args:
        tools: Tools by the names that the rules for their arguments are to have.
        texts: The conversation's texts.

    Returns:
        These rules and all that they need.
    """
    rules = _Rules(_chunks(_lines(texts), write=_escaped), _numbers(texts))
    for name, tool in tools.items():
        rules.define(name, rules.value(tool.parameters, tool.parameters))
    return "\n".join([*rules.lines, *rules.terminals()])


def grounded_text(name: str, texts: Sequence[str]) -> str:
    """Lark terminals for text that names only what the conversation names, in words and numbers.

    Words without capitals and digits are free, and so are capitalised words that open a sentence or a line, and "I".
    Every other word occurs in the conversation; it may have its first letter capitalised. What signs join in the text,
    as in a time, a date or a price, occurs there as a whole. Numbers may be written with or without separators of
    thousands and with two decimals, and in digits where the conversation has them as words up to twelve.

    Args:
        name: What the terminal for such a text is to be called.
        texts: The conversation's texts.

    Returns:
        That terminal and all that it needs.
    """
    lines = _lines(texts)
    capitalised = ("".join(chunk[:1].upper() + chunk[1:] for chunk in _CHUNK.findall(line)) for line in lines)
    said = dict.fromkeys([*lines, *capitalised, *(form for each in _numbers(texts) for form in _written(each))])
    chunks = json.dumps({"substring_chunks": _chunks(said)}, ensure_ascii=False)
    return "\n".join(
        [
            f"{name}: SIGNS? (OPENING_WORD | WORD | SAID)? (STOP OPENING_WORD | SIGNS WORD | UNJOINED SAID)* SIGNS?",
            r"SIGNS: /\W+/",
            r"STOP: SIGNS & /(?s:.*[.!?:;…\n].*)/",
            r"UNJOINED: SIGNS & ~/[.,:\/@-]/",
            r"OPENING_WORD: /\p{Lu}[\w--\p{N}]*/",
            r'WORD: /[\w--[\p{Lu}\p{Lt}\p{N}]]+/ | "I"',
            r"SAID: PASSAGE & /\w+([.,:\/@-]\w+)*/",
            f"PASSAGE: %regex {chunks}",
        ]
    )


@dataclass
class _Rules:
    """Lark rules under construction.

    Attributes:
        chunks: The conversation as words, spaces and signs, as they stand inside a JSON string; lines end in a break.
        numbers: Its numbers.
        lines: The rules so far.
    """

    chunks: Sequence[str]
    numbers: Sequence[float]
    lines: list[str] = field(default_factory=list)

    def define(self, name: str, expression: str) -> str:
        """Add a rule and return its name."""
        self.lines.append(f"{name}: {expression}")
        return name

    def value(self, schema: Any, root: Mapping[str, Any]) -> str:
        """An expression for the values of a schema; ``root`` is where its references lead."""
        if _says_only(schema, "anyOf"):
            return " | ".join(self._part(each, root) for each in schema["anyOf"])
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        if isinstance(kind, list):
            return " | ".join(self._part({**schema, "type": each}, root) for each in kind)
        if kind == "string" and self.chunks and _says_only(schema, "type", "minLength"):
            return "SPAN" if schema.get("minLength", 0) <= 1 else self._schema(schema, root)
        if kind in ("integer", "number") and _says_only(schema, "type", *_BOUNDS):
            candidates = _candidates(self.numbers, schema)
            return self._schema({"enum": candidates} if candidates else schema, root)
        if kind == "object" and _says_only(schema, "type", "properties", "required", "additionalProperties"):
            return self._object(schema, root)
        if kind == "array" and _says_only(schema, "type", "items", "minItems", "maxItems") and "items" in schema:
            return self._array(schema, root)
        return self._schema(schema, root)

    def terminals(self) -> list[str]:
        """What ``SPAN`` is: not empty, within one line, no space at its edges."""
        if not self.chunks:
            return []
        chunks = json.dumps({"substring_chunks": self.chunks}, ensure_ascii=False)
        return [
            r'SPAN: "\"" WORDS "\""',
            r"WORDS: CHUNKS & /[^\n ]([^\n]*[^\n ])?/",
            f"CHUNKS: %regex {chunks}",
        ]

    def _part(self, schema: Any, root: Mapping[str, Any]) -> str:
        """The name of a rule for the values of a schema."""
        value = self.value(schema, root)  # first, as it may define rules, whose number makes the name unique
        return self.define(f"part_{len(self.lines)}", value)

    def _object(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        """Members in the schema's order, built from the last: what follows if none came before, and if one did."""
        properties, required = schema.get("properties", {}), schema.get("required", ())
        if not properties or not set(required) <= set(properties):
            return self._schema(schema, root)
        first = further = '""'
        for key, inner in reversed(properties.items()):
            key_text = literal(json.dumps(key, ensure_ascii=False) + ": ", {})
            part = self._part(inner, root)
            member = self.define(f"member_{part}", f"{key_text} {part}")
            optional = key not in required
            first = self.define(f"first_{part}", f"{member} {further}" + (f" | {first}" if optional else ""))
            further = self.define(f"further_{part}", f'(", " {member}){"?" if optional else ""} {further}')
        return f'"{{" {first} "}}"'

    def _array(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        """Items and their number."""
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return self._schema(schema, root)
        item = self._part(schema["items"], root)
        items = f'{item} (", " {item}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
        return f'"[" {items} "]"' if least else f'"[" ({items})? "]"'

    def _schema(self, schema: Any, root: Mapping[str, Any]) -> str:
        """What the schema says, the conversation left aside."""
        if not isinstance(schema, Mapping):
            return f"%json {json.dumps(schema)}"
        return json_of({**{key: root[key] for key in _DEFINITIONS & root.keys()}, **schema}, LINE)


def _says_only(schema: Any, *keywords: str) -> bool:
    """Whether a schema consists of these keywords, the first of them among them, and of annotations."""
    if not isinstance(schema, Mapping) or keywords[0] not in schema:
        return False
    return schema.keys() <= {*keywords} | _ANNOTATIONS | _DEFINITIONS


def _lines(texts: Sequence[str]) -> list[str]:
    """The distinct lines of the texts, with single spaces."""
    lines = (" ".join(line.split()) for text in texts for line in text.splitlines())
    return list(dict.fromkeys(filter(None, lines)))


def _chunks(lines: Iterable[str], write: Callable[[str], str] = str) -> list[str]:
    """Words, spaces and signs of the lines, with a break after each line."""
    return [chunk for line in lines for chunk in [*map(write, _CHUNK.findall(line)), "\n"]]


def _escaped(chunk: str) -> str:
    return json.dumps(chunk, ensure_ascii=False)[1:-1]


def _written(number: float) -> Iterator[str]:
    """How people write a number."""
    exact, cents = f"{number:,}", f"{number:,.2f}" if isinstance(number, float) else f"{number:,}.00"
    for form in (exact, cents):
        yield from (form, form.replace(",", ""))


def _numbers(texts: Sequence[str]) -> list[float]:
    """Numbers of the texts, whole ones as int."""
    said = " ".join(texts)
    digits = [found.replace(",", "") for found in _NUMBER.findall(said)]
    words = set(re.findall(r"\w+", said.lower()))
    numerals = [value for value, word in enumerate(_NUMERALS) if word in words]
    return sorted({float(each) if "." in each else int(each) for each in digits} | {*numerals})


def _candidates(numbers: Sequence[float], schema: Mapping[str, Any]) -> list[float]:
    """The numbers that a schema allows."""
    bounds = [(holds, schema[key]) for key, holds in _BOUNDS.items() if key in schema]
    whole = schema["type"] == "integer"
    fitting = [number for number in numbers if not (whole and isinstance(number, float))]
    return [number for number in fitting if all(holds(number, bound) for holds, bound in bounds)]
