"""Answers by a schema: what the grammar takes is read by plain json.loads and obeys the schema."""

import json

import pytest

from langchain_aisp.tools import TextReader, Thoughts, check, json_grammar, schema_grammar
from langchain_aisp.types import Grammar
from tests.matching import accepts, may_begin, tokenizer

PERSON = {
    "title": "Person",
    "description": "Somebody // anybody # http://example.com",
    "type": "object",
    "properties": {
        "name": {"type": "string", "title": "Name"},
        "age": {"type": "integer", "minimum": 0},
        "mail": {"anyOf": [{"type": "string", "format": "email"}, {"type": "null"}], "default": None},
        "pets": {"type": "array", "items": {"$ref": "#/$defs/Pet"}},
    },
    "required": ["name", "age"],
    "$defs": {"Pet": {"type": "object", "properties": {"kind": {"enum": ["cat", "dog"]}}, "required": ["kind"]}},
}
ANN = {"name": 'Ann "A." Ö', "age": 3, "mail": None, "pets": [{"kind": "cat"}]}


@pytest.mark.parametrize("indent", [None, 0, 2, 4])
def test_json_may_be_on_one_line_or_indented(indent):
    grammar = schema_grammar(PERSON)
    assert accepts(grammar, json.dumps(ANN, indent=indent, ensure_ascii=False))
    assert accepts(json_grammar(), json.dumps(ANN, indent=indent, ensure_ascii=False))


def test_compact_json_is_fine_and_endless_whitespace_is_not():
    assert accepts(schema_grammar(PERSON), '{"name":"A","age":3}')
    assert not may_begin(json_grammar(), "{" + " " * 3)
    assert not may_begin(json_grammar(), "{\n\n")
    assert not may_begin(json_grammar(), " {")
    assert not accepts(json_grammar(), "{} ")


@pytest.mark.parametrize(
    "change", [{"age": -1}, {"age": "3"}, {"mail": "nobody"}, {"pets": [{"kind": "cow"}]}, {"extra": 1}, {"name": None}]
)
def test_what_breaks_the_schema_is_refused(change):
    assert accepts(schema_grammar(PERSON), json.dumps(ANN, ensure_ascii=False))
    assert not accepts(schema_grammar(PERSON), json.dumps({**ANN, **change}, ensure_ascii=False))


def test_a_required_property_cannot_be_left_out():
    assert not accepts(schema_grammar(PERSON), '{"name": "A"}')
    assert not may_begin(schema_grammar(PERSON), '{"age"')


def test_json_mode_takes_objects_only():
    assert accepts(json_grammar(), '{"a": [1, {"b": null}]}')
    assert not may_begin(json_grammar(), "[")
    assert not may_begin(json_grammar(), "Sure")


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}, '"not"'),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, '"uniqueItems"'),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"$ref": "https://example.com/schema"}, "https://example.com/schema"),
    ],
)
def test_what_cannot_be_enforced_is_named(schema, keyword):
    with pytest.raises(ValueError, match="cannot be enforced while decoding: .*Possible in a JSON schema are") as error:
        schema_grammar(schema)
    assert keyword in str(error.value)
    assert "%json" not in str(error.value)


def test_a_grammar_can_be_checked_by_itself():
    check(Grammar('start: "a" | <[3]>'))
    with pytest.raises(ValueError, match="unknown name"):
        check(Grammar("start: nothing"))


def test_objects_are_closed_unless_the_schema_speaks_of_other_properties():
    free = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert not accepts(schema_grammar(free), '{"a": 1, "b": 2}')
    assert accepts(schema_grammar({**free, "additionalProperties": True}), '{"a": 1, "b": 2}')
    inner = {"type": "object", "properties": {"properties": free, "format": {"type": "object"}}}
    assert not accepts(schema_grammar(inner), '{"properties": {"b": 2}}')
    assert accepts(schema_grammar(inner), '{"properties": {"a": 2}, "format": {"b": 2}}')


def test_objects_in_parts_keep_the_properties_of_all_parts():
    part = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}
    whole = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert accepts(schema_grammar({"allOf": [whole, part]}), '{"a": 1, "b": 2}')
    assert accepts(schema_grammar({**whole, "anyOf": [part]}), '{"a": 1, "b": 2}')


def test_alternatives_and_formats_that_only_annotate_are_taken():
    kinds = [{"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]} for kind in "ab"]
    union = schema_grammar({"oneOf": kinds, "discriminator": {"propertyName": "kind"}})
    assert accepts(union, '{"kind": "b"}')
    assert not accepts(union, '{"kind": "c"}')
    assert accepts(schema_grammar({"type": "string", "format": "password"}), '"x"')
    assert not accepts(schema_grammar({"type": "string", "format": "date"}), '"x"')


@pytest.mark.parametrize("control", [True, False])
def test_thoughts_may_come_before_the_answer(control):
    ids = tokenizer().get_added_vocab() if control else {}
    grammar = json_grammar(Thoughts(), ids)
    for text in ['{"a": 1}', '<think>\nAn {a}?\n</think>\n\n{"a": 1}']:
        assert accepts(grammar, text, control=control)
        answer = TextReader(Thoughts()).read(text, "stop").text
        assert json.loads(answer) == {"a": 1}
    assert not accepts(grammar, "<think>An a?", control=control)
    opened = json_grammar(Thoughts(opened=True), ids)
    assert accepts(opened, 'An a?</think>{"a": 1}', control=control)
    assert not accepts(opened, '{"a": 1}', control=control)
