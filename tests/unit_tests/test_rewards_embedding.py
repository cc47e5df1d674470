"""Cosine similarity to references: values, what is embedded when, both ways of asking, bad embeddings."""

import asyncio
import math
import pickle

import pytest
import torch
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings

from langchain_aisp.rewards import EmbeddingReward, RewardError, last_user_text
from langchain_aisp.types import Response

CHAT = [{"role": "user", "content": "east"}, {"role": "assistant", "content": "?"}]
VECTORS = {"east": [1.0, 0.0], "far east": [7.0, 0.0], "north": [0.0, 2.0], "west": [-3.0, 0.0], "nowhere": [0.0, 0.0]}


class Compass(Embeddings):
    """Knows where some words point, and remembers what it was asked."""

    fingerprint = "compass"

    def __init__(self):
        self.asked = []

    def embed_documents(self, texts):
        self.asked.append(list(texts))
        return [VECTORS[text] for text in texts]

    def embed_query(self, text):
        raise AssertionError("references and candidates are embedded alike")


class AwaitedCompass(Compass):
    async def aembed_documents(self, texts):
        self.loop = asyncio.get_running_loop()
        await asyncio.sleep(0)
        return Compass.embed_documents(self, texts)

    def embed_documents(self, texts):
        raise AssertionError("asked in a thread")


class Broken(Compass):
    def __init__(self, answer):
        self.answer = answer

    def embed_documents(self, texts):
        return self.answer


def scores(reward, *texts, chat=CHAT):
    return reward.submit([(chat, Response(text)) for text in texts]).future.result(timeout=20).tolist()


def test_a_score_is_the_cosine_whatever_the_lengths():
    assert scores(EmbeddingReward(Compass(), "east"), "far east", "north", "west") == pytest.approx([1.0, 0.0, -1.0])


def test_of_several_references_the_closest_counts_or_their_mean():
    assert scores(EmbeddingReward(Compass(), ["west", "north"]), "north", "east") == pytest.approx([1.0, 0.0])
    mean = EmbeddingReward(Compass(), ["west", "north"], combine="mean")
    assert scores(mean, "north", "east") == pytest.approx([0.5, -0.5])


def test_a_function_finds_the_reference_in_the_conversation():
    reward = EmbeddingReward(Compass(), last_user_text)
    assert scores(reward, "far east") == pytest.approx([1.0])
    assert scores(reward, "far east", chat=[{"role": "user", "content": "north"}]) == pytest.approx([0.0])


def test_the_last_message_of_the_user_may_have_blocks():
    blocks = [{"type": "text", "text": "far "}, {"type": "image", "url": "x"}, {"type": "text", "text": "east"}]
    assert last_user_text([{"role": "user", "content": blocks}]) == "far east"
    with pytest.raises(ValueError, match="no message with the role 'user'"):
        last_user_text([{"role": "system", "content": "Hi"}])


def test_a_reference_is_embedded_once():
    compass = Compass()
    reward = EmbeddingReward(compass, ["east", "east", "north"])
    scores(reward, "west")
    scores(reward, "west", "far east")
    assert compass.asked == [["east", "north", "west"], ["west", "far east"]]


def test_only_so_many_references_are_remembered(monkeypatch):
    monkeypatch.setattr("langchain_aisp.rewards.embedding._REMEMBERED", 1)
    compass = Compass()
    reward = EmbeddingReward(compass, ["east", "north"])
    assert scores(reward, "west") == scores(reward, "west")
    assert compass.asked == [["east", "north", "west"], ["east", "west"]]


def test_a_blank_candidate_scores_lowest_and_is_not_embedded():
    compass = Compass()
    assert scores(EmbeddingReward(compass, "east"), "", "north", " \n") == [-1.0, 0.0, -1.0]
    assert compass.asked == [["east", "north"]]
    assert scores(EmbeddingReward(compass, "east"), "") == [-1.0]
    assert len(compass.asked) == 1


def test_a_vector_of_zeros_is_like_nothing():
    assert scores(EmbeddingReward(Compass(), "east"), "nowhere") == [0.0]


def test_it_agrees_with_torch_on_the_embeddings_of_langchain():
    embeddings = DeterministicFakeEmbedding(size=16)
    vectors = torch.tensor(embeddings.embed_documents(["a", "b"]), dtype=torch.float64)
    expected = torch.cosine_similarity(vectors[0], vectors[1], dim=0).item()
    [score] = scores(EmbeddingReward(embeddings, "a"), "b")
    assert math.isclose(score, expected, rel_tol=1e-6)


async def test_a_callers_loop_runs_the_async_side():
    compass = AwaitedCompass()
    ticket = EmbeddingReward(compass, "east").submit([(CHAT, Response("west"))], loop=asyncio.get_running_loop())
    assert (await asyncio.wrap_future(ticket.future)).tolist() == [-1.0]
    assert compass.loop is asyncio.get_running_loop()


async def test_embeddings_without_an_async_side_are_asked_in_a_thread():
    class Plain:
        def embed_documents(self, texts):
            with pytest.raises(RuntimeError):
                asyncio.get_running_loop()
            return [VECTORS[text] for text in texts]

    ticket = EmbeddingReward(Plain(), "east").submit([(CHAT, Response("west"))], loop=asyncio.get_running_loop())
    assert (await asyncio.wrap_future(ticket.future)).tolist() == [-1.0]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ([[1.0, 0.0]], "got 1 embeddings for 2 texts"),
        ([[1.0, 0.0], [1.0]], "references of width 2, candidates of width 1"),
        ([[1.0, 0.0], [float("nan"), 0.0]], "answered nan"),
        ([["a"], ["b"]], "raised ValueError"),
        (None, "raised TypeError"),
    ],
)
def test_embeddings_that_are_wrong_are_errors(answer, told):
    with pytest.raises(RewardError, match=told):
        scores(EmbeddingReward(Broken(answer), "east", name="close"), "north")


def test_a_function_that_finds_nothing_is_an_error():
    with pytest.raises(RewardError, match=r"got the reference \[\] from its function"):
        scores(EmbeddingReward(Compass(), lambda chat: []), "north")


@pytest.mark.parametrize("reference", ["", " ", [], ["east", ""]])
def test_a_reference_must_say_something(reference):
    with pytest.raises(ValueError, match="reference must be text"):
        EmbeddingReward(Compass(), reference)


def test_what_has_no_embed_documents_is_refused():
    with pytest.raises(TypeError, match="got str"):
        EmbeddingReward("text-embedding-3", "east")
    with pytest.raises(TypeError, match="embed_documents"):
        EmbeddingReward(Compass, "east")
    with pytest.raises(ValueError, match="'closest' or 'mean'"):
        EmbeddingReward(Compass(), "east", combine="best")


def test_the_fingerprint_covers_embeddings_and_settings():
    one = EmbeddingReward(Compass(), "east").fingerprint
    assert one == EmbeddingReward(Compass(), ["east"], timeout=3).fingerprint
    others = [
        EmbeddingReward(Compass(), "north"),
        EmbeddingReward(Compass(), "east", combine="mean"),
        EmbeddingReward(Compass(), lambda chat: "east"),
        EmbeddingReward(DeterministicFakeEmbedding(size=2), "east"),
        EmbeddingReward(DeterministicFakeEmbedding(size=2), "east"),
    ]
    assert len({one, *(reward.fingerprint for reward in others)}) == 6
    assert EmbeddingReward(Compass(), "east", fingerprint="mine").fingerprint == "mine"


def test_a_pickled_reward_scores_the_same():
    reward = EmbeddingReward(DeterministicFakeEmbedding(size=4), "east", combine="mean", name="n")
    scores(reward, "b")
    copied = pickle.loads(pickle.dumps(reward))
    assert (copied.name, copied.combine) == ("n", "mean")
    assert scores(copied, "b", "c") == scores(reward, "b", "c")
