"""Answers that are JSON: grammars that let a model write nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_aisp.tools.lark import PAGE, check, json_of
from langchain_aisp.tools.thoughts import Thoughts
from langchain_aisp.types import Grammar


def schema_grammar(
    schema: Mapping[str, Any], thoughts: Thoughts | None = None, tokens: Mapping[str, int] | None = None
) -> Grammar:
    """Answers that are JSON by a schema, as ``json.loads`` reads it; properties come in the schema's order.

    Args:
        schema: A JSON schema; see ``lark.json_of`` for how it is read.
        thoughts: Where the model may think before.
        tokens: Control tokens of the vocabulary and their ids, for the marks of the thoughts.

    Raises:
        ValueError: The schema uses keywords that cannot be enforced while decoding.
    """
    answer = json_of(schema, PAGE)
    check(Grammar(f"start: {answer}"), "The schema")
    if thoughts is None:
        return Grammar(f"start: {answer}\n")
    return Grammar(f"start: thought answer\nanswer: {answer}\n{thoughts.rules(tokens or {})}\n")


def json_grammar(thoughts: Thoughts | None = None, tokens: Mapping[str, int] | None = None) -> Grammar:
    """Answers that are any JSON object; arguments as for ``schema_grammar``."""
    return schema_grammar({"type": "object"}, thoughts, tokens)
