"""Crossings of parents: what they say, that none comes twice, and that nothing is decoded for them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from statistics import mean

import pytest
import torch

from langchain_aisp.align import Budget, align
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.methods import AISP
from langchain_aisp.methods.branching import Population, branch_log_weights, path_nodes
from langchain_aisp.methods.crossing import Crossings, crossings
from langchain_aisp.rewards import as_reward
from langchain_aisp.types import Sampling, Wave
from tests import tiny
from tests.toy import CHAT, ToyEngine, outcome, play, spells, waves_of

KEY, SAMPLING = 5, Sampling(max_tokens=8)


def parents(*texts: list[int], complete: bool = True) -> Population:
    """Members that end with token 0; at every position the model finds the tokens 1 to 4 equally likely."""
    length = 8
    tokens = torch.full((len(texts), length), -1)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    alternatives = torch.tensor([1, 2, 3, 4]).expand(len(texts), length, 4)
    return Population(
        tokens=tokens,
        keys=torch.arange(len(texts) * length).view(len(texts), length),
        lengths=(tokens >= 0).sum(dim=1),
        nodes=path_nodes(tokens, KEY),
        rewards=torch.zeros(len(texts)),
        complete=torch.full((len(texts),), complete),
        alternatives=alternatives,
        logprobs=torch.full(alternatives.shape, 0.25).log(),
        checked=torch.ones(len(texts), dtype=torch.bool),
        scores=torch.zeros(len(texts), length, 0),
    )


def crossed(members: Population, count: int = 100, visited: torch.Tensor | None = None, wave: int = 1):
    weights = torch.full((len(members),), 1 / len(members))
    branches = branch_log_weights(members, weights, SAMPLING)
    known = torch.zeros(0, dtype=torch.int64) if visited is None else visited.sort().values
    return crossings(members, branches, weights, known, KEY, wave, count)


def said(texts: Population | Crossings | None) -> list[list[int]]:
    assert texts is not None
    return [row[:n] for row, n in zip(texts.tokens.tolist(), texts.lengths.tolist(), strict=True)]


def test_a_text_keeps_one_beginning_and_goes_on_with_an_end_after_the_same_token():
    """Both say 1 before a token in which they differ; after 3 and 4, and at 2, they share nothing."""
    found = crossed(parents([2, 1, 3, 0], [1, 4, 4, 0]))
    assert sorted(zip(said(found), found.begun.tolist(), strict=True)) == [([1, 3, 0], 1), ([2, 1, 4, 4, 0], 2)]


def test_what_the_model_thought_of_the_tokens_comes_along():
    members = parents([2, 1, 3, 0], [1, 4, 4, 0])
    members.logprobs[0, 2], members.logprobs[1, 1] = -3.0, -4.0
    found = crossed(members)
    assert found is not None
    row = said(found).index([2, 1, 4, 4, 0])
    texts = found.take(torch.arange(len(found)))
    assert texts.keys[row, :2].tolist() == [0, 1]
    assert not set(texts.keys[row, 2:].tolist()) & set(members.keys.flatten().tolist())  # chosen and not drawn
    assert texts.logprobs[row, 2].tolist() == [-4.0] * 4
    assert texts.logprobs[row, 1].tolist() == members.logprobs[0, 1].tolist()
    assert torch.equal(texts.nodes, path_nodes(texts.tokens, KEY))
    assert texts.tokens[row, 5:].tolist() == [-1] * 3


def test_what_was_said_is_not_said_again_and_nothing_twice():
    members = parents([2, 1, 3, 0], [1, 4, 4, 0], [2, 1, 3, 3, 0], [1, 4, 3, 0])
    found = crossed(members)
    assert found is not None
    texts = list(map(tuple, said(found)))
    assert len(set(texts)) == len(texts) > 4
    nodes = found.nodes.gather(1, found.lengths[:, None] - 1).squeeze(1)
    assert torch.equal(found.ends, nodes)
    assert list(map(tuple, said(crossed(members, visited=nodes[1:])))) == texts[:1]
    assert crossed(members, visited=nodes) is None


@pytest.mark.parametrize("members", [parents([2, 1, 3, 0]), parents([1, 2, 0], [3, 4, 0])])
def test_where_parents_never_meet_there_is_none(members):
    assert crossed(members) is None


def test_an_end_comes_from_a_complete_parent_and_fits():
    assert crossed(parents([2, 1, 3, 0], [1, 4, 4, 0], complete=False)) is None
    long = parents([2, 2, 2, 2, 2, 2, 1, 0], [1, 4, 4, 4, 4, 4, 4, 0])
    assert crossed(long) is None  # 1 after six tokens, and seven more
    short = parents([2, 2, 2, 2, 2, 2, 1, 0], [1, 4, 0])
    assert [2, 2, 2, 2, 1, 4, 4, 0] in said(crossed(parents([2, 2, 2, 2, 1, 3, 3, 0], [1, 4, 4, 0])))
    assert crossed(short) is None  # one token too many


def test_a_token_that_the_model_does_not_find_likely_is_no_crossing():
    members = parents([2, 1, 3, 0], [1, 4, 4, 0])
    members.logprobs[0, 2, 3] = -torch.inf  # the 4 after 2, 1
    assert said(crossed(members)) == [[1, 3, 0]]


def test_likelier_crossings_of_better_parents_come_first():
    members = parents([2, 1, 3, 0], [1, 4, 4, 0], [1, 2, 2, 0])
    branches = branch_log_weights(members, torch.tensor([0.9, 0.08, 0.02]), SAMPLING)
    weights = torch.tensor([0.1, 0.89, 0.01])
    nothing = torch.zeros(0, dtype=torch.int64)
    first = [said(crossings(members, branches, weights, nothing, KEY, wave, 1))[0] for wave in range(200)]
    assert first.count([2, 1, 4, 4, 0]) > 150


# In a search


def test_crossings_are_samples_for_which_nothing_is_decoded():
    waves = waves_of(AISP(96, 6, overlap=1, crossings=1.0))
    assert sum(len(wave) for wave, _ in waves) == 96
    whole = [(wave, rollouts) for wave, rollouts in waves[1:] if rollouts.sampled_tokens == 0]
    assert len(whole) > 2
    texts = [tuple(row[:n].tolist()) for _, r in waves for row, n in zip(r.tokens, r.lengths, strict=True)]
    known: set[tuple[int, ...]] = set()
    for _, rollouts in waves:
        rows = [tuple(row[:n].tolist()) for row, n in zip(rollouts.tokens, rollouts.lengths, strict=True)]
        if rollouts.sampled_tokens == 0:
            assert len(set(rows)) == len(rows)
            assert not known & set(rows)
        known |= set(rows)
    assert len(set(texts)) > 48


def test_there_are_so_many_for_each_response_that_was_decoded():
    for ratio in (0.5, 1.0):
        waves = waves_of(AISP(96, 6, overlap=1, crossings=ratio))
        sizes = [(len(wave), rollouts.sampled_tokens > 0) for wave, rollouts in waves]
        for (before, decoded), (now, new) in pairwise(sizes):
            assert decoded or new
            if not new:
                assert now <= round(ratio * before)


@pytest.mark.parametrize("settings", [{"partial": True}, {"method": AISP(64, 4, crossings=0)}])
def test_where_beginnings_can_be_asked_about_or_none_is_wanted_there_is_none(settings):
    method = settings.pop("method", AISP(64, 4, crossings=1.0, guidance=0))
    played = play(method, ToyEngine(), spells("badge"), Sampling(max_tokens=10), **settings)
    decoded = [answer.sampled_tokens for request, answer in played if isinstance(request, Wave)]
    assert min(decoded) > 0


def test_a_search_with_crossings_decodes_less_for_as_good_answers():
    """Over 48 seeds, the same for both; a word whose parts different samples have."""
    found = {
        ratio: [
            outcome(
                play(AISP(128, crossings=ratio), ToyEngine(scale=0.3), spells("badgebadge"), Sampling(10), seed=seed)
            )
            for seed in range(48)
        ]
        for ratio in (0.0, 1.0)
    }
    tokens = {ratio: mean(each.sampled_tokens for each in runs) for ratio, runs in found.items()}
    rewards = {ratio: mean(each.best.reward for each in runs) for ratio, runs in found.items()}
    assert tokens[1.0] < 0.8 * tokens[0.0]
    assert rewards[1.0] > rewards[0.0] - 0.3


class Forgetful(TransformersEngine):
    """Reads again what goes on."""

    def submit(self, wave: Wave, **options):
        return super().submit(replace(wave, held=None), **options)


@pytest.mark.parametrize("overlap", [1, 2])
def test_rows_in_flight_go_on_beside_them_as_if_nothing_were_held(overlap):
    engine = TransformersEngine(tiny.model(), tiny.tokenizer())
    reward = as_reward(lambda chat, texts: [float(sum(map(ord, text)) % 97) for text in texts])
    sampling = Sampling(max_tokens=24, temperature=1.5, stop=tuple("aeiou0123"))
    method = AISP(96, 6, overlap=overlap, crossings=1.0)
    found = align(engine, reward, method, CHAT, sampling=sampling)
    assert found.samples == 96
    whole = [each for each in found.candidates if each.cut == len(each.tokens)]
    assert len(whole) > 5
    read_again = align(Forgetful(tiny.model(), tiny.tokenizer()), reward, method, CHAT, sampling=sampling)
    assert [each.tokens for each in read_again.candidates] == [each.tokens for each in found.candidates]


@pytest.mark.parametrize("samples", range(17, 96, 6))
def test_a_budget_ends_the_search_exactly_there_wherever_rows_are_in_flight(samples):
    """The crossings leave room for the rows that wait beside them."""
    method, budget = AISP(96, 6, crossings=1.0), Budget(samples=samples)
    found = outcome(play(method, ToyEngine(), spells("badge"), Sampling(10), budget=budget))
    assert (found.samples, found.stopped) == (samples, "samples")
    order = sorted(found.candidates, key=lambda each: (each.iteration, each.row))
    assert all(each.cut <= len(each.tokens) and each.known <= place for place, each in enumerate(order))
