"""The guard lets nothing unchecked out, and its log survives what kills its writers."""

import asyncio
import fcntl
import json
import os
import pickle
import runpy
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain.agents import create_agent
from langchain.agents.structured_output import ToolStrategy
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.output_parsers import JsonOutputParser, StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command
from pydantic import BaseModel

from langchain_aisp import AISPChatModel, BestOfN, as_reward
from langchain_aisp.calling import UNJUDGED
from langchain_aisp.guard import (
    AuditLog,
    Exchange,
    Fallback,
    Guard,
    GuardError,
    GuardMiddleware,
    HandOver,
    LeastReward,
    ReportedReward,
    Rules,
    SearchLonger,
    judged,
)
from langchain_aisp.rewards import no_personal_data, no_topic
from tests.toy import ToyEngine

RUDE = Rules([no_topic("idiot", name="rudeness")])
PRIVATE = Rules([no_personal_data()])
SAFE = Fallback("A colleague will write to you.")
THREAD = {"configurable": {"thread_id": "1"}}


class Scripted(GenericFakeChatModel):
    """Says what it is told to, whatever tools are bound."""

    def bind_tools(self, tools, **kwargs):
        return self


def says(*answers):
    return Scripted(messages=iter([AIMessage(a) if isinstance(a, str) else a for a in answers]))


def calls(name, *, text="", **args):
    return AIMessage(text, tool_calls=[{"name": name, "args": args, "id": f"call {time.monotonic_ns()}"}])


def short(chat, responses):
    return [-float(len(text)) for text in responses]


def found(check, message):
    return check.submit(Exchange([HumanMessage("Hi")], message)).future.result().reasons


# What is decided


def test_a_good_answer_passes_and_says_so():
    answer = Guard([RUDE, LeastReward(short, -9)]).wrap(says("Hello")).invoke("Hi")
    assert answer.content == "Hello"
    assert answer.response_metadata["guard"]["action"] == "passed"
    assert answer.response_metadata["guard"]["tried"][0]["scores"] == {"short": -5.0}


def test_searching_longer_stops_at_the_first_good_answer_and_tells_every_attempt():
    guard = Guard([RUDE], [SearchLonger(2, lambda attempt: {"stop": [f"{attempt}"]}), SAFE])
    answer = guard.wrap(says("idiot", "idiot", "Sorry", "unused")).invoke("Hi")
    assert answer.content == "Sorry"
    notes = answer.response_metadata["guard"]
    assert notes["action"] == "searched longer"
    assert notes["reasons"] == ["rudeness: the message speaks of what it must not"]
    assert [len(tried["reasons"]) for tried in notes["tried"]] == [1, 1, 0]
    assert [tried["settings"] for tried in notes["tried"]] == [{}, {"stop": "['1']"}, {"stop": "['2']"}]


def test_policies_chain_in_order_and_the_notes_say_who_declined():
    answer = Guard([RUDE], [SearchLonger(1), SAFE]).wrap(says("idiot", "idiot", "unused")).invoke("Hi")
    assert answer.content == SAFE.text
    assert answer.response_metadata["guard"]["declined"] == ["searched longer"]


def test_without_a_policy_the_guard_raises_with_reasons_that_survive_a_pickle():
    with pytest.raises(GuardError, match="below 2") as caught:
        Guard([ReportedReward(2)]).wrap(says(AIMessage("x", response_metadata={"reward": 1.0}))).invoke("Hi")
    assert pickle.loads(pickle.dumps(caught.value)).reasons == caught.value.reasons
    assert len(caught.value.reasons) == 1


@pytest.mark.parametrize(("told", "passes"), [({}, False), ({"reward": float("nan")}, False), ({"reward": 2}, True)])
def test_a_reported_reward_must_be_there_and_be_a_number(told, passes):
    assert (found(ReportedReward(1), AIMessage("x", response_metadata=told)) == ()) == passes


def test_a_bad_question_never_reaches_the_model():
    guard = Guard(input_checks=[PRIVATE], input_policies=[SAFE])
    assert guard.wrap(says()).invoke("I am a@b.org").content == SAFE.text


@pytest.mark.parametrize("policy", [SearchLonger(), HandOver()])
def test_policies_about_answers_are_refused_for_questions(policy):
    with pytest.raises(ValueError, match="act on answers"):
        Guard(input_checks=[RUDE], input_policies=[policy])


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: Guard(), "at least one check"),
        (lambda: Rules([]), "at least one rule"),
        (lambda: SearchLonger(0), "times must be at least 1"),
    ],
)
def test_a_guard_that_guards_nothing_is_refused(build, told):
    with pytest.raises(ValueError, match=told):
        build()


def test_a_check_that_breaks_lets_nothing_out():
    def broken(chat, responses):
        raise OSError("gone")

    with pytest.raises(Exception, match="gone"):
        Guard([LeastReward(broken, 0)], [SAFE]).wrap(says("Hello")).invoke("Hi")


def test_a_judge_may_be_any_chat_model():
    guard = Guard([judged(says("Score: 2"), "Is it kind?", least=5)], [SAFE])
    assert guard.wrap(says("Go away")).invoke("Hi").content == SAFE.text


def test_what_is_wrapped_must_answer_with_a_message():
    with pytest.raises(TypeError, match=r"got TextAccessor.*guard.wrap\(model\) \| parser"):
        Guard([RUDE]).wrap(says("Hello") | StrOutputParser()).invoke("Hi")


def test_searching_longer_changes_an_aligned_models_method_for_the_call():
    chat = AISPChatModel(engine=ToyEngine(), reward=short, method=BestOfN(samples=1), max_tokens=6, seed=1)
    guard = Guard([LeastReward(short, -1.0)], [SearchLonger(1, lambda attempt: {"method": BestOfN(samples=64)})])
    assert len(chat.invoke("Hi").content) > 1
    notes = guard.wrap(chat).invoke("Hi").response_metadata["guard"]
    assert notes["action"] == "searched longer"
    assert [tried["samples"] for tried in notes["tried"]] == [1, 64]
    assert notes["tried"][0]["reward"] < notes["tried"][1]["reward"] == -1.0
    assert notes["tried"][1]["settings"]["method"] == repr(BestOfN(samples=64))


# What checks see


@pytest.mark.parametrize(
    "message",
    [
        calls("send", to={"cc": ["x", "bob@example.com"]}),
        calls("send", note="see\n+49 170 1234567"),  # JSON would write the line's end as a letter before the number
        calls("send", card=4111111111111111),
        calls("send", **{"bob@example.com": True}),
        AIMessage("", invalid_tool_calls=[{"name": "send", "args": "{bob@example.com", "id": "1", "error": None}]),
        AIMessage("Fine.", additional_kwargs={"reasoning_content": "He is bob@example.com"}),
        AIMessage([{"type": "thinking", "thinking": "bob@example.com"}, {"type": "text", "text": "Fine."}]),
        AIMessage([{"type": "text", "text": "I am "}, {"type": "text", "text": "bob@example.com"}]),
    ],
)
def test_rules_see_all_that_would_go_out(message):
    assert found(PRIVATE, message) == ("no personal data: the message has personal data",)
    assert found(Rules([no_topic("nothing")]), message) == ()


def test_a_forbidden_topic_is_seen_at_the_start_of_a_line_of_an_argument_and_in_a_tools_name():
    assert found(RUDE, calls("send", text="He said:\nidiot"))
    assert found(RUDE, calls("idiot"))


def test_a_reward_does_not_score_the_reasoning():
    answer = AIMessage("Fine.", additional_kwargs={"reasoning_content": "a long thought"})
    assert found(LeastReward(short, -5), answer) == ()


def test_a_reward_of_texts_sees_the_arguments_and_one_of_responses_the_calls():
    seen = []
    LeastReward(lambda chat, texts: seen.extend(texts) or [1], 0).submit(
        Exchange([], calls("f", a="b"))
    ).future.result()
    whole = as_reward(lambda chat, responses: seen.extend(responses) or [1], sees="response")
    LeastReward(whole, 0).submit(Exchange([], calls("f", a="b", text="Let me see"))).future.result()
    assert seen[0].split() == ["f", "a", "b"]
    assert (seen[1].text, seen[1].tool_calls) == ("Let me see", ({"name": "f", "args": {"a": "b"}},))


def test_a_check_of_answers_alone_leaves_calls_be():
    assert found(LeastReward(short, 0), calls("f"))
    assert found(LeastReward(short, 0, tool_calls=False), calls("f")) == ()
    assert found(Rules([no_topic("f")], tool_calls=False), calls("f")) == ()
    assert found(LeastReward(short, 0, tool_calls=False), AIMessage("long"))


def test_a_call_that_its_own_reward_could_not_judge_is_not_measured_by_its_log_probability():
    told = {"reward": -30.0, "reward_name": UNJUDGED}
    assert found(ReportedReward(0), calls("f").model_copy(update={"response_metadata": told})) == ()
    assert found(ReportedReward(0), AIMessage("text", response_metadata=told))


amounts = st.tuples(st.sampled_from(["$", "€", "EUR ", "£"]), st.decimals(0, 10**7, places=2)).map(
    lambda price: f"{price[0]}{price[1]:,}"
)
numbers = st.integers(10**4, 10**12 - 1).map(str)
orders = st.one_of(
    numbers.map(lambda number: f"#{number}"),
    st.tuples(st.sampled_from(["A", "ORD", "RMA", "INV"]), st.integers(2000, 2030), st.integers(10**4, 10**6)).map(
        lambda parts: f"{parts[0]}-{parts[1]}-{parts[2]}"
    ),
    st.tuples(st.dates(date(1990, 1, 1)), st.times()).map(lambda when: f"{when[0]} {when[1]:%H:%M}"),
)


@given(st.lists(st.one_of(amounts, numbers, orders), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_prices_order_numbers_and_dates_are_no_personal_data(things):
    assert found(PRIVATE, AIMessage(f"Your order {', '.join(things)} was sent.")) == ()


def luhn(body):
    doubled = [int(digit) * (1 + (place + 1) % 2) for place, digit in enumerate(reversed(body))]
    return body + str(-sum(value // 10 + value % 10 for value in doubled) % 10)


@given(st.from_regex(r"\A[3-6][0-9]{14}\Z"), st.integers(1, 9), st.sampled_from(["", " ", "-"]))
@settings(max_examples=100, deadline=None)
def test_a_card_number_is_found_in_arguments_and_one_with_another_last_digit_is_not(body, wrong, separator):
    card = luhn(body)
    other = card[:-1] + str((int(card[-1]) + wrong) % 10)
    grouped, fake = (separator.join(number[i : i + 4] for i in range(0, 16, 4)) for number in (card, other))
    assert found(Rules([no_personal_data("card")]), calls("pay", card=grouped))
    assert not found(Rules([no_personal_data("card")]), calls("pay", card=fake))


@given(st.from_regex(r"\A[0-9]{18}\Z"), st.integers(0, 98))
@settings(max_examples=100, deadline=None)
def test_of_all_check_digits_only_those_of_the_standard_make_an_iban(account, check):
    right = int(f"{account}1314{check:02}") % 97 == 1  # D and E are 13 and 14
    assert bool(found(Rules([no_personal_data("iban")]), AIMessage(f"To DE{check:02}{account}."))) == right


# Streams, batches, chains


def test_a_stream_shows_checked_text_only():
    chunks = list(Guard([RUDE], [SAFE]).wrap(says("you idiot")).stream("Hi"))
    assert [chunk.content for chunk in chunks] == [SAFE.text]


async def test_an_async_stream_shows_checked_text_only_also_to_who_closes_it_early():
    guarded = Guard([RUDE], [SAFE]).wrap(says("you idiot", "you idiot"))
    assert [chunk.content async for chunk in guarded.astream("Hi")] == [SAFE.text]
    stream = guarded.astream("Hi")
    first = await anext(stream)
    await stream.aclose()
    assert first.content == SAFE.text


class Slow(GenericFakeChatModel):
    """Never answers, and tells whether its call was cancelled."""

    def __init__(self):
        super().__init__(messages=iter(()))
        self.metadata = {}

    async def _agenerate(self, *args, **kwargs):
        self.metadata["asked"] = True
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            self.metadata["cancelled"] = True
            raise


@pytest.mark.parametrize("way", ["ainvoke", "astream"])
async def test_cancelling_cancels_the_models_call(way):
    model = Slow()
    guarded = Guard([RUDE], [SAFE]).wrap(model)
    waiting = guarded.ainvoke("Hi") if way == "ainvoke" else anext(guarded.astream("Hi"))
    task = asyncio.ensure_future(waiting)
    while "asked" not in model.metadata:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert model.metadata["cancelled"]


async def test_cancelling_cancels_the_checks_under_way():
    happened = []

    async def slow(chat, responses):
        happened.append("asked")
        try:
            await asyncio.sleep(30)
        finally:
            happened.append("cancelled")

    task = asyncio.ensure_future(Guard([LeastReward(slow, 0)]).wrap(says("Hello")).ainvoke("Hi"))
    while not happened:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.01)
    assert happened == ["asked", "cancelled"]


async def test_async_and_batch_decide_alike():
    guard = Guard([RUDE, LeastReward(short, -9)], [SAFE])
    assert (await guard.wrap(says("idiot")).ainvoke("Hi")).content == SAFE.text
    assert [a.content for a in guard.wrap(says("Hello", "Hello")).batch(["Hi", "Ho"])] == ["Hello", "Hello"]


async def test_one_bad_item_of_a_batch_does_not_take_the_others_along():
    echo = Guard([RUDE]).wrap(RunnableLambda(lambda text: AIMessage(text)))
    for answers in (
        echo.batch(["one", "idiot", "two"], return_exceptions=True),
        await echo.abatch(["one", "idiot", "two"], return_exceptions=True),
    ):
        assert [isinstance(answer, GuardError) for answer in answers] == [False, True, False]
        assert (answers[0].content, answers[2].content) == ("one", "two")
    with pytest.raises(GuardError):
        echo.batch(["one", "idiot"])


async def test_a_guard_stands_in_a_chain_and_parsers_read_its_stream():
    def chain(*answers):
        return ChatPromptTemplate.from_messages([("system", "Be kind."), ("human", "{text}")]) | Guard(
            [RUDE], [Fallback('{"safe": 1}')]
        ).wrap(says(*answers))

    assert (chain("idiot") | StrOutputParser()).invoke({"text": "Hi"}) == '{"safe": 1}'
    assert list((chain("idiot") | JsonOutputParser()).stream({"text": "Hi"})) == [{"safe": 1}]
    assert [text async for text in (chain("Hello") | StrOutputParser()).astream({"text": "Hi"})] == ["Hello"]


def test_a_fallback_model_answers_when_the_guard_raises():
    guard = Guard([RUDE])
    guarded = guard.wrap(says("idiot", "idiot")).with_fallbacks(
        [guard.wrap(says("Sorry", "Sorry"))], exceptions_to_handle=(GuardError,)
    )
    assert guarded.invoke("Hi").content == "Sorry"
    assert [chunk.content for chunk in guarded.stream("Hi")] == ["Sorry"]


def test_a_guard_within_a_guard_keeps_its_notes():
    model = Guard([RUDE], [SAFE]).wrap(says("idiot"))
    notes = Guard([PRIVATE]).wrap(model).invoke("Hi").response_metadata["guard"]
    assert (notes["action"], notes["inner"]["action"]) == ("passed", "fell back")


def test_the_metadata_survive_json_and_the_merging_of_chunks():
    settings = {"stop": ["x"], "reward": short}
    answer = Guard([RUDE, LeastReward(short, -9)], [SearchLonger(1, lambda _: settings)]).wrap(says("idiot", "Hi"))
    notes = answer.invoke("Hi").response_metadata
    assert json.loads(json.dumps(notes)) == notes
    before = AIMessageChunk("", response_metadata={"trace": [{"best": 0.5}]})
    chunk = AIMessageChunk("Hi", response_metadata=notes)
    assert (before + chunk + AIMessageChunk("", chunk_position="last")).response_metadata["guard"] == notes["guard"]


def test_a_guarded_model_in_a_graph_streams_checked_text_only():
    guarded = Guard([RUDE], [SAFE]).wrap(says("you idiot"))
    graph = StateGraph(MessagesState)
    graph.add_node("answer", lambda state: {"messages": [guarded.invoke(state["messages"])]})
    graph.add_edge(START, "answer")
    streamed = [chunk.text for chunk, _ in graph.compile().stream({"messages": "Hi"}, stream_mode="messages")]
    assert "".join(streamed) == SAFE.text


@pytest.mark.parametrize("face", ["node", "agent"])
def test_a_guarded_search_streams_its_numbers_and_no_unchecked_text(face):
    chat = AISPChatModel(engine=ToyEngine(), reward=short, method=BestOfN(4), max_tokens=6, seed=1)
    guard = Guard([LeastReward(short, 1.0)], [SAFE])
    if face == "agent":
        bot = create_agent(chat, middleware=[GuardMiddleware(guard)])
    else:
        graph = StateGraph(MessagesState)
        graph.add_node("answer", lambda state: {"messages": [guard.wrap(chat).invoke(state["messages"])]})
        graph.add_edge(START, "answer")
        bot = graph.compile()
    streamed = list(bot.stream({"messages": "Hi"}, stream_mode="custom"))
    assert [part["aisp_iteration"]["samples"] for part in streamed] == [4]
    assert "text" not in streamed[0]["aisp_iteration"]


# Agents


@tool
def send(to: str) -> str:
    """Send a letter."""
    SENT.append(to)
    return "sent"


SENT = []


@pytest.fixture(autouse=True)
def nothing_sent():
    SENT.clear()


def agent(model, *guards, **settings):
    middleware = [GuardMiddleware(guard, f"guard {place}") for place, guard in enumerate(guards)]
    return create_agent(model, [send], middleware=middleware, checkpointer=InMemorySaver(), **settings)


async def test_an_agent_is_guarded_and_its_streams_too():
    bot = agent(says("idiot", "idiot", "idiot"), Guard([RUDE], [SAFE]))
    assert (await bot.ainvoke({"messages": "Hi"}, THREAD))["messages"][-1].content == SAFE.text
    streamed = "".join(chunk.text for chunk, _ in bot.stream({"messages": "Hi"}, THREAD, stream_mode="messages"))
    assert "idiot" not in streamed
    assert SAFE.text in streamed
    assert "idiot" not in str(list(bot.stream({"messages": "Hi"}, THREAD, stream_mode="updates")))


def test_a_tool_runs_in_the_loop_and_the_user_is_checked_once(tmp_path):
    log = AuditLog(tmp_path / "log")
    guard = Guard([RUDE], input_checks=[RUDE], audit=log)
    messages = agent(says(calls("send", to="Bob"), "Done."), guard).invoke({"messages": "Hi"}, THREAD)["messages"]
    assert [type(message) for message in messages] == [HumanMessage, AIMessage, ToolMessage, AIMessage]
    assert SENT == ["Bob"]
    assert all(message.response_metadata["guard"]["action"] == "passed" for message in messages[1::2])
    assert [record["stage"] for record in log.read()] == ["input", "answer", "answer"]


@pytest.mark.parametrize("policies", [[SearchLonger(1)], [SAFE]])
def test_a_call_with_personal_data_is_never_made(policies):
    bot = agent(says(calls("send", to="bob@example.com"), "Who is it for?"), Guard([PRIVATE], policies))
    answer = bot.invoke({"messages": "Hi"}, THREAD)["messages"][-1]
    assert answer.content in ("Who is it for?", SAFE.text)
    assert SENT == []


def test_two_guards_of_one_agent_have_policies_of_their_own():
    bot = agent(says("idiot", "I am bob@example.com"), Guard([RUDE], [SAFE]), Guard([PRIVATE], [Fallback("Private.")]))
    answers = [bot.invoke({"messages": "Hi"}, THREAD)["messages"][-1] for _ in range(2)]
    assert [answer.content for answer in answers] == [SAFE.text, "Private."]
    assert answers[1].response_metadata["guard"]["inner"]["action"] == "fell back"


class Weather(BaseModel):
    degrees: int
    note: str = ""


def test_a_structured_answer_is_checked_and_kept():
    bad, good = calls("Weather", degrees=1, note="idiot"), calls("Weather", degrees=2)
    bot = agent(says(bad, good), Guard([RUDE], [SearchLonger(1)]), response_format=ToolStrategy(Weather))
    state = bot.invoke({"messages": "Hi"}, THREAD)
    assert state["structured_response"] == Weather(degrees=2)
    assert state["messages"][1].response_metadata["guard"]["action"] == "searched longer"


# A human in the loop


@pytest.mark.parametrize("decision", ["approve", "edit", "reject"])
async def test_a_human_decides_and_what_was_shown_goes_out(decision):
    for runs_async in (False, True):
        bot = agent(says("idiot one", "idiot two"), Guard([RUDE], [HandOver(), SAFE]))

        async def call(value, bot=bot, runs_async=runs_async):
            return await bot.ainvoke(value, THREAD) if runs_async else bot.invoke(value, THREAD)

        [asked] = (await call({"messages": "Hi"}))["__interrupt__"]
        assert asked.value["message"] == "idiot one"
        assert asked.value["reasons"] == ["rudeness: the message speaks of what it must not"]
        resume = {**asked.value, "type": decision, **({"message": "Dear you"} if decision == "edit" else {})}
        answer = (await call(Command(resume=resume)))["messages"][-1]
        assert answer.content == {"approve": "idiot one", "edit": "Dear you", "reject": SAFE.text}[decision]


def test_an_approved_call_is_made_with_the_arguments_that_were_shown():
    again = [calls("send", to="bob@example.com", text="Now."), calls("send", to="eve@example.com")]
    bot = agent(says(*again, "Done."), Guard([PRIVATE], [HandOver()]))
    [asked] = bot.invoke({"messages": "Hi"}, THREAD)["__interrupt__"]
    assert asked.value["tool_calls"] == [{"name": "send", "args": {"to": "bob@example.com"}}]
    messages = bot.invoke(Command(resume={**asked.value, "type": "approve"}), THREAD)["messages"]
    assert SENT == ["bob@example.com"]
    assert messages[-1].content == "Done."


@pytest.mark.parametrize("again", ["hm", "something else"])
def test_an_approved_answer_keeps_what_it_brought_along_unless_that_was_never_shown(again):
    first, second = (
        AIMessage("idiot", response_metadata={"model_name": "m"}, additional_kwargs={"reasoning_content": thought})
        for thought in ("hm", again)
    )
    bot = agent(says(first, second), Guard([RUDE], [HandOver()]))
    [asked] = bot.invoke({"messages": "Hi"}, THREAD)["__interrupt__"]
    sent = bot.invoke(Command(resume={**asked.value, "type": "approve"}), THREAD)["messages"][-1]
    assert sent.content == "idiot"
    assert ("model_name" in sent.response_metadata) == (again == "hm")
    assert "something else" not in str(sent)


def test_a_human_who_resumes_with_something_else_is_asked_again():
    bot = agent(says(*["idiot"] * 3), Guard([RUDE], [HandOver()]))
    bot.invoke({"messages": "Hi"}, THREAD)
    [asked] = bot.invoke(Command(resume="yes"), THREAD)["__interrupt__"]
    assert "got 'yes'" in asked.value["problem"]
    answer = bot.invoke(Command(resume={"type": "edit", "message": "Sorry"}), THREAD)["messages"][-1]
    assert answer.content == "Sorry"


def test_handing_over_needs_a_graph():
    with pytest.raises(RuntimeError, match="compiled with a checkpointer"):
        Guard([RUDE], [HandOver()]).wrap(says("idiot")).invoke("Hi")


def test_the_log_tells_that_a_human_was_asked_and_what_became_of_it(tmp_path):
    log = AuditLog(tmp_path / "log")
    bot = agent(says("idiot", "idiot"), Guard([RUDE], [HandOver(), SAFE], audit=log))
    bot.invoke({"messages": "Hi"}, THREAD)
    bot.invoke(Command(resume={"type": "reject"}), THREAD)
    asked, decided = log.read()
    assert (asked["action"], asked["sent"], asked["thread"]) == ("human", None, "1")
    assert (decided["action"], decided["declined"]) == ("fell back", ["human"])


def test_the_support_bot_shows_what_it_says(capsys):
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "guarded_support_bot.py"))
    shown = capsys.readouterr().out
    actions = [line.split(",")[0] for line in shown.splitlines()[-4:]]
    assert actions == ["passed: sent", "searched longer: sent", "human: nothing sent yet", "human: sent"]
    assert "A human is asked" in shown


# The log


def test_the_log_keeps_hashes_unless_told_otherwise(tmp_path):
    log = AuditLog(tmp_path / "log")
    Guard([RUDE], [SAFE], audit=log).wrap(says("idiot")).invoke("Hi", {"configurable": {"thread_id": "7"}})
    [record] = log.read()
    assert (record["schema"], record["action"], record["thread"]) == (1, "fell back", "7")
    assert record["run"]
    assert record["sent"] == log.quote(SAFE.text)
    assert record["sent"].startswith("sha256:")
    assert "idiot" not in (tmp_path / "log").read_text()


async def test_the_log_has_every_attempt(tmp_path):
    told = [AIMessage(text, response_metadata={"reward": 1.5, "samples": 8}) for text in ("idiot", "an idiot", "Sorry")]
    for way in ("invoke", "ainvoke"):
        log = AuditLog(tmp_path / way, texts=True)
        guarded = Guard([RUDE], [SearchLonger(2, lambda attempt: {"stop": None})], audit=log).wrap(says(*told))
        _ = guarded.invoke("Hi") if way == "invoke" else await guarded.ainvoke("Hi")
        [record] = log.read()
        assert [tried["text"] for tried in record["tried"]] == ["idiot", "an idiot", "Sorry"]
        assert all(tried["reward"] == 1.5 and tried["samples"] == 8 for tried in record["tried"])
        assert all(tried["seconds"] >= 0 for tried in record["tried"])
        assert [len(tried["reasons"]) for tried in record["tried"]] == [1, 1, 0]
        assert (record["action"], record["sent"]) == ("searched longer", "Sorry")


def test_a_raise_is_logged(tmp_path):
    log = AuditLog(tmp_path / "log")
    with pytest.raises(GuardError):
        Guard([RUDE], audit=log).wrap(says("idiot")).invoke("Hi")
    [record] = log.read()
    assert (record["action"], record["sent"]) == ("raised", None)


@pytest.mark.parametrize("answer", ["Hello", "idiot"])
def test_nothing_goes_out_that_is_not_on_the_disk(tmp_path, monkeypatch, answer):
    guarded = Guard([RUDE], [SAFE], audit=AuditLog(tmp_path / "log")).wrap(says(answer))

    def fail(file):
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk is gone"):
        guarded.invoke("Hi")


def test_a_full_disk_is_told_and_half_a_line_does_no_harm(tmp_path, monkeypatch):
    log, write = AuditLog(tmp_path / "log"), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, line: write(file, line[:10]))
        with pytest.raises(OSError, match="is the disk full"):
            log.write({"a": 1})
    log.write({"b": 2})
    assert [record["b"] for record in log.read()] == [2]


def test_writers_wait_for_each_other(tmp_path):
    log = AuditLog(tmp_path / "log")
    writer = threading.Thread(target=log.write, args=({"a": 1},))
    with (tmp_path / "log").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer.start()
        writer.join(0.1)
        assert list(log.read()) == []
    writer.join()
    assert [record["a"] for record in log.read()] == [1]


@pytest.mark.parametrize(("name", "error"), [("no/log", FileNotFoundError), (".", IsADirectoryError)])
def test_a_path_that_cannot_be_written_is_told_at_once(tmp_path, name, error):
    with pytest.raises(error, match="an audit log needs a folder that exists"):
        AuditLog(tmp_path / name)


def test_a_torn_line_is_set_aside_and_both_files_are_their_owners_alone(tmp_path):
    path = tmp_path / "log"
    AuditLog(path).write({"a": 1})
    with path.open("ab") as file:
        file.write(b'{"b"')
    AuditLog(path).write({"c": 2})
    assert [set(record) & {"a", "c"} for record in AuditLog(path).read()] == [{"a"}, {"c"}]
    assert (tmp_path / "log.torn").read_bytes() == b'{"b"\n'
    assert [file.stat().st_mode & 0o777 for file in (path, tmp_path / "log.torn")] == [0o600, 0o600]


WRITER = """
import sys, importlib.util as u
spec = u.spec_from_file_location("audit", sys.argv[1]); m = u.module_from_spec(spec)
sys.modules["audit"] = m; spec.loader.exec_module(m)
log = m.AuditLog(sys.argv[2])
while True: log.write({"x": "y" * 5000})
"""


def test_killed_and_concurrent_writers_leave_whole_records(tmp_path):
    path = tmp_path / "log"
    source = sys.modules[AuditLog.__module__].__file__
    process = subprocess.Popen([sys.executable, "-c", WRITER, source, str(path)])
    while not path.exists() or path.stat().st_size < 20_000:
        time.sleep(0.01)
    log = AuditLog(path)
    threads = [threading.Thread(target=lambda: [log.write({"mine": 1}) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    process.kill()
    process.wait()
    AuditLog(path)
    assert sum("mine" in record for record in log.read()) == 20
    assert all(json.loads(line) for line in path.read_bytes().splitlines())
