"""The demo's dialogues with tools: each can be answered from its prompt alone, and its checks tell right from wrong."""

import json
import re
from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from langchain_aisp.demo.grammar import SPLITS
from langchain_aisp.demo.tool_dialogues import KINDS, tool_dialogue, tool_dialogues
from langchain_aisp.tools import tool_specs
from langchain_aisp.tools.formats import DEMO
from tests import matching

MARKS = ("<|tool_call|>", "<|/tool_call|>")
FORMAT = replace(DEMO, tokens=tuple((mark, matching.CONTROL.index(mark)) for mark in MARKS))
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool}


@pytest.fixture(scope="module", params=SPLITS)
def dialogues(request):
    return tool_dialogues(request.param, 80, seed=1)


def test_the_same_arguments_give_the_same_dialogues():
    assert tool_dialogues("dev", 20, seed=3) == tool_dialogues("dev", 20, seed=3)
    assert tool_dialogues("dev", 20, seed=3) != tool_dialogues("dev", 20, seed=4)


def test_every_kind_occurs_and_can_be_asked_for(dialogues):
    assert Counter(made.kind for made in dialogues).keys() == KINDS.keys()
    assert {tool_dialogue("test", Random(0), kind).kind for kind in KINDS} == KINDS.keys()


def test_a_right_call_is_of_a_tool_at_hand_and_follows_its_types(dialogues):
    for made in dialogues:
        tools = {tool.name: tool for tool in made.tools}
        assert len(tools) == len(made.tools)
        for call in made.calls:
            arguments = {argument.name: argument for argument in tools[call.name].arguments}
            required = {name for name, argument in arguments.items() if argument.required}
            assert required <= call.arguments.keys() <= arguments.keys()
            assert all(isinstance(value, TYPES[arguments[name].type]) for name, value in call.arguments.items())


def test_what_a_call_needs_stands_in_the_customers_words(dialogues):
    for made in dialogues:
        said = made.messages[-1]["content"]
        for call in made.calls:
            for value in call.arguments.values():
                assert (value if isinstance(value, str) else json.dumps(value)) in said


def test_right_calls_obey_the_grammar_that_grounds_them(dialogues):
    for made in [made for made in dialogues if made.calls][:12]:
        specs = tool_specs(made.schemas)
        grammar = FORMAT.grammar(specs, choice="required", grounds=[turn["content"] for turn in made.messages])
        text = FORMAT.write([(call.name, call.arguments) for call in made.calls])
        text = re.sub(r"(\d)\.0\b", r"\1", text)  # llguidance writes 62.0 as 62, the same number in JSON
        assert matching.accepts(grammar, text), text


def test_good_answers_say_what_the_tools_returned_and_wrong_ones_do_not(dialogues):
    for made in dialogues:
        assert all(map(made.uses_results, made.answers))
        assert not (made.mentions and any(map(made.uses_results, made.wrong)))
        assert len(made.results) == len(made.calls)


def test_a_value_inside_another_is_not_that_value():
    made = next(made for made in tool_dialogues("train", 200) if len(made.mentions) == 1)
    assert made.uses_results(f"It is {made.mentions[0].upper()}.")
    assert not made.uses_results(f"It is 1{made.mentions[0]}7.")


def test_held_out_tools_have_names_that_training_never_sees():
    shop = {"get_order_status", "get_refund_status", "book_appointment"}
    tools = {split: [tool for made in tool_dialogues(split, 80) for tool in made.tools] for split in SPLITS}
    names = {split: {tool.name for tool in found} - shop for split, found in tools.items()}
    assert not names["train"] & (names["dev"] | names["test"])


def test_the_conversation_goes_on_with_the_calls_and_their_results():
    made = tool_dialogue("dev", Random(5), "parallel")
    *_, calling, first, second = made.answered
    assert [each["function"]["name"] for each in calling["tool_calls"]] == [call.name for call in made.calls]
    assert (first["content"], second["content"]) == made.results
