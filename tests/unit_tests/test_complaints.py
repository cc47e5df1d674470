"""What users of local models in LangChain complain about, reproduced with this chat model on random weights.

Numbers are those of issues and pull requests of langchain-ai/langchain.
"""

import asyncio
import socket
import warnings

import pytest
import torch
from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from pydantic import BaseModel, Field

from langchain_aisp import AISP, AISPChatModel, BestOfN, as_reward
from langchain_aisp.engine import TransformersEngine
from tests import tiny

QUESTION = "Where is order 17?"
ONE = BestOfN(samples=1)
ENDLESS = AISP(samples=4096, iterations=512)


class Line(BaseModel):
    """One line of a bill."""

    item: str = Field(max_length=6)
    euros: int = Field(ge=1, le=99)


class Bill(BaseModel):
    """What is to be paid."""

    lines: list[Line] = Field(min_length=1, max_length=2)
    paid: bool


@tool
def look_up(order: int) -> str:
    """Look up where an order is."""
    return f"order {order} is on its way"


def longest(chat, responses):
    return [float(len(text)) for text in responses]


@pytest.fixture
def engine():
    with TransformersEngine(*tiny.family("qwen")) as engine:
        yield engine


@pytest.fixture(params=tiny.TEMPLATES)
def caller(request):
    """Chat models of families whose templates tell of tools; any call is better than any text."""
    calls = as_reward(lambda chat, responses: [float(len(each.tool_calls)) for each in responses], sees="response")
    with TransformersEngine(*tiny.family(request.param)) as engine:
        yield model(engine, reward=calls, method=BestOfN(samples=32), max_tokens=120)


def model(engine, **options):
    return AISPChatModel(**{"engine": engine, "reward": longest, "method": ONE, "max_tokens": 16, **options})


def watch(engine, before_pass):
    """Have ``before_pass`` called with the number of rows before every forward pass; returns the hook's handle."""
    return engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: before_pass(len(kwargs["input_ids"])), with_kwargs=True
    )


def test_tools_reach_the_template(caller, monkeypatch):
    """#29033, #30453, #39841: bound tools are dropped before the chat template sees them."""
    engine, prompts = caller.engine, []
    encode = engine.encode

    def kept(chat, **options):
        prompts.append(encode(chat, **options))
        return prompts[-1]

    monkeypatch.setattr(engine, "encode", kept)
    caller.bind_tools([look_up]).invoke(QUESTION)
    [prompt] = prompts
    text = engine.tokenizer.decode(prompt.ids)
    assert QUESTION in text
    assert "look_up" in text
    assert "Look up where an order is." in text
    assert '"order"' in text


def test_a_call_that_is_asked_for_is_made_and_its_result_is_understood(caller):
    """#29033, #30453, #35435: a local model never answers with tool calls, and a ToolMessage is an unknown message."""
    call = caller.bind_tools([look_up], tool_choice="look_up", parallel_tool_calls=False).invoke(QUESTION)
    [request] = call.tool_calls
    result = look_up.invoke(request)
    assert result.content == f"order {request['args']['order']} is on its way"
    assert caller.bind_tools([look_up], tool_choice="none").invoke([HumanMessage(QUESTION), call, result]).content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_works_in_a_chain(caller, method):
    """#29569, #32197: Pydantic classes are not supported, and the answer does not follow the schema."""
    prompt = ChatPromptTemplate.from_messages([("system", "You write bills."), ("human", "{order}")])
    chain = prompt | caller.with_structured_output(Bill, method=method)
    first, second = chain.batch([{"order": "A cake."}, {"order": "A cup of tea."}])
    for bill in (first, second, *chain.stream({"order": "A cake."})):
        assert isinstance(bill, Bill)
        assert all(1 <= line.euros <= 99 for line in bill.lines)


async def test_async_calls_work_and_leave_the_event_loop_free(engine):
    """#3869, #35095: async generation is not supported with a local pipeline."""
    chat, beats = model(engine), []

    async def beat():
        while True:
            beats.append(1)
            await asyncio.sleep(0)

    heart = asyncio.create_task(beat())
    answer = await chat.ainvoke(QUESTION)
    streamed = [chunk async for chunk in chat.astream(QUESTION)]
    batched = await chat.abatch([QUESTION, QUESTION])
    heart.cancel()
    assert {streamed[-1].content, *(each.content for each in batched)} == {answer.content}
    assert len(beats) > 16  # the loop turned while tokens were decoded, a call that blocks it lets it turn a few times


@pytest.mark.parametrize("call", ["invoke", "stream"])
def test_the_answer_does_not_repeat_the_prompt(engine, call):
    """#25916: the answer begins with the whole conversation, control tokens included."""
    answer = getattr(model(engine), call)([SystemMessage("Be kind."), HumanMessage(QUESTION)])
    text = "".join(chunk.content for chunk in answer) if call == "stream" else answer.content
    assert text
    assert not any(part in text for part in (QUESTION, "Be kind.", *engine.control_tokens))


@pytest.mark.parametrize("call", ["invoke", "stream", "constructor"])
def test_an_answer_ends_at_a_stop_string_of_several_tokens(engine, call):
    """#22601: stop strings are ignored, or taken for single tokens."""
    chat = model(engine, max_tokens=30, seed=1)
    whole = chat.invoke(QUESTION).content
    stop = whole[7:10]
    assert len(stop) == 3
    if call == "invoke":
        said = chat.invoke(QUESTION, stop=[stop]).content
    elif call == "stream":
        said = "".join(chunk.content for chunk in chat.stream(QUESTION, stop=[stop]))
    else:
        said = model(engine, max_tokens=30, seed=1, stop=[stop]).invoke(QUESTION).content
    assert said == whole[: whole.index(stop)] != ""


def test_parameters_of_one_call_change_that_call(engine):
    """Sampling options of a call are swallowed: the pipeline's own hold."""
    chat = model(engine)
    assert chat.invoke(QUESTION, max_tokens=3).usage_metadata["output_tokens"] <= 3
    assert len({chat.invoke(QUESTION, seed=seed).content for seed in range(3)}) == 3
    assert len({chat.invoke(QUESTION, seed=seed, temperature=0).content for seed in range(3)}) == 1
    assert len({chat.invoke(QUESTION, seed=seed, top_k=1).content for seed in range(3)}) == 1
    assert chat.bind(max_tokens=3).invoke(QUESTION).content == chat.invoke(QUESTION, max_tokens=3).content


@pytest.mark.parametrize(
    "end",
    [
        [AIMessage("It is")],
        [SystemMessage("Be brief.")],
        [
            AIMessage("", tool_calls=[{"name": "look_up", "args": {"order": 17}, "id": "1"}]),
            ToolMessage("lost", tool_call_id="1"),
        ],
    ],
    ids=["assistant", "system", "tool"],
)
def test_the_last_message_may_be_of_any_kind(engine, end):
    """#15232: Last message must be a HumanMessage!"""
    assert model(engine).invoke([HumanMessage(QUESTION), *end]).content


def test_reasoning_is_told_apart_from_the_answer():
    """#34011: what a model thinks is lost, or left in the answer with its marks."""
    weights, letters = tiny.family("qwen", seed=4, marks=["<think>", "</think>"])

    def thoughtful(chat, responses):
        return [float(bool(each.reasoning) and bool(each.text) and "<" not in each.text) for each in responses]

    template = tiny.TEMPLATES["qwen"].replace("assistant\n", "assistant\n<think>")
    with TransformersEngine(weights, letters, chat_template=template) as engine:
        reward = as_reward(thoughtful, sees="response")
        chat = model(engine, reward=reward, method=BestOfN(samples=128, samples_per_wave=128), max_tokens=40)
        answer = chat.invoke(QUESTION)
    assert [block["type"] for block in answer.content_blocks] == ["reasoning", "text"]
    assert answer.additional_kwargs["reasoning_content"] == answer.content_blocks[0]["reasoning"]
    assert "think>" not in answer.content


def test_a_folder_needs_no_token_and_no_network(tmp_path, monkeypatch):
    """#24571, #25258: a hub token is asked for though the model is on the disk."""
    asked = []

    def refuse(_, address):
        asked.append(address)
        raise OSError("there is no network")

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    chat = AISPChatModel(model=tiny.save("llama", tmp_path), reward=longest, method=ONE, max_tokens=8)
    assert chat.invoke(QUESTION).content
    assert asked == []


def test_a_batch_too_large_for_the_memory_is_answered_in_parts(engine):
    """#16824: a batch runs out of memory, and all of it is lost."""
    chat = model(engine, method=BestOfN(samples=8), max_tokens=6)
    questions = [f"Where is order {number}?" for number in range(4)]
    alone = [chat.invoke(question).content for question in questions]

    def run_out(rows):
        if rows > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")

    watch(engine, run_out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        assert [answer.content for answer in chat.batch(questions)] == alone
    assert engine.max_rows <= 8


async def test_an_error_while_decoding_reaches_the_reader_of_the_stream(engine):
    """#19770: an error in the thread that decodes surfaces as queue.Empty after a minute, or as silence."""
    chat = model(engine)
    expected = chat.invoke(QUESTION).content

    def fail(rows):
        raise RuntimeError("the device is gone")

    broken = watch(engine, fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        list(chat.stream(QUESTION))
    with pytest.raises(RuntimeError, match="the device is gone"):
        [chunk async for chunk in chat.astream(QUESTION)]
    broken.remove()
    assert chat.invoke(QUESTION).content == expected


@pytest.mark.parametrize("leave", ["close", "break", "cancel"])
async def test_a_stream_that_is_left_frees_the_model(engine, leave):
    """A closed stream leaves its thread generating until max_tokens."""
    passes = []
    watch(engine, passes.append)
    chat = model(engine, method=ENDLESS)
    if leave == "cancel":
        reader = asyncio.create_task(chat.ainvoke(QUESTION))
        while len(passes) < 5:  # in the midst of a wave
            await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
    else:
        stream = chat.stream(QUESTION)
        next(stream)
        if leave == "close":
            stream.close()
        del stream  # where a loop was broken off, this closes it
    busy = max(passes)
    passes.clear()
    await model(engine, method=ONE, max_tokens=8).ainvoke("Hello")
    assert busy >= 8
    assert max(passes[-4:]) <= 4  # rows of the search would decode beside those of this call


def test_models_share_no_cached_answers(tmp_path):
    """#25712: the cache's key names neither model nor parameters, so one model gets the answers of another."""
    cache = InMemoryCache()
    first, second = (tiny.save("llama", tmp_path / str(seed), seed) for seed in range(2))

    def ask(folder, cache=None, **options):
        settings = {"reward": longest, "method": ONE, "max_tokens": 12, **options}
        return AISPChatModel(model=folder, cache=cache, **settings).invoke(QUESTION).content

    assert ask(first, cache) == ask(first)
    assert ask(second, cache) == ask(second) != ask(first)
    assert ask(first, cache, temperature=0) == ask(first, temperature=0) != ask(first)
    assert len(cache._cache) == 3
    assert ask(first, cache) == ask(first)
    assert len(cache._cache) == 3
