"""Readers give back what was written, name what is wrong with a call, and never raise."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_aisp.tools import FAMILIES, TextReader, Thoughts, ToolSpec
from langchain_aisp.tools.formats import DEMO, HERMES, LLAMA, MISTRAL, MISTRAL_NAMED
from langchain_aisp.types import Reader

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS = (ToolSpec("weather", "", json.dumps(SCHEMA)), ToolSpec("now", "", '{"type": "object"}'))
MARKS = [
    *(mark for form in FAMILIES for mark in (form.marker, form.closing, form.inset, form.prelude) if mark),
    *("<think>", "</think>", "{", "}", "[", "]", '"', '"name"', ":", ",", "; ", "\n", "weather", "now", "NaN"),
    *('{"name": "delete_all", "arguments": {}}', '{"name": "now", "arguments": {}}', "delete_all[ARGS]{}"),
]

each_format = pytest.mark.parametrize("form", FAMILIES, ids=lambda form: form.name)
names = st.sampled_from([tool.name for tool in TOOLS])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=8) | st.sampled_from(MARKS),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
arguments = st.fixed_dictionaries({"city": values}, optional={"days": values, "more": values})
texts = st.lists(st.sampled_from(MARKS) | st.text(max_size=5), max_size=12).map("".join)


def the_only_invalid(form, text, finish_reason="stop"):
    response = form.reader(TOOLS).read(text, finish_reason)
    assert response.tool_calls == ()
    [invalid] = response.invalid_tool_calls
    assert invalid.keys() == {"name", "args", "error"}
    assert isinstance(invalid["args"], str)
    return invalid


@each_format
@settings(max_examples=40, deadline=None)
@given(calls=st.lists(st.tuples(names, arguments), min_size=1, max_size=3))
def test_what_is_written_is_read(form, calls):
    response = form.reader(TOOLS).read(form.write(calls), "stop")
    assert [(call["name"], call["args"]) for call in response.tool_calls] == calls
    assert response.invalid_tool_calls == ()
    assert response.text == ""
    assert response.reasoning is None


@each_format
@settings(max_examples=60, deadline=None)
@given(text=texts, thinks=st.sampled_from([None, Thoughts(), Thoughts(opened=True)]))
def test_a_reader_never_raises_and_never_calls_what_there_is_not(form, text, thinks):
    reader = replace(form, thoughts=thinks).reader(TOOLS)
    for reason in ("stop", "length"):
        response = reader.read(text, reason)
        assert {call["name"] for call in response.tool_calls} <= {"weather", "now"}
        assert all(isinstance(call["args"], dict) for call in response.tool_calls)
        assert all("city" in call["args"] for call in response.tool_calls if call["name"] == "weather")
        assert all(isinstance(call["args"], str) and call["error"] for call in response.invalid_tool_calls)
        json.dumps(response.invalid_tool_calls)
        assert response.finish_reason == reason


@each_format
@settings(max_examples=60, deadline=None)
@given(text=texts)
def test_without_tools_everything_is_text(form, text):
    response = form.reader(()).read(text, "stop")
    assert (response.text, response.tool_calls, response.invalid_tool_calls) == (text, (), ())
    assert form.reader(TOOLS, choice="none").read(text, "stop") == response


@each_format
def test_text_without_calls_is_kept_to_the_letter(form):
    assert form.reader(TOOLS).read("  Well,\n no {calls}.\n", "stop").text == "  Well,\n no {calls}.\n"


@pytest.mark.parametrize("form", [form for form in FAMILIES if form.marker], ids=lambda form: form.name)
def test_text_around_calls_is_the_content(form):
    response = form.reader(TOOLS).read(f"Let me see.\n{form.write([('now', {})])}\nDone;", "stop")
    assert response.text == "Let me see.\nDone;"
    assert response.tool_calls == ({"name": "now", "args": {}},)


@each_format
def test_an_unknown_tool_is_an_invalid_call(form):
    invalid = the_only_invalid(form, form.write([("delete_all", {"city": "Rome"})]))
    assert invalid["name"] == "delete_all"
    assert json.loads(invalid["args"]) == {"city": "Rome"}
    assert "no tool 'delete_all'; possible are ['weather', 'now']" in invalid["error"]


@each_format
def test_a_missing_argument_is_named(form):
    invalid = the_only_invalid(form, form.write([("weather", {"days": 1})]))
    assert invalid["name"] == "weather"
    assert "lacks the required arguments ['city']" in invalid["error"]


@each_format
def test_arguments_must_be_an_object(form):
    invalid = the_only_invalid(form, form.write([("weather", ["Rome"])]))
    assert "must be an object, not a list" in (invalid["error"])


@each_format
def test_a_call_that_was_cut_off_is_invalid(form):
    whole = form.write([("weather", {"city": "Rome"})])
    cut = whole[: whole.index("Rome") + 2]
    invalid = the_only_invalid(form, cut, "length")
    assert invalid["name"] == "weather"
    assert "Ro" in invalid["args"]
    assert "cut off (length)" in invalid["error"]


@each_format
def test_one_bad_call_spoils_no_other(form):
    answer = form.write([("now", {}), ("delete_all", {}), ("weather", {"city": "Rome"})])
    response = form.reader(TOOLS).read(answer, "stop")
    assert [call["name"] for call in response.tool_calls] == ["now", "weather"]
    assert [call["name"] for call in response.invalid_tool_calls] == ["delete_all"]


@pytest.mark.parametrize("form", [DEMO, HERMES], ids=lambda form: form.name)
def test_a_call_in_broken_json_ends_at_its_mark(form):
    broken = form.write([("weather", {"city": "Rome"})]).replace('"Rome"', "Rome")
    response = form.reader(TOOLS).read(broken + form.write([("now", {})]), "stop")
    [invalid] = response.invalid_tool_calls
    assert invalid["name"] == "weather"
    assert "not valid JSON" in invalid["error"]
    assert response.tool_calls == ({"name": "now", "args": {}},)
    surplus = the_only_invalid(form, form.write([("now", {})]).replace("}}", "}} or so"))
    assert "more follows" in surplus["error"]


def test_a_name_does_not_reach_over_the_next_marker():
    response = MISTRAL_NAMED.reader(TOOLS).read("[TOOL_CALLS]weather [TOOL_CALLS]now[ARGS]{}", "stop")
    assert [call["name"] for call in response.tool_calls] == ["now"]
    assert [call["args"] for call in response.invalid_tool_calls] == ["weather "]


def test_numbers_that_are_no_json_are_refused():
    assert "NaN" in the_only_invalid(MISTRAL_NAMED, '[TOOL_CALLS]weather[ARGS]{"city": NaN}')["error"]


def test_json_nested_beyond_reason_is_invalid_not_fatal():
    deep = "[TOOL_CALLS]weather[ARGS]" + '{"city":' * 100_000
    assert "not valid JSON" in the_only_invalid(MISTRAL_NAMED, deep)["error"]


def test_llama_calls_may_follow_the_python_tag():
    call = '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}'
    assert LLAMA.reader(TOOLS).read(call, "stop").tool_calls == ({"name": "weather", "args": {"city": "Rome"}},)
    assert the_only_invalid(LLAMA, "<|python_tag|>print(1)")["args"] == "print(1)"


def test_other_keys_and_the_other_key_for_arguments_are_read():
    call = '[TOOL_CALLS] [{"id": "x", "parameters": {"city": "Rome"}, "name": "weather"}, {"name": "now"}]'
    assert MISTRAL.reader(TOOLS).read(call, "stop").tool_calls == (
        {"name": "weather", "args": {"city": "Rome"}},
        {"name": "now", "args": {}},
    )


CALL = HERMES.write([("weather", {"city": "</think>"})])
NOW = HERMES.write([("now", {})])


@pytest.mark.parametrize(
    ("opened", "text", "reasoning", "said", "calls"),
    [
        (False, "Hi.", None, "Hi.", 0),
        (False, "<think>\nHm.\n</think>\n\nHi.", "Hm.", "Hi.", 0),
        (False, "<think>\n\n</think>\n\nHi.", None, "Hi.", 0),
        (False, "<think>Hm", "Hm", "", 0),
        (False, "Hm.\n</think>\nHi.", "Hm.", "Hi.", 0),
        (False, f"<think>{NOW}?</think>{NOW}", f"{NOW}?", "", 1),
        (False, CALL, None, "", 1),
        (False, "Write <think> first.", None, "Write <think> first.", 0),
        (True, "Hm.</think>Hi.", "Hm.", "Hi.", 0),
        (True, "Hm.", "Hm.", "", 0),
        (True, f"Shall I {NOW}?</think>{NOW}", f"Shall I {NOW}?", "", 1),
    ],
)
def test_thoughts_are_told_from_text_and_calls(opened, text, reasoning, said, calls):
    thoughts = Thoughts(opened=opened)
    response = replace(HERMES, thoughts=thoughts).reader(TOOLS).read(text, "stop")
    assert (response.reasoning, response.text, len(response.tool_calls)) == (reasoning, said, calls)
    if not calls:
        assert TextReader(thoughts).read(text, "stop") == response


def test_a_model_that_does_not_think_may_write_of_thoughts():
    assert HERMES.reader(TOOLS).read("</think> ends it.", "stop").text == "</think> ends it."


def test_readers_keep_the_protocol():
    readers: list[Reader] = [HERMES.reader(TOOLS), TextReader()]
    assert [reader.read("Hi.", "length").complete for reader in readers] == [False, False]
