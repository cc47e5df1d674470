"""Grounded arguments are spans of the conversation and numbers in it; grounded texts name only what it names."""

import json
from dataclasses import replace

import pytest

from langchain_aisp.tools import FAMILIES, GENERIC, Thoughts, ToolSpec
from langchain_aisp.tools.formats import HERMES, LLAMA
from tests.matching import accepts, may_begin

TEXTS = [
    "Please book a table for two at “Chez Ann” in Saint-Denis,  Île-de-France!\nAt 7:30, for 1,250 €; not -4.5.",
    'He said "C:\\temp\\new" and\tleft 3 times.',
]


def takes(properties, arguments, texts=TEXTS, **schema):
    spec = ToolSpec("f", "", json.dumps({"type": "object", "properties": properties, **schema}))
    grammar = GENERIC.grammar([spec], choice="required", grounds=texts)
    return accepts(grammar, GENERIC.write([("f", arguments)]), control=False)


@pytest.mark.parametrize(
    "value",
    ["table", "Chez Ann", "“Chez Ann” in Saint-Denis, Île-de-France!", "Île", '"C:\\temp\\new" and left', "\\new"],
)
def test_strings_are_runs_of_words_from_one_line(value):
    assert takes({"a": {"type": "string"}}, {"a": value})


@pytest.mark.parametrize(
    "value", ["", " ", "tabl", "Paris", " table", "table ", "Île-de-France! At", "new\\temp", "\\"[:0]]
)
def test_other_strings_are_refused(value):
    assert not takes({"a": {"type": "string"}}, {"a": value})


@pytest.mark.parametrize("value", [2, 7, 30, 1250, -4.5, 3])
def test_numbers_are_those_that_occur(value):
    assert takes({"a": {"type": "number"}}, {"a": value})


@pytest.mark.parametrize("value", [5, -7, 12, 4.5, 250])
def test_other_numbers_are_refused(value):
    assert not takes({"a": {"type": "number"}}, {"a": value})


def test_numbers_keep_to_their_schema():
    assert not takes({"a": {"type": "integer"}}, {"a": -4.5})
    assert not takes({"a": {"type": "integer", "maximum": 7}}, {"a": 30})
    assert not takes({"a": {"type": "integer", "exclusiveMinimum": 7}}, {"a": 7})
    assert takes({"a": {"type": "integer", "exclusiveMinimum": 7, "maximum": 30}}, {"a": 30})


def test_restricted_strings_and_other_values_stay_as_their_schema_has_them():
    properties = {
        "kind": {"enum": ["cat", "dog"]},
        "day": {"type": "string", "format": "date"},
        "sure": {"type": "boolean"},
        "code": {"type": "string", "pattern": "^[A-Z]{3}$"},
        "free": {"type": "object"},
    }
    good = {"kind": "dog", "day": "2026-01-02", "sure": True, "code": "ABC", "free": {"x": "y"}}
    assert takes(properties, good)
    assert not takes(properties, {**good, "kind": "table"})
    assert not takes(properties, {**good, "code": "table"})


@pytest.mark.parametrize("names", ["", "a", "b", "c", "ab", "ac", "bc", "abc"])
@pytest.mark.parametrize("required", ["", "a", "b", "c", "ac", "abc"])
def test_optional_members_may_be_left_out_and_required_ones_not(names, required):
    properties = {name: {"type": "string"} for name in "abc"}
    arguments = dict.fromkeys(names, "table")
    assert takes(properties, arguments, required=list(required)) is (set(required) <= set(names))


def test_members_come_in_order_and_no_others():
    properties = {"a": {"type": "string"}, 'b"': {"type": "string"}}
    assert takes(properties, {"a": "table", 'b"': "Ann"})
    assert not takes(properties, {'b"': "Ann", "a": "table"})
    assert not takes(properties, {"a": "table", "c": "Ann"})


@pytest.mark.parametrize(
    ("limits", "fine"),
    [
        ({}, [0, 1, 3]),
        ({"minItems": 1}, [1, 2]),
        ({"maxItems": 2}, [0, 1, 2]),
        ({"minItems": 2, "maxItems": 3}, [2, 3]),
        ({"minItems": 2, "maxItems": 2}, [2]),
        ({"maxItems": 0}, [0]),
    ],
)
def test_arrays_are_grounded_item_by_item(limits, fine):
    properties = {"a": {"type": "array", "items": {"type": "string"}, **limits}}
    lengths = [count for count in range(5) if takes(properties, {"a": ["Ann"] * count})]
    assert set(fine) <= set(lengths)
    assert all(limits.get("minItems", 0) <= count <= limits.get("maxItems", 9) for count in lengths)
    assert not takes(properties, {"a": ["Bob"] * max(fine)}) or max(fine) == 0


def test_alternatives_and_inner_objects_are_grounded():
    properties = {
        "a": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "b": {"type": "object", "properties": {"c": {"type": "integer"}}, "required": ["c"]},
        "d": {"type": ["string", "integer"]},
    }
    assert takes(properties, {"d": "Ann"})
    assert takes(properties, {"d": 30})
    assert not takes(properties, {"d": 31})
    assert takes(properties, {"a": None, "b": {"c": 7}})
    assert takes(properties, {"a": "Ann", "b": {"c": 30}})
    assert not takes(properties, {"a": "Bob", "b": {"c": 7}})
    assert not takes(properties, {"a": "Ann", "b": {"c": 8}})


def test_references_stay_as_the_schema_has_them():
    definitions = {"Pet": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}}
    assert takes({"a": {"$ref": "#/$defs/Pet"}}, {"a": {"name": "Rex"}}, **{"$defs": definitions})


def test_without_candidates_the_schema_alone_counts():
    properties = {"a": {"type": "string"}, "b": {"type": "integer", "minimum": 5000}}
    assert takes(properties, {"a": "anything"}, texts=["", " \n"])
    assert takes(properties, {"a": "Ann", "b": 5001})
    assert takes({}, {})


def test_several_tools_share_the_conversation():
    specs = [ToolSpec(name, "", '{"type": "object", "properties": {"x": {"type": "string"}}}') for name in ("f", "g")]
    grammar = GENERIC.grammar(specs, grounds=TEXTS)
    assert accepts(grammar, "Hi. " + GENERIC.write([("f", {"x": "Ann"}), ("g", {"x": "table"})]), control=False)
    assert not accepts(grammar, GENERIC.write([("g", {"x": "Bob"})]), control=False)


def test_a_long_conversation_compiles():
    long = [f"Word{index} " * 3 + f"and {index}." for index in range(600)]
    assert takes({"a": {"type": "string"}, "b": {"type": "integer"}}, {"a": "Word599 Word599", "b": 599}, texts=long)
    assert not takes({"a": {"type": "string"}}, {"a": "Word599 Word598"}, texts=long)


# -- grounded texts ---------------------------------------------------------------------------------------------------

TOLD = [
    "Where is order 8812, since 14:30? And the two others of ann?",
    '{"status": "on its way to West Lima, TX", "price": 1200.5, "code": "Q7-40"}',
    "Total: 15,000 pieces for Île-de-France.",
]


def says(text, form=HERMES, texts=TOLD, tools=(), **limits):
    return accepts(form.grammar(tools, text_grounds=texts, **limits), text, control=False)


@pytest.mark.parametrize("form", FAMILIES, ids=lambda form: form.name)
@pytest.mark.parametrize(
    "text",
    [
        "Your order 8812 is on its way to West Lima, TX. It's late, I'm sorry: Goodbye!",
        "- Order\n- (8812)\n\n**Lima**, lima",
        "for 1,200.50 €, or 1200.5, or 1,200.5, or 1200.50",
        "15000 or 15,000 or 15,000.00",
        "at 14:30, code Q7-40",
        "2 or two others, says Ann to ann",
        "in Île-de-France…",
        "在路上",
    ],
)
def test_texts_name_what_the_conversation_names(text, form):
    assert says(text, form)
    assert all(may_begin(form.grammar((), text_grounds=TOLD), text[:end], control=False) for end in range(len(text)))


@pytest.mark.parametrize(
    "text",
    [
        "It is in Lim",
        "it is in Limas",
        "it is in Paris",
        "is it IT?",
        "order 8813",
        "order 881",
        "at 14.30",
        "at 14:31",
        "code Q7-41",
        "1,201 €",
        "12.005",
        "3 others",
        "x2",
    ],
)
def test_texts_name_nothing_else(text):
    assert says(text, texts=None)
    assert not says(text)


def test_a_name_that_was_begun_is_finished():
    grammar = HERMES.grammar((), text_grounds=TOLD)
    assert may_begin(grammar, "it is in Li", control=False)
    assert not may_begin(grammar, "it is in Li,", control=False)
    assert not may_begin(grammar, "it is in Le", control=False)


@pytest.mark.parametrize("form", [HERMES, LLAMA], ids=lambda form: form.name)
def test_grounded_texts_stand_beside_calls_and_thoughts(form):
    tool = ToolSpec("f", "", '{"type": "object", "properties": {"x": {"type": "string"}}}')
    call = form.write([("f", {"x": "Paris"})])
    assert says(call, form, tools=[tool])
    assert says("in Lima", form, tools=[tool])
    assert not says("in Paris", form, tools=[tool])
    if form.marker:
        assert says("in Lima" + call, form, tools=[tool])
        assert not says("in Paris" + call, form, tools=[tool])
    thinking = replace(form, thoughts=Thoughts("«think»", "«/think»"))
    assert says("«think»Is it Paris, 99?«/think»in Lima", thinking, tools=[tool])
    assert not says("«think»Is it Lima?«/think»in Paris", thinking, tools=[tool])


def test_an_empty_conversation_leaves_words():
    assert says("Good to hear, I think. Bye!", texts=[])
    assert not says("Good to hear, Ann", texts=[" \n"])


def test_texts_of_a_long_conversation_compile():
    long = [f"Word{index} " * 3 + f"and {index}." for index in range(600)]
    assert says("it is Word599 and 599", texts=long)
    assert not says("it is Word600", texts=long)
    assert says("9" * 300, texts=["9" * 300])
