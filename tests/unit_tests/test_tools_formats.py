"""Every family of models, every choice: the grammar takes what the family writes and nothing else."""

import pickle
from dataclasses import replace

import pytest

from langchain_aisp.tools import FAMILIES, GENERIC, Thoughts, ToolFormat, ToolSpec, format_for, tool_specs
from langchain_aisp.tools.formats import DEMO, HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, MOST_CALLS
from tests.matching import accepts, may_begin, tokenizer, wander

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city, see http://weather.example # always",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
            "required": ["city"],
        },
    },
}
WEATHER_MAP = {"type": "function", "function": {"name": "weather_map", "description": "A map of clouds."}}
ONE = tool_specs([WEATHER])
TWO = tool_specs([WEATHER, WEATHER_MAP])

PARIS = ("weather", {"city": "Paris, “Île” {", "days": 3})
ROME = ("weather", {"city": "Rome"})
MAP = ("weather_map", {})
SPELLED = [  # markers that the vocabulary has no tokens for
    ToolFormat("spelled", "«call»", begin="\n", separator="\n«/call»\n«call»\n", end="\n«/call»"),
    ToolFormat("spelled-list", "functions", begin="[", separator=", ", end="]"),
    ToolFormat("spelled-named", "@", call="$name with $arguments", separator="@"),
]


def with_tokens(family: ToolFormat, thoughts: Thoughts | None = None) -> ToolFormat:
    texts = [family.marker, family.prelude, family.separator, family.end, family.call]
    written = "\n".join(texts + ([thoughts.begin, thoughts.end] if thoughts else []))
    ids = tokenizer().get_added_vocab()
    tokens = tuple((token, index) for token, index in ids.items() if token in written)
    return replace(family, thoughts=thoughts, tokens=tokens)


FORMATS = [*map(with_tokens, FAMILIES), *SPELLED]
each_format = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)


def takes(form: ToolFormat, text: str, **settings) -> bool:
    return accepts(form.grammar(settings.pop("tools", TWO), **settings), text)


@each_format
@pytest.mark.parametrize("tools", [ONE, TWO], ids=["one", "two"])
def test_auto_takes_text_or_calls(form, tools):
    assert takes(form, "It rains in {Paris}.", tools=tools)
    assert takes(form, form.write([PARIS]), tools=tools)
    assert not takes(form, "", tools=tools)
    assert not takes(form, form.write([("delete_all", {})]), tools=tools)


@each_format
@pytest.mark.parametrize("choice", ["required", "any"])
def test_required_takes_calls_only(form, choice):
    assert takes(form, form.write([MAP]), choice=choice)
    assert takes(form, form.write([ROME]), choice=choice)
    assert not may_begin(form.grammar(TWO, choice=choice), "It rains")


@each_format
def test_a_named_tool_is_the_only_one_to_be_called(form):
    assert takes(form, form.write([MAP]), choice="weather_map")
    assert not takes(form, form.write([ROME]), choice="weather_map")
    assert takes(form, form.write([ROME]), choice="weather")
    assert not takes(form, form.write([MAP]), choice="weather")


@each_format
def test_none_takes_text_only(form):
    assert takes(form, "It rains in Paris.", choice="none")
    call = form.write([ROME])
    assert takes(form, call, choice="none") is not bool(form.marker)  # unmarked, it is text that happens to be JSON
    assert form.reader(TWO, choice="none").read(call, "stop").tool_calls == ()


@each_format
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_several_calls_only_when_parallel(form, choice):
    calls = form.write([PARIS, MAP, ROME])
    assert takes(form, calls, choice=choice)
    assert not takes(form, calls, choice=choice, parallel=False)
    assert takes(form, form.write([PARIS]), choice=choice, parallel=False)


@each_format
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_model_that_calls_without_end_is_stopped(form, choice):
    assert takes(form, form.write([MAP] * MOST_CALLS), choice=choice)
    assert not takes(form, form.write([MAP] * (MOST_CALLS + 1)), choice=choice)
    full = form.grammar(TWO, choice=choice)
    *_, closing = form.write([MAP] * MOST_CALLS).rpartition("}")
    assert may_begin(full, form.write([MAP] * (MOST_CALLS - 1)).removesuffix(closing) + form.separator)
    assert not may_begin(full, form.write([MAP] * MOST_CALLS).removesuffix(closing) + form.separator)


@each_format
@pytest.mark.parametrize(
    "arguments",
    [{}, {"city": 3}, {"city": "Rome", "days": 8}, {"city": "Rome", "colour": "red"}, {"days": 2}],
    ids=["missing", "type", "range", "unknown", "missing-too"],
)
def test_arguments_that_break_the_schema_are_refused(form, arguments):
    assert not takes(form, form.write([("weather", arguments)]))


@each_format
def test_the_answer_ends_after_the_calls(form):
    assert not takes(form, form.write([ROME]) + " The result is: sunny.")


@each_format
def test_text_may_come_before_calls(form):
    answer = "Let me look. " + form.write([ROME])
    assert takes(form, answer)
    broken = answer.replace("city", "town")
    assert takes(form, broken) is not bool(form.marker)  # where calls are unmarked, this is text


@pytest.mark.parametrize("form", [form for form in FORMATS if form.marker], ids=lambda form: form.name)
def test_a_marker_that_is_spelled_out_is_no_text(form):
    grammar = form.grammar(TWO)
    assert not accepts(grammar, f"They write {form.marker} before calls", control=False)
    assert not accepts(form.grammar(TWO, choice="none"), f"They write {form.marker}!", control=False)


def test_an_unmarked_call_is_told_by_its_brace():
    form = with_tokens(LLAMA)
    assert takes(form, 'The JSON {"a": 1} is fine, and so is\n{}')
    assert takes(form, "[1, 2]")
    assert not may_begin(form.grammar(TWO), '{"a"')
    assert not may_begin(form.grammar(TWO), ' \n{"name": "weather"')
    assert takes(form, '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}')
    assert takes(form, '{"just": "text"}', choice="none")


@each_format
@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("thoughts", [Thoughts(), Thoughts("«think»", "«/think»")], ids=["tokens", "spelled"])
def test_thoughts_come_before_calls_and_may_mention_braces(form, choice, thoughts):
    thinking = with_tokens(form, thoughts)
    begin, end, call = thoughts.begin, thoughts.end, form.write([ROME])
    assert takes(thinking, call, choice=choice)
    assert takes(thinking, f"{begin}\nWhich city {{?\n{end}\n\n{call}", choice=choice)
    assert not takes(thinking, f"{begin}\nWhich city {{?", choice=choice)
    assert takes(thinking, f"{begin}Hm.{end}Hi.", choice=choice) is (choice == "auto")
    assert not takes(thinking, f"{begin}Hm.{end}Hi.{end}", choice=choice)
    opened = thinking.after(f"<|assistant|>{begin}\n")
    assert takes(opened, f"Rome, I think.\n{end}\n\n{call}", choice=choice)
    assert not takes(opened, call, choice=choice)
    assert not takes(opened, "Rome, I think.", choice=choice)


@pytest.mark.parametrize("form", [form for form in SPELLED if form.marker], ids=lambda form: form.name)
def test_spelled_thoughts_may_mention_markers(form):
    thinking = replace(form, thoughts=Thoughts("«think»", "«/think»"))
    assert takes(thinking, f"«think»Is {form.marker} one?«/think»Hi.")


@each_format
@pytest.mark.parametrize("choice", ["auto", "required", "weather_map"])
@pytest.mark.parametrize("thoughts", [None, Thoughts(), Thoughts(opened=True)], ids=["plain", "thinks", "opened"])
@pytest.mark.parametrize("grounds", [None, ["Rome, 3 and “b”"]], ids=["free", "grounded"])
def test_whatever_a_grammar_allows_is_read_without_complaint(form, choice, thoughts, grounds):
    thinking = with_tokens(form, thoughts)
    grammar = thinking.grammar(TWO, choice=choice, grounds=grounds)
    reader = thinking.reader(TWO, choice=choice)
    answers = [answer for seed in range(4) if (answer := wander(grammar, seed)) is not None]
    assert answers
    for answer in answers:
        response = reader.read(answer, "stop")
        assert response.invalid_tool_calls == (), answer
        assert response.tool_calls or (choice == "auto" and response.text), answer


@each_format
def test_no_tools_leave_text(form):
    assert takes(form, "Hello.", tools=())
    with pytest.raises(ValueError, match="possible are .*'auto', 'none'"):
        form.grammar((), choice="required")


def test_an_unknown_choice_lists_what_is_possible():
    with pytest.raises(ValueError, match="'wether'.*'weather', 'weather_map'"):
        HERMES.grammar(TWO, choice="wether")


def test_a_tool_that_cannot_be_enforced_is_named_with_its_keyword():
    tool = ToolSpec("odd", "", '{"type": "object", "properties": {"a": {"not": {"const": 1}}}}')
    with pytest.raises(ValueError, match="The schema of the tool 'odd' cannot be enforced .*\"not\""):
        HERMES.grammar([*TWO, tool])


@each_format
def test_formats_and_readers_are_values(form):
    reader = form.reader(TWO)
    assert pickle.loads(pickle.dumps(reader)) == reader
    assert hash(reader) == hash(form.reader(TWO))
    assert repr(reader) == repr(form.reader(TWO)) != repr(form.reader(ONE))


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
QWEN = CHATML + (
    '{% if tools %}# Tools <tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools> For each call: "'
    '<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call>"{% endif %}'
)
QWEN_XML = CHATML + "{% if tools %}<tool_call>\n<function=NAME>arguments</function>\n</tool_call>{% endif %}"
LLAMA_3 = (
    "<|start_header_id|>system<|end_header_id|>{% if tools is not none %}Respond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}.{% endif %}'
)
MISTRAL_3 = "{% if tools %}[AVAILABLE_TOOLS]{% endif %}{{ '[TOOL_CALLS] [' }}{{ call.function|tojson }}{{ ']' }}"
MISTRAL_13 = "{% if tools %}[AVAILABLE_TOOLS]{% endif %}{{ '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}"
DEMO_LIKE = "{% for c in m.tool_calls %}<|tool_call|>{{ c.function|tojson }}<|/tool_call|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "tokens", "family", "thinks", "instructs"),
    [
        (QWEN, ["<tool_call>", "</tool_call>"], "hermes", None, False),
        (QWEN + "<think>\n\n</think>", ["<tool_call>", "<think>", "</think>"], "hermes", "<think>", False),
        (QWEN_XML, ["<tool_call>", "</tool_call>"], "generic", None, True),
        (LLAMA_3, ["<|python_tag|>"], "llama", None, False),
        (MISTRAL_3, ["[TOOL_CALLS]"], "mistral", None, False),
        (MISTRAL_13, ["[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"], "mistral-named", "[THINK]", False),
        (DEMO_LIKE, ["<|tool_call|>", "<|/tool_call|>"], "demo", None, True),
        (DEMO_LIKE + "{{ tools }}", [], "demo", None, False),
        (CHATML, ["<|im_end|>"], "generic", None, True),
        (None, [], "generic", None, True),
    ],
)
def test_a_template_tells_the_family(template, tokens, family, thinks, instructs):
    form = format_for(template, {token: 1000 + index for index, token in enumerate(tokens)})
    assert form.name == family
    assert (form.thoughts and form.thoughts.begin) == thinks
    assert form.instructs is instructs
    assert {token for token, _ in form.tokens} == set(tokens) - {"<|im_end|>"}


def test_a_silent_template_gets_tools_in_plain_text():
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rome?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": {"city": "Rome"}}}],
        },
        {"role": "tool", "content": "sunny", "name": "weather", "tool_call_id": "1"},
        {"role": "user", "content": "And tomorrow?"},
    ]
    system, user, answer, result = GENERIC.instructed(chat, TWO)
    assert system["content"].startswith("Be brief.\n\n")
    assert '"name": "weather_map"' in system["content"]
    assert '<tool_call>\n{"name": "NAME", "arguments": {ARGUMENTS}}\n</tool_call>' in system["content"]
    assert user == chat[1]
    assert answer == {"role": "assistant", "content": GENERIC.write([ROME])}
    assert result == {"role": "user", "content": "[result of weather]\nsunny\n[/result]\n\nAnd tomorrow?"}
    assert GENERIC.instructed(chat[1:2], ()) == chat[1:2]


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ({"name": "weather"}, "must have the form"),
        ({"type": "function", "function": {"description": "?"}}, "needs a name"),
        ({"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}, '"type": "object"'),
        ({"type": "function", "function": {"name": "f", "parameters": "x"}}, '"type": "object"'),
    ],
)
def test_a_tool_in_another_form_is_refused_with_a_reason(tool, message):
    with pytest.raises(ValueError, match=message):
        ToolSpec.from_openai(tool)


def test_two_tools_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"\['weather'\]"):
        tool_specs([WEATHER, WEATHER_MAP, WEATHER])


def test_a_tool_survives_the_way_there_and_back():
    assert ONE[0].to_openai() == WEATHER
    assert TWO[1].parameters == {"type": "object", "properties": {}}


def test_families_write_as_their_models_do():
    calls = [ROME, MAP]
    assert DEMO.write(calls) == (
        '<|tool_call|>{"name": "weather", "arguments": {"city": "Rome"}}<|/tool_call|>'
        '<|tool_call|>{"name": "weather_map", "arguments": {}}<|/tool_call|>'
    )
    assert HERMES.write([MAP]) == '<tool_call>\n{"name": "weather_map", "arguments": {}}\n</tool_call>'
    assert LLAMA.write(calls).startswith('{"name": "weather", "parameters": {"city": "Rome"}}; {"name"')
    assert MISTRAL.write([MAP]) == '[TOOL_CALLS][{"name": "weather_map", "arguments": {}}]'
    assert MISTRAL_NAMED.write(calls) == '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}[TOOL_CALLS]weather_map[ARGS]{}'
