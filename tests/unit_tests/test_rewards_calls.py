"""Rewards of tool calls: alone, combined, and as what the search of the chat model maximises."""

import asyncio
import copy
import pickle
from dataclasses import replace
from decimal import Decimal
from typing import Literal

import pytest
import torch
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel
from pydantic.v1 import BaseModel as BaseModelV1

from langchain_aisp import AISPChatModel, BestOfN, as_reward
from langchain_aisp.calling import compares_kinds, judges_calls
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.rewards import (
    CompleteCalls,
    CoveringCalls,
    GroundedCalls,
    Minimum,
    RewardError,
    WeightedSum,
    as_call_reward,
)
from langchain_aisp.rewards.said import spelled_out
from langchain_aisp.types import Response
from tests import matching, tiny

CHAT = [
    {"role": "user", "content": "Where is order 17?  I paid 1,200.50 for two\nblue\u00a0chairs."},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"code": "X99"}}}]},
    {"role": "tool", "content": '{"status": "On Its Way", "weight": -3}'},
]


@tool
def look_up(order: str, urgent: bool = False, note: str = "") -> str:
    """Look up an order."""
    return order


class Refund(BaseModel):
    """Pay money back."""

    euros: int
    reason: str | None = None


class RefundV1(BaseModelV1):
    """Pay money back."""

    euros: int
    reason: str | None = None


def close(reason=None):
    """Close the ticket."""


def call(name="look_up", **args):
    return Response("", tool_calls=({"name": name, "args": args},))


def calls(*responses):
    return Response("", tool_calls=tuple(made for each in responses for made in each.tool_calls))


INVALID = Response("", invalid_tool_calls=({"name": "look_up", "args": "{", "error": "cut off"},))
TEXT = Response("It is on its way.")


def score(reward, *responses, chat=CHAT):
    return reward.submit([(chat, response) for response in responses]).future.result(timeout=10).tolist()


def scores_one(reward, response):
    [only] = score(reward, response)
    return only


# -- grounded calls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    ["17", 17, 17.0, "BLUE  chairs", "blue chairs", 1200.5, 2, "on its way", -3, "order 17"],
)
def test_a_value_that_was_said_is_grounded_whatever_its_case_and_spaces(value):
    assert scores_one(GroundedCalls(), call(value=value)) == 1.0


@pytest.mark.parametrize("value", ["1", 1, "7", 200, "blu", "chairs blue", "X99", 3, "airs", 1e400, 10**30])
def test_a_value_that_was_not_said_or_is_a_part_of_a_word_is_invented(value):
    assert scores_one(GroundedCalls(), call(value=value)) == 0.0


def test_the_share_counts_strings_and_numbers_however_deep():
    made = call(a={"b": ["17", {"c": 18}]}, d="order", e=["nobody"], f=True, g=None, h=" \u200b", i={})
    assert scores_one(GroundedCalls(), made) == 0.5
    assert scores_one(GroundedCalls(), call(urgent=True)) == 1.0


def test_words_of_scripts_without_spaces_are_found():
    assert score(GroundedCalls(), call(x="東京"), chat=[{"role": "user", "content": "私は東京にいます"}]) == [1.0]


def test_a_text_gets_the_stated_neutral_value_and_an_unreadable_call_nothing():
    for reward in (GroundedCalls(), CompleteCalls([look_up])):
        assert score(reward, TEXT, INVALID) == [0.5, 0.0]
    assert score(GroundedCalls(text=0.25), TEXT, call(x="17")) == [0.25, 1.0]


# -- covering calls ---------------------------------------------------------------------------------------------------


def covered(said, *responses, before=(), after=()):
    return score(CoveringCalls(), *responses, chat=[*before, {"role": "user", "content": said}, *after])


@pytest.mark.parametrize(
    ("said", "spelled"),
    [
        ("Set 'blue chair' to 17, please", ("blue chair", Decimal(17))),
        ("I don't know what it's for, nor the dogs' names, nor Tuesday", ()),
        (
            "T-40 at 14:30 on 2026-11-28, room A12, -3 degrees",
            ("T-40", "14:30", "2026-11-28", "A12", Decimal(-3)),
        ),
        ('look_up(order="17", city="北京") for 1,200.50', (Decimal(17), "北京", "look_up", Decimal("1200.50"))),
        ("“one”, \u2018two\u2019, «three», „four“ and 「五」", ("one", "two", "three", "four", "五")),
        ("'a' and 'a' and \"\" and ' ' and 7 and 7", ("a", Decimal(7))),
        ("write to a@b.c1", ("a@b.c1",)),
    ],
)
def test_quotes_numbers_and_codes_are_spelled_out(said, spelled):
    assert spelled_out(said) == spelled


def test_what_the_user_spells_out_has_to_be_passed_on_by_all_calls_together():
    first, second = call(order="blue chair"), call("note_down", note={"inner": ["about 17.0 cm"]})
    whole = calls(first, second)
    assert covered("The 'blue chair' has 17", first, second, whole, call()) == [0.5, 0.5, 1.0, 0.0]
    assert covered("Use note_down with 17", second, call(order="17"), call(order="171")) == [1.0, 0.5, 0.0]
    assert covered("Set max_price to 5", call(max_price=5), call(price=5)) == [1.0, 0.5]
    assert covered("Hello", first, call()) == [1.0, 1.0]
    assert score(CoveringCalls(), call(), chat=[{"role": "system", "content": "Say 17."}]) == [1.0]


def test_only_the_last_message_counts_and_what_earlier_calls_have_passed_on():
    made = [{"function": {"name": "look_up", "arguments": {"order": "17"}}}]
    looked_up = [{"role": "assistant", "content": "", "tool_calls": made}, {"role": "tool", "content": "lost, see 99"}]
    assert covered("Look up 17 and 18", call(order="18"), call(order="17"), after=looked_up) == [1.0, 0.5]
    before = [{"role": "user", "content": "I am 'A1'"}, *looked_up]
    assert covered("And 18?", call(order="18"), before=before) == [1.0]
    assert covered("And 17?", call(order="18"), before=before) == [0.0]


def test_a_text_is_judged_by_its_own_reward_and_an_unreadable_call_passes_nothing_on():
    assert covered("Look up 17", TEXT, INVALID) == [0.5, 0.0]
    partly = replace(calls(call(order="17")), invalid_tool_calls=INVALID.invalid_tool_calls)
    assert covered("Look up 17", partly) == [0.0]
    assert score(CoveringCalls(text=lambda chat, texts: [7.0] * len(texts)), TEXT, call(order="17")) == [7.0, 0.5]
    assert not compares_kinds(CoveringCalls(text=lambda chat, texts: [7.0] * len(texts)))


# -- complete calls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "share"),
    [
        (call(order="17"), 1 / 3),
        (call(order="17", urgent=False), 2 / 3),
        (call(order="17", urgent=True, note="soon"), 1.0),
        (call(order="17", urgent=True, note=" "), 2 / 3),
        (call(urgent=True, note="soon"), 0.0),
        (call(order="", urgent=True, note="soon"), 0.0),
        (call("unknown", order="17"), 0.0),
    ],
)
def test_the_share_of_filled_properties_counts_and_required_ones_must_be_there(made, share):
    assert scores_one(CompleteCalls([look_up]), made) == pytest.approx(share)


@pytest.mark.parametrize("kind", [Refund, RefundV1, convert_to_openai_tool(Refund), Refund.model_json_schema()])
def test_tools_come_in_the_forms_that_bind_tools_takes(kind):
    name = "RefundV1" if kind is RefundV1 else "Refund"
    reward = CompleteCalls([kind, look_up, close])
    assert score(reward, call(name, euros=0), call(name, reason="late"), call("close", reason="done")) == [
        0.5,
        0.0,
        1.0,
    ]


def test_a_tool_without_arguments_is_always_complete():
    assert scores_one(CompleteCalls([{"name": "stop", "description": "Stop."}]), call("stop")) == 1.0


@pytest.mark.parametrize(
    ("tools", "told"),
    [
        ([], "needs the tools"),
        ([look_up, look_up], "named \\['look_up'\\]"),
        ([3], "no tool that can be read"),
        ([{"description": "x"}], "needs a name"),
    ],
)
def test_tools_that_cannot_be_read_are_refused(tools, told):
    with pytest.raises(ValueError, match=told):
        CompleteCalls(tools)


# -- a function of a call ---------------------------------------------------------------------------------------------


def euros(chat, name, args):
    return -float(args["euros"])


def test_a_function_scores_each_call_and_an_answer_gets_the_mean():
    seen = []

    def watching(chat, name, args):
        seen.append((chat[0]["role"], name, args))
        return len(args["order"])

    reward = as_call_reward(watching, text=-1.0, invalid=-5.0)
    both = calls(call(order="1"), call(order="123"))
    mixed = Response("Wait.", tool_calls=both.tool_calls, invalid_tool_calls=INVALID.invalid_tool_calls)
    assert score(reward, both, TEXT, INVALID, mixed) == [2.0, -1.0, -5.0, pytest.approx(-1 / 3)]
    assert seen[0] == ("user", "look_up", {"order": "1"})


def test_a_reward_of_texts_judges_the_answers_without_calls_and_never_sees_the_others():
    seen = []

    def lengths(chat, texts):
        seen.extend(texts)
        return [float(len(text)) for text in texts]

    reward = as_call_reward(euros, text=lengths)
    assert score(reward, call(euros=3), TEXT, call(euros=1), Response("No.")) == [-3.0, 17.0, -1.0, 3.0]
    assert seen == [TEXT.text, "No."]
    assert score(reward, call(euros=3)) == [-3.0]
    assert score(reward) == []


async def test_async_functions_run_on_the_callers_loop_side_by_side():
    running, most = 0, 0

    async def slow(chat, name, args):
        nonlocal running, most
        running += 1
        most = max(most, running)
        assert asyncio.get_running_loop() is loop
        await asyncio.sleep(0.01)
        running -= 1
        return args["euros"]

    loop = asyncio.get_running_loop()
    pairs = [(CHAT, call(euros=1)), (CHAT, TEXT), (CHAT, calls(call(euros=2), call(euros=4)))]
    ticket = as_call_reward(slow).submit(pairs, loop=loop)
    assert (await asyncio.wrap_future(ticket.future)).tolist() == [1.0, 0.0, 3.0]
    assert most == 3


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda chat, name, args: args["pounds"], "raised KeyError"),
        (lambda chat, name, args: float("nan"), "answered nan"),
        (lambda chat, name, args: None, "answered NoneType"),
    ],
)
def test_an_error_names_the_reward_the_call_and_the_remedy(function, told):
    with pytest.raises(RewardError, match=told) as caught:
        score(as_call_reward(function, name="prudence"), TEXT, call(euros=3))
    assert caught.value.reward == "prudence"
    assert caught.value.response == 'look_up({"euros": 3})'
    assert caught.value.remedy


async def test_an_error_of_an_async_function_names_the_call_too():
    async def careless(chat, name, args):
        return args["pounds"]

    with pytest.raises(RewardError, match="raised KeyError") as caught:
        score(as_call_reward(careless), call(euros=3))
    assert caught.value.response == 'look_up({"euros": 3})'


def test_a_function_of_texts_is_refused_at_once():
    with pytest.raises(TypeError, match="lambda chat, name, args"):
        as_call_reward(lambda chat, responses: 0.0)
    with pytest.raises(ValueError, match="finite"):
        as_call_reward(euros, text=float("inf"))
    with pytest.raises(ValueError, match="finite"):
        as_call_reward(euros, invalid=float("nan"))


# -- identity and composition -----------------------------------------------------------------------------------------


def test_rewards_that_may_score_differently_have_different_fingerprints():
    makers = [
        lambda: GroundedCalls(),
        lambda: GroundedCalls(text=0.4),
        lambda: CompleteCalls([look_up]),
        lambda: CompleteCalls([look_up, Refund]),
        lambda: CoveringCalls(),
        lambda: CoveringCalls(text=0.4),
        lambda: as_call_reward(euros),
        lambda: as_call_reward(euros, invalid=-1.0),
        lambda: as_call_reward(euros, text=as_reward(lambda chat, texts: [0.0] * len(texts))),
        lambda: as_call_reward(euros, fingerprint="mine"),
    ]
    fingerprints = [make().fingerprint for make in makers]
    assert len(set(fingerprints)) == len(makers)
    assert [make().fingerprint for make in makers] == fingerprints
    dependent = [as_call_reward(lambda chat, name, args, known=[]: 0.0) for _ in range(2)]
    assert dependent[0].fingerprint != dependent[1].fingerprint


@pytest.mark.parametrize(
    "reward", [GroundedCalls(), CoveringCalls(), CompleteCalls([look_up]), as_call_reward(euros, text=0.1)]
)
def test_a_copy_and_a_pickle_score_the_same(reward):
    expected = score(reward, call(order="17", euros=3), TEXT)
    for other in (pickle.loads(pickle.dumps(reward)), copy.deepcopy(reward)):
        assert score(other, call(order="17", euros=3), TEXT) == expected
        assert other.fingerprint == reward.fingerprint


def test_they_compose_and_a_combination_with_a_reward_of_texts_does_not_judge_calls():
    grounded, complete = GroundedCalls(), CompleteCalls([look_up])
    made = call(order="17", urgent=True)
    assert scores_one(Minimum([grounded, complete]), made) == pytest.approx(2 / 3)
    both = WeightedSum([(grounded, 2.0), (complete, 1.0)])
    assert score(both, made, TEXT) == pytest.approx([2 + 2 / 3, 1.5])
    assert judges_calls(both)
    both_kinds = as_call_reward(euros, text=lambda chat, texts: [0.0] * len(texts))
    assert judges_calls(both_kinds)
    assert not compares_kinds(both_kinds)
    assert not compares_kinds(WeightedSum([(grounded, 1.0), (both_kinds, 1.0)]))
    assert compares_kinds(both)
    assert not judges_calls(WeightedSum([(grounded, 1.0), (lambda chat, texts: [0.0] * len(texts), 1.0)]))


# -- in the search ----------------------------------------------------------------------------------------------------

TEMPLATES = {
    "hermes": "{% if tools %}{{ tools | tojson }}<tool_call>{arguments}</tool_call>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]",
    "generic": "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]",
}


@tool
def pay(euros: Literal[17, 99]) -> str:
    """Pay money back."""
    return f"{euros} euros"


@pytest.fixture(scope="module", params=TEMPLATES)
def engine(request):
    """Every second token that may begin a call does, and texts are short; the rest is left to chance."""
    tokenizer = matching.tokenizer()
    model = tiny.model(context=1024, initializer_range=0.02, eos_token_id=0)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    with torch.no_grad():
        model.lm_head.bias[[tokenizer.convert_tokens_to_ids("<tool_call>"), 0]] = 5.0
    with TransformersEngine(model, tokenizer, chat_template=TEMPLATES[request.param]) as engine:
        yield engine


def bound(engine, reward, choice="auto"):
    chat = AISPChatModel(engine=engine, reward=reward, method=BestOfN(24), max_tokens=80)
    return chat.bind_tools([pay], tool_choice=choice, parallel_tool_calls=False)


@pytest.mark.parametrize("said", [17, 99])
def test_the_search_finds_the_call_whose_values_were_said(engine, said):
    message = bound(engine, GroundedCalls()).invoke(f"Give me {said} back.")
    assert [made["args"]["euros"] for made in message.tool_calls] == [said]
    assert message.response_metadata["reward"] == 1.0
    assert message.response_metadata["reward_name"] == "grounded calls"
    assert message.response_metadata["samples"] == 24


def test_where_an_answer_may_be_either_calls_and_texts_compete(engine):
    seen = []

    def watching(chat, responses):
        seen.extend(responses)
        return [0.0] * len(responses)

    watched = WeightedSum([(GroundedCalls(text=2.0), 1.0), (as_reward(watching, sees="response"), 1.0)])
    message = bound(engine, watched).invoke("Give me 17 back.")
    assert message.response_metadata["samples"] == 24  # one search among both
    assert message.response_metadata["reward"] == 2.0
    assert message.content
    assert not message.tool_calls
    assert any(each.tool_calls for each in seen)
    assert any(not (each.tool_calls or each.invalid_tool_calls) for each in seen)


def prefers(kind):
    """A reward whose scores of calls and texts lie far apart, and that does not compare them."""

    def of_texts(chat, texts):
        return [1000.0 if kind == "texts" else -1000.0] * len(texts)

    return as_call_reward(lambda chat, name, args: float(args["euros"] == 17), text=of_texts)


@pytest.mark.parametrize("kind", ["texts", "calls"])
def test_with_a_reward_for_each_kind_the_model_decides_and_the_search_goes_on_among_that_kind(engine, kind):
    alone = bound(engine, as_reward(lambda chat, texts: [0.0] * len(texts))).invoke("Give me 17 back.")
    message = bound(engine, prefers(kind)).invoke("Give me 17 back.")
    assert bool(message.tool_calls) == bool(alone.tool_calls)
    assert message.response_metadata["samples"] == 24
    if message.tool_calls:
        assert message.tool_calls[0]["args"] == {"euros": 17}
        assert message.response_metadata["reward"] == 1.0


@pytest.mark.parametrize("async_", [False, True])
@pytest.mark.parametrize("choice", ["auto", "any"])
async def test_of_equally_good_calls_the_likeliest_is_made(engine, choice, async_):
    """Among those that were drawn and the model's own: of so many, every possible call."""
    text, asked = {"text": lambda chat, texts: [0.0] * len(texts)}, "Give me something back."
    unjudged = bound(engine, text["text"], "any").invoke(asked)
    chat = bound(engine, as_call_reward(lambda chat, name, args: 0.5, **text), choice)
    message = await chat.ainvoke(asked) if async_ else chat.invoke(asked)
    assert message.response_metadata["reward"] == (0.5 if message.tool_calls else 0.0)
    if message.tool_calls:
        assert message.tool_calls[0]["args"] == unjudged.tool_calls[0]["args"]
        assert message.response_metadata["samples"] == 24


def test_the_reward_reads_the_conversation_as_it_was_given(engine):
    """A template that is silent about tools gets them in a system prompt, whose words nobody has said."""
    chats = []

    def watching(chat, name, args):
        chats.append(chat)
        return 0.0

    history = [
        HumanMessage("Give me my money."),
        AIMessage("", tool_calls=[{"name": "pay", "args": {"euros": 99}, "id": "a"}]),
        ToolMessage("not allowed", tool_call_id="a"),
    ]
    bound(engine, as_call_reward(watching), "any").invoke(history)
    assert [turn["role"] for turn in chats[0]] == ["user", "assistant", "tool"]
    assert "Pay money back" not in str(chats[0])
