"""Tools and structured output of the chat model, on random weights: whatever such a model says obeys the grammar."""

import json
import re
from typing import Literal, TypedDict

import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field
from pydantic.v1 import BaseModel as BaseModelV1

from langchain_aisp import AISP, AISPChatModel, BestOfN, as_reward
from langchain_aisp.calling import format_tools, plan, response_format
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.tools import format_for
from tests import matching, tiny

TURNS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.tool_calls if m.tool_calls }}\n{% endfor %}[assistant]"
)
TEMPLATES = {
    "generic": TURNS,
    "hermes": "{% if tools %}{{ tools | tojson }}<tool_call>{name, arguments}</tool_call>{% endif %}" + TURNS,
    "llama": '{% if tools %}{{ tools | tojson }}<|start_header_id|>{"name": "parameters": }{% endif %}' + TURNS,
    "mistral": "{% if tools %}{{ tools | tojson }}[TOOL_CALLS]{% endif %}" + TURNS,
    "demo": "{% if tools %}{{ tools | tojson }}<|tool_call|>{}<|/tool_call|>{% endif %}" + TURNS,
}
METHOD = AISP(samples=8, iterations=2)


@tool
def look_up(order: Literal["17", "23"], urgent: bool) -> str:
    """Look up an order."""
    return f"order {order} is on its way"


class Refund(BaseModel):
    """Pay the money back."""

    euros: int = Field(ge=1, le=99)


class Verdict(BaseModel):
    """What is thought of a parcel."""

    mood: Literal["good", "bad"]
    stars: int = Field(ge=1, le=5)


class VerdictV1(BaseModelV1):
    """What is thought of a parcel."""

    mood: Literal["good", "bad"]


class VerdictDict(TypedDict):
    """What is thought of a parcel."""

    mood: Literal["good", "bad"]


def engine_of(family: str) -> TransformersEngine:
    return TransformersEngine(
        tiny.model(context=2048, initializer_range=0.1, eos_token_id=0),
        matching.tokenizer(),
        chat_template=TEMPLATES[family],
    )


@pytest.fixture(scope="module", params=TEMPLATES)
def engine(request):
    engine = engine_of(request.param)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def hermes():
    engine = engine_of("hermes")
    yield engine
    engine.close()


def calls_judged(chat, responses):
    return [float(len(response.tool_calls)) - len(response.text) / 1000 for response in responses]


def model(engine, **options):
    reward = as_reward(lambda chat, texts: [-float(len(text)) for text in texts])
    return AISPChatModel(**{"engine": engine, "reward": reward, "method": METHOD, "max_tokens": 120, **options})


def names(message):
    return [call["name"] for call in message.tool_calls]


@pytest.mark.parametrize("choice", ["any", "required", True])
@pytest.mark.parametrize("judged", [False, True])
def test_a_call_that_is_asked_for_is_made_and_follows_its_schema(engine, choice, judged):
    reward = {"reward": as_reward(calls_judged, sees="response")} if judged else {}
    bound = model(engine, **reward).bind_tools([look_up, Refund], tool_choice=choice, parallel_tool_calls=False)
    message = bound.invoke("Where is order 17?")
    assert names(message)
    assert set(names(message)) <= {"look_up", "Refund"}
    for call in message.tool_calls:
        assert call["id"].startswith("call_")
        arguments = (look_up.args_schema if call["name"] == "look_up" else Refund).model_validate(call["args"])
        assert arguments is not None
    assert message.response_metadata["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    "choice",
    ["Refund", {"type": "function", "function": {"name": "Refund"}}, {"type": "tool", "name": "Refund"}],
)
def test_a_tool_that_is_named_is_called_and_no_other(engine, choice):
    bound = model(engine).bind_tools([look_up, Refund], tool_choice=choice, parallel_tool_calls=False)
    assert names(bound.invoke("Hello")) == ["Refund"]


def test_no_call_is_made_where_none_is_wanted(engine):
    for choice in ("none", False, {"type": "none"}):
        message = model(engine, max_tokens=24).bind_tools([look_up], tool_choice=choice).invoke("Hello")
        assert not message.tool_calls
        assert not message.invalid_tool_calls
        assert message.content or message.additional_kwargs["reasoning_content"]


def test_a_reward_of_texts_leaves_calls_to_the_model_and_says_so(hermes):
    message = model(hermes).bind_tools([look_up], tool_choice="any").invoke("Hello")
    assert message.response_metadata["reward_name"] == "base log-probability"
    assert message.response_metadata["reward"] < 0
    assert message.response_metadata["samples"] == 16
    [now] = message.response_metadata["trace"]
    assert now["best"] == message.response_metadata["reward"]


def test_of_calls_that_nobody_judges_the_likeliest_is_made(hermes):
    """By the model's own log-probability, what the grammar left out included; ``logprobs`` tells of all but the end."""
    options = {"tools": format_tools([look_up], None), "tool_choice": "any", "logprobs": True, "seed": 1}
    [found] = model(hermes, n=4).generate([[HumanMessage("Hello")]], **options).generations
    metadata = [each.message.response_metadata for each in found]
    rewards = [each["reward"] for each in metadata]
    told = [sum(token["logprob"] for token in each["logprobs"]["content"]) for each in metadata]
    for reward, without_end in zip(rewards, told, strict=True):
        assert 0 < without_end - reward < 10
    assert rewards == sorted(rewards, reverse=True)
    assert len(set(rewards)) == 4


def test_where_the_model_prefers_a_text_the_search_is_among_texts(hermes):
    chat = model(hermes, max_tokens=12)
    message = chat.bind_tools([look_up]).invoke("Hello")
    assert not message.tool_calls
    assert message.response_metadata["samples"] == 8
    assert message.response_metadata["reward_name"] != "base log-probability"


def test_a_reward_of_responses_judges_calls_and_texts_alike(hermes):
    seen = []

    def watching(chat, responses):
        seen.extend(responses)
        return calls_judged(chat, responses)

    reward = as_reward(watching, sees="response")
    message = model(hermes, reward=reward).bind_tools([Refund], tool_choice="any").invoke("Hello")
    assert message.response_metadata["samples"] == 8
    assert all(1 <= call["args"]["euros"] <= 99 for response in seen for call in response.tool_calls)
    assert any(response.tool_calls for response in seen)


async def test_streams_and_async_calls_bring_the_same_call(hermes):
    bound = model(hermes).bind_tools([look_up], tool_choice="any", parallel_tool_calls=False)
    expected = [(call["name"], call["args"]) for call in bound.invoke("Hello").tool_calls]
    chunks = list(bound.stream("Hello"))
    merged = chunks[0]
    for chunk in chunks[1:]:
        merged += chunk
    assert [(call["name"], call["args"]) for call in merged.tool_calls] == expected
    assert sum(len(chunk.tool_call_chunks) for chunk in chunks) == 1
    message = await bound.ainvoke("Hello")
    assert [(call["name"], call["args"]) for call in message.tool_calls] == expected


def test_a_call_cut_off_is_invalid_in_every_way_of_calling(hermes):
    bound = model(hermes, max_tokens=30).bind_tools([look_up], tool_choice="any")
    chunks = list(bound.stream("Hello"))
    merged = chunks[0]
    for chunk in chunks[1:]:
        merged += chunk
    for message in (bound.invoke("Hello"), merged):
        assert not message.tool_calls
        assert len(message.invalid_tool_calls) == 1
        assert message.response_metadata["finish_reason"] == "length"


def test_grounded_arguments_are_taken_from_the_conversation(engine):
    @tool
    def remember(note: str, times: int) -> str:
        """Remember a note."""
        return note

    said = "Please water 4 cacti"
    asked = model(engine, max_tokens=400).bind_tools([remember], tool_choice="any", parallel_tool_calls=False)
    [call] = asked.invoke(said, grounded_arguments=True).tool_calls
    assert call["args"]["note"] in said
    assert call["args"]["times"] == 4


def test_tools_reach_the_prompt(engine):
    chat = [{"role": "user", "content": "Hello"}]
    bound = model(engine).bind_tools([look_up])
    speech = plan(engine, chat, bound.kwargs)
    text = engine.tokenizer.decode(engine.tokenize(speech.chat, tools=speech.tools))
    assert "look_up" in text
    assert "Look up an order" in text
    assert model(engine).get_num_tokens_from_messages([HumanMessage("Hello")], [look_up]) == len(
        engine.tokenize(speech.chat, tools=speech.tools)
    )


def test_a_history_of_calls_and_results_is_rendered(engine):
    history = [
        SystemMessage("Be kind."),
        HumanMessage("Where is 17?"),
        AIMessage("", tool_calls=[{"name": "look_up", "args": {"order": "17", "urgent": True}, "id": "a"}]),
        ToolMessage("no such order", tool_call_id="a", status="error"),
    ]
    chat = model(engine, max_tokens=8)
    for answer in (chat.bind_tools([look_up], tool_choice="none").invoke(history), chat.invoke(history)):
        assert answer.content or answer.additional_kwargs["reasoning_content"]  # random weights may say </think>
        assert not answer.tool_calls
    speech = plan(engine, chat._request(history, None, {}).speech.chat, {})
    text = engine.tokenizer.decode(engine.tokenize(speech.chat))
    assert "look_up" in text
    assert "Error: no such order" in text


def test_grounded_answers_name_what_the_conversation_names(hermes):
    history = [
        SystemMessage("You are Ann's bot."),
        HumanMessage("Where is 17?"),
        AIMessage("", tool_calls=[{"name": "look_up", "args": {"order": "17", "urgent": True}, "id": "a"}]),
        ToolMessage("in Lima", tool_call_id="a"),
    ]
    chat = model(hermes, grounded_answers=True)
    for bound in (chat, chat.bind_tools([look_up]), chat.bind_tools([look_up], tool_choice="none")):
        grammar = _speech(bound, history).grammar
        assert matching.accepts(grammar, "It is in Lima, says Ann of 17.")
        assert not matching.accepts(grammar, "It is in Paris.")
        assert not matching.accepts(grammar, "It is 18.")
    for asked in (history[:2], [*history, AIMessage("In Lima."), HumanMessage("And then?")]):
        assert _speech(chat, asked).grammar is None  # no tool has answered
    assert matching.accepts(_speech(chat.bind_tools([look_up]), history[:2]).grammar, "It is in Paris.")
    assert _speech(model(hermes), history).grammar is None
    assert _speech(model(hermes), history, grounded_answers=True).grammar is not None


def test_the_demo_grounds_its_answers_but_not_what_it_sends_block_by_block():
    history = [HumanMessage("Where is 17?"), ToolMessage("in Lima", tool_call_id="a")]
    demo = AISPChatModel(model="demo", method=METHOD, max_tokens=8)
    partial = as_reward(lambda chat, texts: [0.0] * len(texts), partial=True)
    assert _speech(demo, history).grammar is not None
    assert _speech(demo, history, commit_every=4, reward=partial).grammar is None
    assert _speech(demo, history, grounded_answers=False).grammar is None
    with pytest.raises(ValueError, match="leave out commit_every, or .*grounded_answers"):
        demo.invoke(history, commit_every=4, grounded_answers=True, reward=partial)


def _speech(bound, history, **options):
    chat, kwargs = (bound.bound, bound.kwargs) if hasattr(bound, "bound") else (bound, {})
    return chat._request(history, None, {**kwargs, **options}).speech


def test_random_weights_say_grounded_answers_to_their_end(hermes):
    history = [HumanMessage("Where is 17?"), ToolMessage("in Lima", tool_call_id="a")]
    answer = model(hermes, max_tokens=200, grounded_answers=True).invoke(history).text
    assert answer
    assert set(re.findall(r"\d+", answer)) <= {"17", "00"}  # "17.00" is a way to write 17


@pytest.mark.parametrize("schema", [Verdict, VerdictV1, VerdictDict, Verdict.model_json_schema()])
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_has_the_form_of_its_schema(hermes, schema, method):
    answer = model(hermes).with_structured_output(schema, method=method).invoke("Hello")
    found = answer if isinstance(answer, dict) else answer.dict() if schema is VerdictV1 else answer.model_dump()
    assert found["mood"] in {"good", "bad"}
    assert not isinstance(schema, type) or schema is VerdictDict or isinstance(answer, schema)


def test_structured_output_works_for_every_family_and_method(engine):
    for method in (METHOD, BestOfN(4), AISP.published(samples_per_iteration=4, iterations=2)):
        answer = model(engine, method=method).with_structured_output(Verdict).invoke("Hello")
        assert 1 <= answer.stars <= 5


def test_json_mode_gives_some_object(hermes):
    grammar = plan(hermes, [{"role": "user", "content": "x"}], {"response_format": {"type": "json_object"}}).grammar
    assert matching.accepts(grammar, '{"a": [1, {"b": null}]}')
    assert not matching.accepts(grammar, "[1]")
    raw = model(hermes, max_tokens=40).with_structured_output(method="json_mode", include_raw=True).invoke("Hello")
    assert (raw["parsing_error"] is None) == isinstance(raw["parsed"], dict)


def test_the_best_of_many_valid_answers_is_returned(hermes):
    reward = as_reward(lambda chat, texts: [float('"good"' in text) for text in texts])
    chat = model(hermes, reward=reward, method=BestOfN(32))
    assert chat.with_structured_output(Verdict).invoke("Hello").mood == "good"
    opposite = as_reward(lambda chat, texts: [float('"bad"' in text) for text in texts])
    assert (
        model(hermes, reward=opposite, method=BestOfN(32)).with_structured_output(Verdict).invoke("Hello").mood == "bad"
    )


def test_an_answer_that_never_ends_in_time_says_what_to_raise(hermes):
    chain = model(hermes).with_structured_output(Verdict, max_tokens=6)
    with pytest.raises(OutputParserException, match="Raise max_tokens"):
        chain.invoke("Hello")
    raw = model(hermes).with_structured_output(Verdict, include_raw=True, max_tokens=6).invoke("Hello")
    assert raw["parsed"] is None
    assert "Raise max_tokens" in str(raw["parsing_error"])
    assert raw["raw"].response_metadata["finish_reason"] == "length"


def test_response_format_as_agents_pass_it(hermes):
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": Verdict.model_json_schema()}}
    message = model(hermes).bind_tools([], response_format=form).invoke("Hello")
    assert Verdict.model_validate(json.loads(message.content))


@pytest.mark.parametrize("strategy", [ToolStrategy, ProviderStrategy])
def test_agents_answer_in_the_form_that_is_asked_for(hermes, strategy):
    agent = create_agent(model(hermes), tools=[], response_format=strategy(Verdict))
    answer = agent.invoke({"messages": [HumanMessage("Hello")]})
    assert isinstance(answer["structured_response"], Verdict)


def test_an_agent_runs_the_tools_that_are_called(hermes):
    once = iter(["any", "none", "none"])

    class Forced(AISPChatModel):
        """The first turn must be a call, the second a text: random weights would not find out."""

        def bind_tools(self, tools, **options):
            return super().bind_tools(tools, **{**options, "tool_choice": next(once), "parallel_tool_calls": False})

    chat = Forced(engine=hermes, reward=model(hermes).reward, method=METHOD, max_tokens=120)
    agent = create_agent(chat, tools=[look_up])
    messages = agent.invoke({"messages": [HumanMessage("Hello")]})["messages"]
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"]
    assert messages[2].content.startswith("order ")
    assert messages[2].tool_call_id == messages[1].tool_calls[0]["id"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tool_choice": "other"}, "Possible are auto, none, any, required, look_up"),
        ({"response_format": {"type": "xml"}}, "Possible are 'json_schema'"),
        ({"response_format": {"type": "object", "not": {}}}, "cannot be enforced"),
    ],
)
def test_what_cannot_be_followed_is_explained(hermes, options, told):
    with pytest.raises(ValueError, match=told):
        model(hermes).bind_tools([look_up], **options).invoke("Hello")


def test_tools_may_be_called_or_json_answered(engine):
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": Verdict.model_json_schema()}}
    options = model(engine).bind_tools([look_up], response_format=form).kwargs
    chat = [{"role": "user", "content": "Hello"}]
    if not format_for(engine.chat_template, engine.control_tokens).marker:
        with pytest.raises(ValueError, match="could not be told from a call"):
            plan(engine, chat, options)
        return
    speech = plan(engine, chat, options)
    call = speech.reader.format.write([("look_up", {"order": "17", "urgent": True})])
    for text, allowed in (('{"mood": "good", "stars": 3}', True), (call, True), ("Hello", False)):
        assert matching.accepts(speech.grammar, text) == allowed
    assert speech.reader.read('{"mood": "good", "stars": 3}', "stop").text == '{"mood": "good", "stars": 3}'
    assert not matching.accepts(speech.text_only, call)


def test_two_tools_of_one_name_are_refused(hermes):
    with pytest.raises(ValueError, match=r"named \['look_up'\]"):
        model(hermes).bind_tools([look_up, look_up]).invoke("Hello")


def test_what_cannot_be_a_tool_or_an_answer_is_refused_with_what_can():
    with pytest.raises(ValueError, match=r"42 \(int\) cannot be made a tool; possible are functions"):
        format_tools([42], None)
    with pytest.raises(TypeError, match="tools must be a list of functions .*, got 'order'"):
        format_tools("order", None)
    with pytest.raises(ValueError, match=r"<class 'int'> \(type\) is no form of an answer; possible are Pydantic"):
        response_format(int)


@pytest.mark.parametrize("strict", [None, True, False])
def test_a_tool_that_takes_nothing_may_be_strict(strict):
    [found] = format_tools([{"name": "ping", "description": "Is it there?"}], strict)
    assert found == {"type": "function", "function": {"name": "ping", "description": "Is it there?"}}


def test_an_unknown_method_of_structured_output_is_refused(hermes):
    with pytest.raises(ValueError, match="json_schema, function_calling, json_mode"):
        model(hermes).with_structured_output(Verdict, method="magic")
