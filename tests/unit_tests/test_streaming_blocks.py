"""The chat model sends an answer block by block, and the search asks a partial reward what beginnings earn."""

from __future__ import annotations

import pytest

from langchain_aisp import AISP, AISPChatModel
from langchain_aisp.align import Check, Score, align, search
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.methods import BestOfN
from langchain_aisp.rewards import as_reward
from langchain_aisp.types import Sampling
from tests.toy import CHAT, NO_LIMIT, ToyEngine, problem

LONG = Sampling(max_tokens=8, min_tokens=8)


def kind(chat, texts):
    return [float(text.count("e")) - 0.01 * len(text) for text in texts]


PARTIAL, WHOLE = as_reward(kind, partial=True), as_reward(kind)


def model(**settings) -> AISPChatModel:
    given = {"reward": PARTIAL, "method": AISP(8, 2, guidance=0), "max_tokens": 16, "commit_every": 4}
    return AISPChatModel(model="demo", **{**given, **settings})


def wishes(partial: bool) -> list[object]:
    """Everything that a search in the toy world asks for."""
    engine = ToyEngine()
    steps = search(AISP(samples=16, iterations=2, guidance=0), problem(engine, LONG), NO_LIMIT, partial=partial)
    found: list[object] = []
    answer = None
    for _ in range(100):
        try:
            wish = steps.send(answer)
        except StopIteration:
            return found
        found.append(wish)
        if isinstance(wish, Score):
            [reward] = [PARTIAL.submit(wish.pairs).future.result(10)]
            answer = reward
        else:
            wave = wish.wave if isinstance(wish, Check) else wish
            answer = engine.decode(wave) if hasattr(wave, "cut") else None
    raise AssertionError("the search does not end")


def test_a_search_asks_for_beginnings_of_a_partial_reward_only():
    assert [type(wish).__name__ for wish in wishes(False)] == ["Wave", "Score", "Iteration"] * 2
    asked = [type(wish).__name__ for wish in wishes(True)]
    assert asked == ["Wave", "Score", "Iteration", *["Check", "Score"] * 2, "Wave", "Score", "Iteration"]


def test_beginnings_cost_reward_calls_but_no_samples_and_no_tokens():
    method = AISP(samples=16, iterations=2)
    plain, credited = (align(ToyEngine(), reward, method, CHAT, sampling=LONG) for reward in (WHOLE, PARTIAL))
    assert credited.samples == plain.samples == 16
    assert credited.trace[0].numbers.keys() == plain.trace[0].numbers.keys()
    assert credited.reward_calls > plain.reward_calls
    assert len(credited.candidates) == 16
    assert plain.trace[0].sampled_tokens == credited.trace[0].sampled_tokens


def test_other_methods_take_no_notice_of_a_partial_reward():
    plain, partial = (align(ToyEngine(), each, BestOfN(samples=8), CHAT, sampling=LONG) for each in (WHOLE, PARTIAL))
    assert plain.candidates == partial.candidates


def test_the_demo_spells_beginnings_without_decoding_them():
    engine = TransformersEngine.shared("demo")
    chat = [{"role": "user", "content": "My parcel is late."}]
    found = align(engine, PARTIAL, AISP(samples=8, iterations=2), chat, sampling=Sampling(max_tokens=16))
    assert found.reward_calls > found.samples
    assert found.trace[0].sampled_tokens <= 4 * 16


def test_each_committed_block_is_a_chunk_and_invoke_gives_the_same_answer():
    chat = model()
    chunks = list(chat.stream("My parcel is late."))
    texts = [chunk.text for chunk in chunks if chunk.text]
    assert len(texts) > 1
    message = chat.invoke("My parcel is late.")
    assert message.text == "".join(texts)
    whole = sum(chunks[1:], chunks[0])
    assert whole.response_metadata["reward"] == message.response_metadata["reward"]
    assert len(message.response_metadata["trace"]) == 2 * len(texts)
    assert message.usage_metadata is not None
    assert message.usage_metadata["output_tokens"] <= 16


async def test_astream_sends_the_same_blocks():
    texts = [chunk.text for chunk in model().stream("My parcel is late.") if chunk.text]
    assert [chunk.text async for chunk in model().astream("My parcel is late.") if chunk.text] == texts


@pytest.mark.parametrize(
    ("settings", "options", "named"),
    [
        ({"reward": WHOLE}, {}, "partial=True"),
        ({"reward": None}, {}, "partial=True"),
        ({"n": 2}, {}, "n=2"),
        ({}, {"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_cannot_be_sent_block_by_block_is_refused(settings, options, named):
    with pytest.raises(ValueError, match=named):
        model(**settings).invoke("My parcel is late.", **options)


def test_blocks_can_be_asked_for_in_a_single_call():
    whole = model(commit_every=None)
    texts = [chunk.text for chunk in whole.stream("My parcel is late.", commit_every=4) if chunk.text]
    assert len(texts) > 1
