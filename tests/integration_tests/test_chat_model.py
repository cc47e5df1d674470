"""The chat model on the demo's real models: the same answer in any company, and nothing computed for nobody."""

import asyncio
import copy
import pickle
import time

import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage

from langchain_aisp import AISP, AISPChatModel, BestOfN, ClassifierReward
from langchain_aisp.demo import REWARD_MODEL_PATH
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.types import Response

QUESTION = "My parcel is late"
METHOD = AISP(samples=8, iterations=2)
LONG_SEARCH = AISP(samples=4096, iterations=512)


def longest(chat, responses):
    return [float(len(text)) for text in responses]


def model(**options):
    return AISPChatModel(**{"model": "demo", "method": METHOD, "max_tokens": 16, **options})


@pytest.fixture
def passes():
    """One entry per forward pass of the demo's language model from now on."""
    seen = []
    engine = model()._live_engine()
    assert isinstance(engine, TransformersEngine)
    handle = engine.model.register_forward_hook(lambda *_: seen.append(1))
    yield seen
    handle.remove()


def stands_still(passes):
    """Whether the model computes nothing more, after a moment for the step that was under way."""
    time.sleep(0.3)
    before = len(passes)
    time.sleep(0.3)
    return len(passes) == before


def said(message):
    return message.content, message.response_metadata["reward"], message.response_metadata["sampled_tokens"]


async def test_every_way_of_calling_gives_the_same_answer():
    chat = model()
    expected = said(chat.invoke(QUESTION))
    assert said(await chat.ainvoke(QUESTION)) == expected
    assert said(list(chat.stream(QUESTION))[-1]) == expected
    assert said([chunk async for chunk in chat.astream(QUESTION)][-1]) == expected
    assert [said(answer) for answer in chat.batch([QUESTION, "Hello", QUESTION])][::2] == [expected] * 2


async def test_sixty_four_callers_at_the_same_time_get_what_each_gets_alone():
    chat = model(method=AISP(samples=4, iterations=2), max_tokens=10)
    questions = [f"{QUESTION}, order {number}" for number in range(64)]
    together = await asyncio.gather(*(chat.ainvoke(question) for question in questions))
    alone = [chat.invoke(question) for question in questions]
    assert [answer.content for answer in together] == [answer.content for answer in alone]
    rewards = [[answer.response_metadata["reward"] for answer in answers] for answers in (together, alone)]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-4)  # requests that score together share batches


def test_the_search_ends_no_worse_than_the_plain_samples_it_began_with():
    metadata = model().invoke(QUESTION).response_metadata
    assert metadata["reward"] >= metadata["trace"][0]["best"]
    assert [line["samples"] for line in metadata["trace"]] == [4, 8]


def test_the_demo_is_judged_by_its_own_reward_model():
    answer = model().invoke(QUESTION)
    pair = ([{"role": "user", "content": QUESTION}], Response(answer.content))
    with ClassifierReward.from_pretrained(REWARD_MODEL_PATH).submit([pair]) as ticket:
        assert answer.response_metadata["reward"] == pytest.approx(float(ticket.future.result()), abs=1e-4)


async def test_a_timeout_around_a_call_stops_the_model(passes):
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(model(method=LONG_SEARCH).ainvoke(QUESTION), timeout=1)
    assert len(passes) > 0
    assert stands_still(passes)


async def test_a_closed_async_stream_stops_the_model(passes):
    stream = model(method=LONG_SEARCH).astream(QUESTION)
    await anext(stream)
    await stream.aclose()
    assert stands_still(passes)


def test_a_closed_stream_stops_the_model(passes):
    stream = model(method=LONG_SEARCH).stream(QUESTION)
    next(stream)
    stream.close()
    assert stands_still(passes)


def test_the_timeout_of_the_model_returns_the_best_answer_so_far():
    answer = model(method=LONG_SEARCH, timeout=1).invoke(QUESTION)
    assert answer.content
    assert answer.response_metadata["stopped"] == "seconds"


def test_a_stop_string_is_not_part_of_the_answer():
    word = model().invoke(QUESTION).content.split()[1]
    assert word not in model(stop=[word], reward=longest).invoke(QUESTION).content


def test_an_answer_may_end_by_itself_where_a_stop_string_was_awaited():
    answer = model(method=BestOfN(samples=1), max_tokens=100, stop=["a string that nobody says"]).invoke(QUESTION)
    assert answer.response_metadata["finish_reason"] == "stop"


def test_tokens_are_counted_as_the_model_reads_them():
    chat = model()
    messages = [SystemMessage("Be kind."), HumanMessage(QUESTION)]
    assert chat.get_num_tokens_from_messages(messages) == chat.invoke(messages).usage_metadata["input_tokens"]
    assert chat.get_num_tokens(QUESTION) == len(chat.get_token_ids(QUESTION)) > 1


def test_a_prompt_beyond_the_context_is_refused_before_anything_is_computed(passes):
    chat = model()
    too_long = [HumanMessage(f"{QUESTION}. " * chat.profile["max_input_tokens"])]
    with pytest.raises(ContextOverflowError, match="tokens"):
        chat.invoke(too_long)
    assert chat.get_num_tokens_from_messages(too_long) >= chat.profile["max_input_tokens"]
    assert passes == []


@pytest.mark.parametrize(
    "messages",
    [
        [HumanMessage(QUESTION), AIMessage("I am sorry")],
        [SystemMessage("Be kind."), SystemMessage("Be brief."), HumanMessage("Hello"), HumanMessage(QUESTION)],
        [HumanMessage("Hello"), AIMessage("Hello"), SystemMessage("Be kind."), HumanMessage(QUESTION)],
        [HumanMessage(QUESTION, name="ann")],
        [
            HumanMessage(QUESTION),
            AIMessage("", tool_calls=[{"name": "track", "args": {"order": 1}, "id": "call-1"}]),
            ToolMessage("no such order", tool_call_id="call-1", status="error"),
        ],
    ],
    ids=["prefill", "doubled", "late system", "name", "tools"],
)
def test_conversations_of_every_shape_are_answered(messages):
    assert model().invoke(messages).content


def test_copies_and_pickles_use_the_engine_that_is_there():
    chat = model()
    engine = chat._live_engine()
    for other in (copy.copy(chat), copy.deepcopy(chat), pickle.loads(pickle.dumps(chat))):
        assert other._live_engine() is engine
        assert said(other.invoke(QUESTION)) == said(chat.invoke(QUESTION))


def test_a_live_engine_answers_like_the_model_it_holds():
    with TransformersEngine.from_pretrained("demo") as engine:
        chat = AISPChatModel(
            engine=engine,
            reward=ClassifierReward.from_pretrained(REWARD_MODEL_PATH),
            method=METHOD,
            max_tokens=16,
        )
        assert said(chat.invoke(QUESTION)) == said(model().invoke(QUESTION))


def test_best_of_n_is_a_method_too():
    answer = model(method=BestOfN(samples=8)).invoke(QUESTION)
    assert answer.response_metadata["method"] == "best_of_n"
    assert answer.response_metadata["samples"] == 8
