"""The chat model in the toy world: every way of calling it, what it reports, what it refuses, and what it shares."""

import asyncio
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.exceptions import ContextOverflowError, ModelTimeoutError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, trim_messages
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langgraph.graph import END, START, MessagesState, StateGraph
from pydantic import ValidationError

import langchain_aisp
from langchain_aisp import AISP, AISPChatModel, BestOfN, Budget, aiterate, as_reward, iterate
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.rewards import RewardError
from langchain_aisp.types import ContextLengthError
from tests.toy import ToyEngine

METHOD = BestOfN(samples=6, samples_per_wave=2)  # three waves


def longest(chat, responses):
    return [float(len(text)) for text in responses]


def shortest(chat, responses):
    return [-float(len(text)) for text in responses]


@dataclass
class Engine(ToyEngine):
    """The toy engine with what an engine on a real tokenizer can do besides."""

    end_bias: float = 1.5  # short answers
    context_length: int = 1000
    continued: list[bool] = field(default_factory=list)
    _closed: bool = False

    def encode(self, chat, *, tools=(), seed=0, continue_last=False):
        prompt = super().encode(chat, tools=tools, seed=seed, continue_last=continue_last)
        self.continued.append(continue_last)
        if len(prompt.ids) >= self.context_length:
            raise ContextLengthError(f"{len(prompt.ids)} tokens are too many")
        return prompt

    def tokenize(self, chat, *, tools=(), continue_last=False):
        return list(super().encode(chat, continue_last=continue_last).ids)

    def token_ids(self, text):
        return [ord(letter) for letter in text]

    def count_tokens(self, text):
        return len(text)


@dataclass
class HeldEngine(Engine):
    """Waves wait in their threads until they are let go; the wave with ``passing`` others before it is the first."""

    threaded: bool = True
    passing: int = 0
    go: threading.Event = field(default_factory=threading.Event)
    cancelled: int = 0

    def decode(self, wave, deadline=None, cancelled=None):
        if len(self.waves) > self.passing:
            self.go.wait(timeout=10)
        return super().decode(wave, deadline, cancelled)

    def submit(self, wave, *, deadline=None):
        ticket = super().submit(wave, deadline=deadline)
        tell = ticket._cancel

        def cancel():
            self.cancelled += 1
            tell()

        ticket._cancel = cancel
        return ticket


def model(**options):
    return AISPChatModel(**{"engine": Engine(), "reward": longest, "method": METHOD, "max_tokens": 8, **options})


def timeless(message):
    """What a message says, without the parts that depend on the clock or on the run."""
    metadata = dict(message.response_metadata)
    metadata.pop("seconds")
    trace = [{name: value for name, value in line.items() if "seconds" not in name} for line in metadata.pop("trace")]
    return message.content, message.usage_metadata, metadata, trace


def merged(chunks):
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    return total


# -- answers ----------------------------------------------------------------------------------------------------------


def test_the_answer_is_the_response_that_the_reward_likes_best():
    options = {"engine": Engine(end_bias=0.0), "method": BestOfN(samples=12), "max_tokens": 16}
    long, short = model(**options).invoke("Hello"), model(**options, reward=shortest).invoke("Hello")
    assert len(long.content) == long.response_metadata["reward"]
    assert len(short.content) == -short.response_metadata["reward"]
    assert len(long.content) > len(short.content)


def test_the_metadata_tell_what_was_found_and_what_it_cost():
    metadata = model(seed=7).invoke("Hello").response_metadata
    assert metadata["model_name"] == "toy"
    assert metadata["method"] == "best_of_n"
    assert metadata["finish_reason"] == "stop"
    assert metadata["stopped"] == "iterations"
    assert metadata["samples"] == 6
    assert metadata["seed"] == 7
    assert 1 <= metadata["reward_calls"] <= 6
    assert metadata["sampled_tokens"] >= 6
    assert metadata["seconds"] > 0
    assert [line["iteration"] for line in metadata["trace"]] == [0, 1, 2]
    assert all({"best", "mean", "ess", "control_kl", "seconds"} <= line.keys() for line in metadata["trace"])
    assert metadata["trace"][-1]["best"] == metadata["reward"]


def test_usage_counts_the_prompt_and_the_returned_answer_only():
    answer = model().invoke("Hello")
    letters = len(answer.content) + (answer.response_metadata["finish_reason"] == "stop")  # and the end token
    prompt = len("user: Hello\n")
    assert answer.usage_metadata == {
        "input_tokens": prompt,
        "output_tokens": letters,
        "total_tokens": prompt + letters,
    }
    assert answer.response_metadata["sampled_tokens"] > letters


async def test_every_way_of_calling_gives_the_same_answer():
    chat = model(seed=3)
    expected = timeless(chat.invoke("Hello"))
    assert timeless(await chat.ainvoke("Hello")) == expected
    assert timeless(merged(list(chat.stream("Hello")))) == expected
    assert timeless(merged([chunk async for chunk in chat.astream("Hello")])) == expected
    assert [timeless(answer) for answer in chat.batch(["Hello", "Hey", "Hello"])][::2] == [expected] * 2
    assert [timeless(answer) for answer in await chat.abatch(["Hello", "Hey", "Hello"])][::2] == [expected] * 2
    assert timeless(model(seed=3, streaming=True).invoke("Hello")) == expected


async def test_the_default_method_answers_too():
    chat = model(method=AISP(samples=16, iterations=4))
    answer = chat.invoke("Hello")
    assert answer.response_metadata["method"] == chat.method.name
    assert timeless(await chat.ainvoke("Hello")) == timeless(answer)


@pytest.mark.parametrize("asked", [1, 3, 100])
async def test_generations_are_the_best_distinct_responses(asked):
    chat = model(n=asked)
    [one] = chat.generate([[HumanMessage("Hello")]]).generations
    [other] = (await chat.agenerate([[HumanMessage("Hello")]])).generations
    told = [generation.message.response_metadata for generation in one]
    ranks = [(metadata["finish_reason"] == "stop", metadata["reward"]) for metadata in told]  # cut-off ones come last
    assert [generation.text for generation in one] == [generation.text for generation in other]
    assert len({generation.text for generation in one}) == len(one) == min(asked, 6)
    assert ranks == sorted(ranks, reverse=True)
    assert one[0].message.content == chat.invoke("Hello").content == model().invoke("Hello", n=2).content


def test_another_seed_gives_another_answer():
    assert len({model(seed=seed).invoke("Hello").content for seed in range(4)}) > 1


def test_without_a_seed_each_call_draws_one_and_tells_it():
    chat = model(seed=None)
    first, second = chat.invoke("Hello"), chat.invoke("Hello")
    assert first.response_metadata["seed"] != second.response_metadata["seed"]
    assert timeless(model(seed=first.response_metadata["seed"]).invoke("Hello")) == timeless(first)


def test_an_answer_of_the_assistant_at_the_end_is_continued():
    engine = Engine()
    chat = model(engine=engine)
    chat.invoke([HumanMessage("Name a colour."), AIMessage("It is")])
    chat.invoke("Name a colour.")
    assert engine.continued == [True, False]


# -- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_brings_a_line_of_the_trace_per_iteration_and_then_the_answer():
    *progress, last = list(model().stream("Hello"))
    assert [chunk.content for chunk in progress] == ["", "", ""]
    assert [line["iteration"] for chunk in progress for line in chunk.response_metadata["trace"]] == [0, 1, 2]
    assert last.content
    assert last.chunk_position == "last"
    assert [chunk.chunk_position for chunk in progress] == [None] * 3


def test_only_the_last_chunk_carries_what_cannot_be_merged():
    *progress, last = list(model().stream("Hello"))
    assert all(chunk.response_metadata.keys() == {"trace"} and chunk.usage_metadata is None for chunk in progress)
    assert "trace" not in last.response_metadata
    assert last.usage_metadata is not None


def test_a_closed_stream_decodes_nothing_more():
    engine = Engine()
    stream = model(engine=engine).stream("Hello")
    next(stream)
    stream.close()
    assert len(engine.waves) == 1


async def test_a_closed_async_stream_decodes_nothing_more():
    engine = Engine()
    stream = model(engine=engine).astream("Hello")
    await anext(stream)
    await stream.aclose()
    assert len(engine.waves) == 1


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
async def test_events_version_3_carry_the_answer():
    chat = model()
    expected = chat.invoke("Hello").content
    stream = chat.stream_events("Hello", version="v3")
    list(stream)
    assert stream.output.text == expected
    astream = await chat.astream_events("Hello", version="v3")
    [event async for event in astream]
    assert (await astream.output).text == expected


async def test_a_closed_stream_has_closed_its_search_when_it_returns(monkeypatch):
    searches = []  # kept, so that it is not the garbage collector that closes them

    def keep(search):
        def kept(*args, **settings):
            searches.append(search(*args, **settings))
            return searches[-1]

        return kept

    monkeypatch.setattr("langchain_aisp.request.iterate", keep(iterate))
    monkeypatch.setattr("langchain_aisp.request.aiterate", keep(aiterate))
    stream, astream = model()._stream([HumanMessage("Hello")]), model()._astream([HumanMessage("Hello")])
    next(stream)
    stream.close()
    await anext(astream)
    await astream.aclose()
    assert searches[0].gi_frame is None
    assert searches[1].ag_frame is None


# -- cancellation and concurrency -------------------------------------------------------------------------------------


async def test_a_timeout_around_a_call_cancels_the_wave_in_flight():
    engine = HeldEngine(passing=1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(model(engine=engine).ainvoke("Hello"), timeout=0.5)
    engine.go.set()
    assert (len(engine.waves), engine.cancelled) == (2, 1)


async def test_a_cancelled_reader_of_a_stream_cancels_the_wave_in_flight():
    engine = HeldEngine(passing=1)
    first = asyncio.Event()

    async def read():
        async for _ in model(engine=engine).astream("Hello"):
            first.set()

    task = asyncio.create_task(read())
    await asyncio.wait_for(first.wait(), timeout=5)
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    engine.go.set()
    assert (len(engine.waves), engine.cancelled) == (2, 1)


async def test_callers_who_wait_occupy_no_thread_of_the_default_executor():
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max_workers=1))
    engine = HeldEngine()
    chat = model(engine=engine)
    callers = [asyncio.create_task(chat.ainvoke(f"Hello {number}")) for number in range(8)]
    while len(engine.waves) < 8:  # each of them waits for its first wave; a parked caller would block the others
        await asyncio.sleep(0.01)
    engine.go.set()
    answers = await asyncio.gather(*callers)
    assert [timeless(answer) for answer in answers] == [
        timeless(model().invoke(f"Hello {number}")) for number in range(8)
    ]


# -- progress ---------------------------------------------------------------------------------------------------------


class Listener(BaseCallbackHandler):
    def __init__(self):
        self.events, self.runs, self.tokens = [], [], []

    def on_chat_model_start(self, *_, run_id, **__):
        self.runs.append(run_id)

    def on_custom_event(self, name, data, *, run_id, **_):
        self.events.append((name, data["iteration"], run_id))

    def on_llm_new_token(self, token, **_):
        self.tokens.append(token)


class AsyncListener(AsyncCallbackHandler):
    def __init__(self):
        self.events = []

    async def on_custom_event(self, name, data, **_):
        self.events.append((name, data["iteration"]))


EVENTS = [("aisp_iteration", 0), ("aisp_iteration", 1), ("aisp_iteration", 2)]


def test_callbacks_of_a_call_hear_of_every_iteration():
    listener = Listener()
    model().invoke("Hello", config={"callbacks": [listener]})
    assert listener.events == [(*event, listener.runs[0]) for event in EVENTS]
    assert listener.tokens == []


def test_callbacks_of_the_model_hear_of_every_iteration():
    listener = Listener()
    model(callbacks=[listener]).invoke("Hello")
    assert [event[:2] for event in listener.events] == EVENTS


async def test_async_callbacks_hear_of_every_iteration():
    listener = AsyncListener()
    await model().ainvoke("Hello", config={"callbacks": [listener]})
    assert listener.events == EVENTS


@pytest.mark.parametrize("call", ["invoke", "stream"])
def test_callbacks_of_a_chain_hear_of_every_iteration_once(call):
    listener = Listener()
    chain = RunnableLambda(lambda text: [HumanMessage(text)]) | model()
    answer = getattr(chain, call)("Hello", config={"callbacks": [listener]})
    assert list(answer)
    assert [event[:2] for event in listener.events] == EVENTS


async def test_async_callbacks_of_a_streamed_chain_hear_of_every_iteration_once():
    listener = AsyncListener()
    chain = RunnableLambda(lambda text: [HumanMessage(text)]) | model()
    assert [chunk async for chunk in chain.astream("Hello", config={"callbacks": [listener]})]
    assert listener.events == EVENTS


async def test_stream_events_of_a_chain_show_the_iterations():
    chain = RunnableLambda(lambda text: [HumanMessage(text)]) | model()
    events = [event async for event in chain.astream_events("Hello", version="v2")]
    shown = [(event["name"], event["data"]["iteration"]) for event in events if event["event"] == "on_custom_event"]
    assert shown == EVENTS


def graph(node):
    builder = StateGraph(MessagesState)
    builder.add_node("answer", node)
    builder.add_edge(START, "answer")
    builder.add_edge("answer", END)
    return builder.compile()


def test_a_graph_streams_the_iterations_and_the_answer():
    chat = model()
    app = graph(lambda state: {"messages": [chat.invoke(state["messages"])]})
    streamed = list(app.stream({"messages": [HumanMessage("Hello")]}, stream_mode=["custom", "messages"]))
    custom = [data["aisp_iteration"]["iteration"] for mode, data in streamed if mode == "custom"]
    text = "".join(message.content for mode, (message, _) in (part for part in streamed if part[0] == "messages"))
    assert custom == [0, 1, 2]
    assert text == chat.invoke("Hello").content


async def test_an_async_graph_streams_the_iterations():
    chat = model()

    async def answer(state):
        return {"messages": [await chat.ainvoke(state["messages"])]}

    parts = graph(answer).astream({"messages": [HumanMessage("Hello")]}, stream_mode="custom")
    assert [part["aisp_iteration"]["iteration"] async for part in parts] == [0, 1, 2]


def test_an_agent_without_tools_answers():
    chat = model()
    state = create_agent(chat, tools=[]).invoke({"messages": [HumanMessage("Hello")]})
    assert state["messages"][-1].content == chat.invoke("Hello").content


def test_an_event_tells_the_numbers_and_the_best_text_so_far():
    class Keeper(BaseCallbackHandler):
        def on_custom_event(self, name, data, **_):
            self.data = data

    keeper = Keeper()
    answer = model().invoke("Hello", config={"callbacks": [keeper]})
    assert keeper.data == {**answer.response_metadata["trace"][-1], "text": answer.content}


def test_an_error_of_a_callback_is_not_swallowed():
    class Broken(Listener):
        raise_error = True

        def on_custom_event(self, *_, **__):
            raise RuntimeError("the callback broke")

    with pytest.raises(RuntimeError, match="the callback broke"):
        model().invoke("Hello", config={"callbacks": [Broken()]})


# -- options of one call ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_tokens", 5), ("temperature", 0.5), ("top_p", 0.9), ("top_k", 3)],
)
def test_sampling_can_be_set_for_one_call(option, value):
    engine = Engine()
    chat = model(engine=engine)
    chat.invoke("Hello", **{option: value})
    chat.invoke("Hello")
    assert getattr(engine.waves[0].sampling, option) == value
    assert getattr(engine.waves[-1].sampling, option) == getattr(chat, option)


def test_a_stop_string_ends_the_answer_and_a_call_replaces_those_of_the_model():
    engine = Engine()
    chat = model(engine=engine, stop=["b"])
    assert "b" not in chat.invoke("Hello").content
    assert "a" not in chat.invoke("Hello", stop=["a"]).content
    assert [engine.waves[index].sampling.stop for index in (0, -1)] == [("b",), ("a",)]


def test_method_reward_seed_and_budget_can_be_set_for_one_call():
    chat = model()
    assert timeless(chat.invoke("Hello", seed=5)) == timeless(model(seed=5).invoke("Hello"))
    assert timeless(chat.invoke("Hello", reward=shortest)) == timeless(model(reward=shortest).invoke("Hello"))
    assert chat.invoke("Hello", method=BestOfN(samples=3)).response_metadata["samples"] == 3
    limited = chat.invoke("Hello", budget=Budget(samples=5)).response_metadata
    assert (limited["samples"], limited["stopped"]) == (5, "samples")
    assert chat.bind(budget=Budget(target_reward=1.0)).invoke("Hello").response_metadata["stopped"] == "target_reward"


@pytest.mark.parametrize(
    ("budget", "timeout", "expected"),
    [(Budget(), None, None), (Budget(), 60, 60), (Budget(seconds=5), 60, 5), (Budget(seconds=90), 60, 60)],
)
def test_the_tighter_of_timeout_and_budget_holds(budget, timeout, expected):
    engine = Engine()
    model(engine=engine, budget=budget).invoke("Hello", timeout=timeout)
    assert (engine.deadlines[0] is None) == (expected is None)
    assert model(budget=budget, timeout=timeout)._budget.seconds == expected


@pytest.mark.parametrize("call", ["invoke", "stream"])
def test_an_unknown_option_of_a_call_raises_and_names_the_possible_ones(call):
    with pytest.raises(TypeError, match=r"no option logit_bias of a call.*max_tokens.*stop.*temperature"):
        list(getattr(model(), call)("Hello", logit_bias={}))


def test_a_value_that_no_decoder_can_follow_raises_for_one_call_too():
    with pytest.raises(ValidationError, match="top_p must be in"):
        model().invoke("Hello", top_p=0)
    with pytest.raises(ValidationError, match="max_tokens"):
        model().invoke("Hello", max_tokens="many")


def test_a_live_engine_cannot_be_replaced_by_a_model_for_one_call():
    with pytest.raises(ValidationError, match="either model="):
        model().invoke("Hello", model="another")


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "some/model"}, "'some/model' needs a reward"),
        ({"engine": Engine()}, "'toy' needs a reward"),
        ({"reward": longest}, "Give either model="),
        ({"model": "demo", "engine": Engine()}, "Give either model="),
        ({"model": "demo", "method": BestOfN}, r"such as AISP\(samples=256\)"),
        ({"model": "demo", "method": "aisp"}, r"such as AISP\(samples=256\)"),
        ({"engine": "demo", "reward": longest}, "goes into model="),
        ({"model": "demo", "temperature": -1}, "temperature must not be negative"),
        ({"model": "demo", "max_tokens": 0}, "max_tokens must be at least 1"),
        ({"model": "demo", "timeout": 0}, "seconds must be positive"),
        ({"model": "demo", "stop": [""]}, "a stop string must not be empty"),
        ({"model": "demo", "stop": "end"}, "valid list"),
    ],
)
def test_a_construction_that_cannot_work_raises_at_once(options, message):
    with pytest.raises(ValidationError, match=message):
        AISPChatModel(**options)


def test_what_is_no_reward_raises_at_once():
    with pytest.raises(TypeError, match="a reward must be"):
        AISPChatModel(model="demo", reward=3)


def test_an_unknown_argument_warns_and_hints():
    with pytest.warns(UserWarning, match=r"no argument 'max_token'.*'max_tokens'"):
        model(max_token=3)
    with pytest.warns(UserWarning, match=r"no argument 'samples'.*method=AISP"):
        model(samples=3)


def test_the_names_of_other_chat_models_are_understood():
    chat = AISPChatModel(model_name="demo", stop_sequences=["x"], request_timeout=3, max_retries=2, api_key="k")
    assert (chat.model, chat.stop, chat.timeout) == ("demo", ["x"], 3)
    assert "k'" not in repr(chat)


def test_an_empty_list_of_messages_raises():
    with pytest.raises(ValueError, match="at least one message"):
        model().invoke([])


def test_an_image_raises():
    with pytest.raises(ValueError, match="text only"):
        model().invoke([HumanMessage([{"type": "image", "base64": "aGk=", "mime_type": "image/png"}])])


async def test_a_prompt_too_long_raises_what_langchain_knows():
    chat = model(engine=Engine(context_length=100))
    with pytest.raises(ContextOverflowError, match="too many"):
        chat.invoke("x" * 200)
    with pytest.raises(ContextOverflowError, match="too many"):
        [chunk async for chunk in chat.astream("x" * 200)]


async def test_no_answer_in_time_raises_what_langchain_knows():
    chat = model(timeout=1e-6)
    with pytest.raises(ModelTimeoutError, match=r"no answer within 1e-06 seconds"):
        chat.invoke("Hello")
    with pytest.raises(ModelTimeoutError, match="more time"):
        await chat.ainvoke("Hello")


async def test_an_error_of_the_reward_reaches_every_caller():
    def broken(chat, responses):
        raise KeyError("no such score")

    chat = model(reward=broken)
    for call in (chat.invoke, lambda text: list(chat.stream(text)), lambda text: chat.batch([text])):
        with pytest.raises(RewardError, match="no such score"):
            call("Hello")
    with pytest.raises(RewardError, match="no such score"):
        await chat.ainvoke("Hello")


# -- caches -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache():
    return InMemoryCache()


def is_cached(chat, cache, **options):
    """Whether a call is answered from what others have left in the cache."""
    before = len(cache._cache)
    chat.invoke("Hello", **options)
    return len(cache._cache) == before


def test_the_same_model_finds_its_own_answers(cache):
    engine = Engine()
    first, second = model(engine=engine, cache=cache).invoke("Hello"), model(engine=engine, cache=cache).invoke("Hello")
    assert len(engine.waves) == 3
    assert second.content == first.content


@pytest.mark.parametrize(
    "options",
    [
        {"reward": shortest},
        {"method": BestOfN(samples=8)},
        {"method": BestOfN(samples=6, samples_per_wave=3)},
        {"seed": 1},
        {"max_tokens": 7},
        {"temperature": 0.9},
        {"top_p": 0.9},
        {"top_k": 5},
        {"stop": ["a"]},
        {"budget": Budget(samples=2)},
        {"timeout": 100},
        {"engine": Engine()},
    ],
    ids=lambda options: next(iter(options)),
)
def test_models_that_may_answer_differently_share_no_cached_answer(cache, options):
    engine = Engine()
    model(engine=engine, cache=cache).invoke("Hello")
    assert not is_cached(model(**{"engine": engine, "cache": cache, **options}), cache)
    if "engine" not in options:
        assert is_cached(model(engine=engine, cache=cache), cache, **options)  # an option of the call is the same


def test_two_lambdas_share_no_cached_answer(cache):
    engine = Engine()
    scales = [torch.ones(1), torch.zeros(1)]  # no stable description, so that only identity tells them apart
    for scale in scales:
        reward = lambda chat, responses, scale=scale: [len(text) * float(scale) for text in responses]  # noqa: E731
        assert not is_cached(model(engine=engine, cache=cache, reward=reward), cache)
        assert not is_cached(model(engine=engine, cache=cache), cache, reward=reward)
        del reward


def test_two_engines_of_one_name_share_no_cached_answer_even_at_one_address(cache):
    for _ in range(5):
        chat = model(engine=Engine(), cache=cache)
        assert not is_cached(chat, cache)
        del chat


def test_models_of_different_names_and_revisions_have_different_identities():
    options = [{"model": "a/b"}, {"model": "a/c"}, {"model": "a/b", "revision": "x"}, {"model": "a/b", "adapter": "x"}]
    options += [{"model": "a/b", "dtype": "bfloat16"}, {"model": "a/b", "quantization": "int8"}]
    options += [{"model": "a/b", "chat_template": "x"}, {"model": "a/b", "device": "meta"}]
    identities = {AISPChatModel(reward=longest, **each)._get_llm_string() for each in options}
    assert len(identities) == len(options)


# -- copies -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch):
    """The models that were loaded, by name; each is a toy."""
    loaded = []

    def from_pretrained(cls, name, **options):
        loaded.append(name)
        return Engine(letters=3 + len(name))

    monkeypatch.setattr(TransformersEngine, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr("langchain_aisp.engine.transformers._shared", {})
    return loaded


def test_construction_loads_nothing(loads):
    chat = AISPChatModel(model="toy/first", reward=longest)
    assert chat.model_name == "toy/first"
    assert chat.profile["name"] == "toy/first"
    assert loads == []


def test_copies_pickles_and_configurations_share_what_was_loaded(loads):
    chat = AISPChatModel(model="toy/first", reward=longest, method=METHOD)
    expected = timeless(chat.invoke("Hello"))
    configured = chat.configurable_fields(temperature=ConfigurableField("temperature"), seed=ConfigurableField("seed"))
    others = [
        copy.copy(chat),
        copy.deepcopy(chat),
        pickle.loads(pickle.dumps(chat)),
        chat.model_copy(update={"tags": ["x"]}),
        configured,
        configured.with_config(configurable={"seed": 0}),
    ]
    assert [timeless(other.invoke("Hello")) for other in others] == [expected] * len(others)
    assert timeless(configured.invoke("Hello", config={"configurable": {"seed": 1}}))[0] != expected[0]
    assert loads == ["toy/first"]


def test_callers_at_the_same_time_load_once(loads):
    chat = AISPChatModel(model="toy/first", reward=longest, method=METHOD)
    chat.batch(["a", "b", "c", "d"])
    assert loads == ["toy/first"]


def test_the_model_can_be_chosen_for_one_call_or_by_configuration(loads):
    chat = AISPChatModel(model="toy/first", reward=longest, method=METHOD)
    by_call = chat.invoke("Hello", model="toy/another")
    configured = chat.configurable_fields(model=ConfigurableField("model"))
    by_configuration = configured.invoke("Hello", config={"configurable": {"model": "toy/another"}})
    assert by_call.response_metadata["model_name"] == "toy/another"
    assert timeless(by_call) == timeless(by_configuration)
    assert chat.invoke("Hello").response_metadata["model_name"] == "toy/first"
    assert loads == ["toy/another", "toy/first"]


def test_a_configured_stream_streams(loads):
    chat = AISPChatModel(model="toy/first", reward=longest, method=METHOD)
    configured = chat.configurable_fields(seed=ConfigurableField("seed")).with_config(configurable={"seed": 4})
    assert len(list(configured.stream("Hello"))) == 4


def test_another_model_does_not_inherit_a_profile_that_was_looked_up():
    chat = AISPChatModel(model="toy/first", reward=longest)
    fields = {name: getattr(chat, name) for name in AISPChatModel.model_fields}
    assert AISPChatModel(**{**fields, "model": "toy/another"}).profile["name"] == "toy/another"
    given = AISPChatModel(model="toy/first", reward=longest, profile={"max_input_tokens": 5})
    fields = {name: getattr(given, name) for name in AISPChatModel.model_fields}
    assert AISPChatModel(**{**fields, "model": "toy/another"}).profile == {"max_input_tokens": 5}


def test_a_live_engine_is_shared_by_copies_and_refuses_to_be_pickled():
    chat = model()
    for other in (copy.copy(chat), copy.deepcopy(chat), copy.deepcopy([chat])[0]):
        assert other.engine is chat.engine
        assert other.reward is chat.reward
        assert timeless(other.invoke("Hello")) == timeless(chat.invoke("Hello"))
    with pytest.raises(TypeError, match="live engine .* cannot be pickled.*model="):
        pickle.dumps(chat)


# -- what LangChain asks of a chat model ------------------------------------------------------------------------------


def test_tokens_are_counted_by_the_engine():
    chat = model(engine=Engine(context_length=60))
    assert chat.get_token_ids("abc") == [97, 98, 99]
    assert chat.get_num_tokens("abc") == 3
    assert chat.get_num_tokens_from_messages([SystemMessage("Be kind."), HumanMessage("Hello")]) == 29
    assert chat.get_num_tokens_from_messages([]) == 0
    assert chat.get_num_tokens_from_messages([HumanMessage("x" * 95)]) == 102  # longer than the context
    assert model(custom_get_token_ids=lambda text: [1]).get_num_tokens("abc") == 1
    without = chat.get_num_tokens_from_messages([HumanMessage("Hello")])
    tool = {"name": "look_up", "description": "Look up an order.", "parameters": {"type": "object", "properties": {}}}
    assert chat.get_num_tokens_from_messages([HumanMessage("Hello")], tools=[tool]) > without + 20


def test_messages_can_be_trimmed_by_the_models_own_count():
    messages = [HumanMessage("x" * 30), AIMessage("y" * 30), HumanMessage("z" * 10)]
    chat = model(engine=Engine(context_length=60))
    assert trim_messages(messages, max_tokens=40, token_counter=chat, strategy="last") == messages[2:]
    assert trim_messages(messages, max_tokens=59, token_counter=chat, strategy="last") == messages[1:]


def test_a_part_of_a_conversation_that_the_template_refuses_is_counted_by_its_texts():
    class Strict(Engine):
        def tokenize(self, chat, **options):
            if chat[0]["role"] != "user":
                raise ValueError("the chat template refuses the conversation")
            return super().tokenize(chat, **options)

    assert model(engine=Strict()).get_num_tokens_from_messages([AIMessage("Hello")]) == 5


def test_tracing_parameters_follow_the_call():
    chat = model(stop=["x"], temperature=0.5)
    assert chat._get_ls_params() == {
        "ls_provider": "aisp",
        "ls_model_name": "toy",
        "ls_model_type": "chat",
        "ls_temperature": 0.5,
        "ls_max_tokens": 8,
        "ls_stop": ["x"],
    }
    changed = chat._get_ls_params(stop=["y"], model="other", temperature=0, max_tokens=3)
    assert (changed["ls_model_name"], changed["ls_temperature"], changed["ls_max_tokens"]) == ("other", 0, 3)
    assert changed["ls_stop"] == ["y"]


def test_the_profile_tells_what_the_model_can_do():
    profile = model().profile
    assert profile["max_input_tokens"] == 1000
    assert profile["tool_calling"]
    assert profile["structured_output"]
    assert not profile["image_inputs"]
    assert profile["text_outputs"]


def test_the_profile_of_a_folder_is_read_from_its_config(tmp_path):
    (tmp_path / "config.json").write_text('{"text_config": {"max_position_embeddings": 77}}')
    assert AISPChatModel(model=str(tmp_path), reward=longest).profile["max_input_tokens"] == 77


def test_the_model_is_not_serializable_by_langchain():
    assert not AISPChatModel.is_lc_serializable()
    assert model()._llm_type == "aisp"


def test_a_reward_is_wrapped_once():
    reward = as_reward(longest)
    assert model(reward=reward).reward is reward
    assert model().reward.name == "longest"


def test_the_public_names_are_these():
    assert sorted(langchain_aisp.__all__) == [
        "AISP",
        "AISPChatModel",
        "BestOfN",
        "Budget",
        "ClassifierReward",
        "Sampling",
        "__version__",
        "aalign",
        "aiterate",
        "align",
        "as_reward",
        "iterate",
    ]
    assert all(hasattr(langchain_aisp, name) for name in langchain_aisp.__all__)
    assert langchain_aisp.__version__[0].isdigit()
