"""Log-probabilities of the answer's tokens, against the model's own forward pass over prompt and answer."""

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from pydantic import ValidationError
from transformers import AutoTokenizer

from langchain_aisp import AISP, AISPChatModel, BestOfN, as_reward
from langchain_aisp.align import Candidate
from langchain_aisp.demo import LANGUAGE_MODEL_PATH
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.engine.cache import ExpandedCache, NoCache
from langchain_aisp.logprobs import Logprobs
from langchain_aisp.types import Response, Sampling, Wave
from tests import matching, tiny
from tests.toy import ToyEngine

MARKED = "{% for m in messages %}{{ m.content }}<tool_call>{arguments}</tool_call>{% endfor %}{{ tools }}"


class Watched(TransformersEngine):
    """Remembers what it is asked for."""

    def submit(self, wave, *, deadline=None):
        self.waves.append(wave)
        return super().submit(wave, deadline=deadline)

    def __init__(self, *arguments, **options):
        self.waves = []
        super().__init__(*arguments, **options)


@pytest.fixture(scope="module")
def engine():
    with Watched(tiny.model(), tiny.tokenizer()) as engine:
        yield engine


@pytest.fixture(scope="module")
def caller():
    model = tiny.model(context=1024, initializer_range=0.1, eos_token_id=0)
    with Watched(model, matching.tokenizer(), chat_template=MARKED) as engine:
        yield engine


@tool
def refund(euros: Literal[17, 23]) -> str:
    """Pay money back."""
    return f"{euros} euros are on their way"


def longest(chat, responses):
    return [float(len(text)) for text in responses]


def model(engine, **options):
    fixed = {"engine": engine, "reward": longest, "method": AISP(samples=8, iterations=2), "logprobs": True}
    return AISPChatModel(**{**fixed, "max_tokens": 12, **options})


def entries(message):
    return message.response_metadata["logprobs"]["content"]


def written(message):
    return b"".join(bytes(entry["bytes"]) for entry in entries(message)).decode("utf-8", errors="replace")


@torch.inference_mode()
def by_the_model(engine, prompt, tokens):
    """Log-probabilities [T, V] before each token by one plain forward pass."""
    ids = torch.tensor([[*prompt.ids, *tokens]])
    logits = engine.model(ids).logits[0, len(prompt.ids) - 1 : -1]
    return (logits + engine._vocabulary.forbidden).log_softmax(dim=-1)


def assert_told_rightly(engine, message, tools=()):
    """The wave that said the answer again holds its tokens; the last row holds all of them."""
    wave = engine.waves[-1]
    assert wave.forced
    tokens = wave.prefix[-1][wave.prefix[-1] >= 0].tolist()
    expected = by_the_model(engine, wave.prompt, tokens)
    told = entries(message)
    assert len(told) == len(tokens) > 0
    for entry, token, row in zip(told, tokens, expected, strict=True):
        assert entry["logprob"] == pytest.approx(float(row[token]), abs=1e-3)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.3, "top_k": 4}, {"method": AISP(8, 2, control_kl=0.5)}])
def test_they_are_those_of_the_model_without_temperature_and_perturbation(engine, options):
    message = model(engine, **options).invoke("Hello")
    assert_told_rightly(engine, message)
    assert written(message) == message.content


def test_they_are_those_of_the_model_without_a_grammar(caller):
    calling = as_reward(lambda chat, responses: [float(len(each.tool_calls)) for each in responses], sees="response")
    bound = model(caller, reward=calling, max_tokens=120).bind_tools([refund], tool_choice="any")
    message = bound.invoke("Hello")
    assert message.tool_calls
    assert_told_rightly(caller, message)
    assert written(message).count("<tool_call>\n{") == len(message.tool_calls)
    assert f'"euros": {message.tool_calls[0]["args"]["euros"]}' in written(message)
    assert min(entry["logprob"] for entry in entries(message)) < -1  # the grammar had forced it to say this


def test_an_answer_that_was_not_cut_off_is_told_without_its_end_token(engine):
    short = as_reward(lambda chat, texts: [-float(len(text)) for text in texts])
    message = model(engine, reward=short, max_tokens=200, method=BestOfN(16)).invoke("Hello")
    assert message.response_metadata["finish_reason"] == "stop"
    assert len(entries(message)) == message.usage_metadata["output_tokens"] - 1
    assert written(message) == message.content
    assert_told_rightly(engine, message)


def test_what_a_stop_string_trims_is_not_told(engine):
    likeliest = model(engine, temperature=0.0, method=BestOfN(1), max_tokens=24)
    whole = likeliest.invoke("Hello").content
    stop = next(letter for letter in whole[2:] if letter.isascii() and letter not in whole[:2])
    trimmed = likeliest.invoke("Hello", stop=["never", stop])
    assert trimmed.response_metadata["finish_reason"] == "stop"
    assert written(trimmed) == trimmed.content == whole[: whole.index(stop)]


def test_a_token_that_runs_into_the_stop_string_is_told_whole():
    tokenizer = AutoTokenizer.from_pretrained(LANGUAGE_MODEL_PATH)
    logprobs = Logprobs.of(SimpleNamespace(tokenizer=tokenizer), 0)
    tokens = tuple(tokenizer.encode("I am glad to help you. Thank you", add_special_tokens=False))
    answer = Candidate(Response("I am glad to hel"), 0.0, 0, 0, tokens)
    said = logprobs._said(answer, ["lp", "you"])
    text = logprobs.spelling.decode_bytes(list(said)).decode()
    assert text.startswith("I am glad to he")
    assert len(said) < len(tokens)
    *others, last = [logprobs.spelling.decode_bytes([token]).decode() for token in said]
    assert "lp" not in "".join(others)
    assert len("".join(others)) <= len("I am glad to he") < len("".join(others)) + len(last)


async def test_every_way_of_calling_tells_the_same(engine):
    chat = model(engine, top_logprobs=2)
    expected = entries(chat.invoke("Hello"))
    chunks = list(chat.stream("Hello"))
    assert ["logprobs" in chunk.response_metadata for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    merged = chunks[0]
    for chunk in chunks[1:]:
        merged += chunk
    achunks = [chunk async for chunk in chat.astream("Hello")]
    [batched, _] = chat.batch(["Hello", "Hi"])
    for message in (merged, achunks[-1], batched, await chat.ainvoke("Hello"), chat.invoke("Hello")):
        assert [entry["token"] for entry in entries(message)] == [entry["token"] for entry in expected]
        for entry, other in zip(entries(message), expected, strict=True):
            assert entry["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
            assert len(entry["top_logprobs"]) == 2
    json.dumps(merged.response_metadata)


def test_each_of_several_generations_has_its_own(engine):
    [generations] = model(engine, n=3, method=BestOfN(6)).generate([[HumanMessage("Hello")]]).generations
    assert len(generations) == 3
    for generation in generations:
        assert written(generation.message) == generation.message.content


def test_the_likeliest_tokens_come_with_each_and_nobody_pays_for_them_in_the_search(engine):
    engine.waves.clear()
    message = model(engine, top_logprobs=5, method=BestOfN(4)).invoke("Hello")
    assert [(wave.forced, set(wave.observe)) for wave in engine.waves] == [
        (False, set()),
        (True, {"base_logprobs", "alternatives"}),
    ]
    wave = engine.waves[-1]
    tokens = wave.prefix[-1][wave.prefix[-1] >= 0].tolist()
    for entry, row in zip(entries(message), by_the_model(engine, wave.prompt, tokens), strict=True):
        best = row.topk(5)
        told = [other["logprob"] for other in entry["top_logprobs"]]
        assert told == pytest.approx(best.values.tolist(), abs=1e-3)
        assert all(set(other) == {"token", "bytes", "logprob"} for other in entry["top_logprobs"])


@pytest.mark.parametrize("cache", [ExpandedCache, NoCache])
def test_caches_of_one_length_observe_the_same(engine, cache):
    prompt = engine.encode([{"role": "user", "content": "Hello"}])
    wave = Wave.saying(prompt, [range(70, 80), (75,)], Sampling(min_tokens=0), ["base_logprobs"])
    expected = engine.submit(wave).future.result()
    assert expected.sampled_tokens == 11
    with TransformersEngine(tiny.model(), tiny.tokenizer()) as other:
        other.cache = cache(other.model)
        found = other.submit(wave).future.result()
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.allclose(found.observed["base_logprobs"], expected.observed["base_logprobs"], atol=1e-3)


def test_without_being_asked_nothing_is_told_and_no_wave_is_said_again(engine):
    engine.waves.clear()
    chat = model(engine, logprobs=None)
    assert "logprobs" not in chat.invoke("Hello").response_metadata
    assert not any(wave.forced for wave in engine.waves)
    assert entries(chat.invoke("Hello", logprobs=True))
    assert "logprobs" not in model(engine).invoke("Hello", logprobs=False).response_metadata


def test_answers_with_and_without_them_do_not_share_a_key_of_the_cache(engine):
    keys = [{"logprobs": None}, {}, {"top_logprobs": 1}, {"top_logprobs": 2}]
    assert len({model(engine, **options)._get_llm_string() for options in keys}) == len(keys)
    assert model(engine, logprobs=None)._get_llm_string(logprobs=True) == model(engine)._get_llm_string()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"logprobs": None, "top_logprobs": 2}, "needs logprobs=True"),
        ({"top_logprobs": 21}, "from 0 to 20, got 21"),
        ({"top_logprobs": -1}, "from 0 to 20, got -1"),
    ],
)
def test_what_cannot_be_told_is_refused_at_once(engine, options, told):
    with pytest.raises(ValidationError, match=told):
        model(engine, **options)


@dataclass
class Drawing(ToyEngine):
    """An engine that does not know of tokens it is given."""

    tokenizer: object = None

    def tokenize(self, chat, *, tools=(), continue_last=False):
        return list(self.encode(chat).ids)

    def submit(self, wave, **options):
        return super().submit(replace(wave, forced=False), **options)


def test_an_engine_that_cannot_tell_says_so():
    with pytest.raises(ValueError, match="Drawing has none; leave out logprobs"):
        model(Drawing()).invoke("Hello")
    with pytest.raises(ValueError, match="leave out logprobs"):
        model(Drawing(tokenizer=tiny.tokenizer())).invoke("Hello")
