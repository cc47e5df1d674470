"""Words of llguidance's dialect of Lark: literals, control tokens, JSON schemas.

The dialect: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from langchain_aisp.types import Grammar, require

LINE: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""JSON on one line, with or without spaces after separators: how models write arguments."""

PAGE: Mapping[str, Any] = {"whitespace_flexible": False, "whitespace_pattern": " |\\n {0,40}"}
"""JSON on one line or indented; never whitespace without end, which noise would otherwise walk into."""

_COMPOSITION = {"$ref", "allOf", "anyOf", "oneOf"}
_OPENNESS = {"additionalProperties", "patternProperties", "unevaluatedProperties"}
_FORMATS = set("date-time time date duration email hostname ipv4 ipv6 uuid uri".split())  # those llguidance enforces


def literal(text: str, tokens: Mapping[str, int]) -> str:
    """Lark for exactly this text; what is one token of the vocabulary goes in by its id.

    Ids rather than names, because llguidance knows names in angle brackets only, and Mistral writes square ones.
    """
    split = re.split("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")", text)
    pieces = [piece for piece in (split if tokens else [text]) if piece]
    return " ".join(
        f"<[{tokens[piece]}]>" if piece in tokens else json.dumps(piece, ensure_ascii=False) for piece in pieces
    )


def json_of(schema: Mapping[str, Any], layout: Mapping[str, Any]) -> str:
    """Lark for the JSON that a schema describes.

    Three liberties are taken. Objects that list their properties and say nothing of others get no others, as a small
    model would ramble on in them. ``oneOf`` is read as ``anyOf``. A ``format`` that cannot be enforced is left out:
    to the standard, formats are annotations.
    """
    closes = not any(map(_composes, _nodes(schema)))
    rewritten = {**enforceable(schema, closes=closes), "x-guidance": {**layout, "coerce_one_of": True}}
    return f"%json {json.dumps(rewritten, ensure_ascii=False)}"


def enforceable(schema: Any, *, closes: bool) -> Any:
    """The schema without formats that cannot be enforced; with ``closes``, objects of listed properties only."""
    if not isinstance(schema, Mapping):
        return schema
    result = {key: _within(key, value, closes) for key, value in schema.items()}
    if isinstance(result.get("format"), str) and result["format"] not in _FORMATS:
        del result["format"]
    if closes and "properties" in result and not result.keys() & _OPENNESS:
        result["additionalProperties"] = False
    return result


def check(grammar: Grammar, subject: str = "This") -> None:
    """Compile a grammar to see that it can be enforced.

    Args:
        grammar: The grammar.
        subject: What it is called in the error message.

    Raises:
        ValueError: It cannot be enforced; the message names the keyword of the schema that is to blame.
    """
    reason = _reason(grammar.source)
    require(
        not reason,
        f"{subject} cannot be enforced while decoding: {reason}. Possible in a JSON schema are type, properties, "
        "required, additionalProperties, items, prefixItems, minItems, maxItems, enum, const, anyOf, oneOf, allOf, "
        "$ref into the same schema, pattern without look-around, minLength, maxLength, minimum, maximum, "
        f"exclusiveMinimum, exclusiveMaximum, multipleOf, and as format {', '.join(sorted(_FORMATS))}. "
        "Leave the rest out of the schema, and check it in the tool or on the parsed answer",
    )


@lru_cache(256)  # an agent's tools come back turn after turn
def _reason(source: str) -> str:
    """Why a grammar does not compile, empty if it does: the compiler's message up to where it cites the grammar."""
    from llguidance import LLMatcher

    fails, messages = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_lark(source))
    if not fails:
        return ""
    reason = re.sub(r"^at \S+ ", "", messages[0]).split("\n   1 |")[0]
    return " ".join(reason.split()).rstrip(".")


def _within(key: str, value: Any, closes: bool) -> Any:
    """What stands under a keyword of a schema, rewritten where it is schemas again."""
    if key in {"properties", "patternProperties", "$defs", "definitions"} and isinstance(value, Mapping):
        return {name: enforceable(inner, closes=closes) for name, inner in value.items()}
    if key in {"anyOf", "oneOf", "allOf", "prefixItems"} and isinstance(value, list):
        return [enforceable(inner, closes=closes) for inner in value]
    return enforceable(value, closes=closes) if key in {"items", "additionalProperties"} else value


def _composes(node: Mapping[str, Any]) -> bool:
    """Whether an object is described in parts, each of which would shut out the others' properties if closed."""
    parts = node.get("allOf")
    return (isinstance(parts, list) and len(parts) > 1) or ("properties" in node and bool(node.keys() & _COMPOSITION))


def _nodes(value: Any) -> Iterator[Mapping[str, Any]]:
    """All mappings in a JSON value."""
    if isinstance(value, Mapping):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _nodes(inner)
