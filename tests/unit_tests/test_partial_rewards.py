"""Rewards of unfinished texts, what they say of each position, and that cuts fall where a response loses."""

from __future__ import annotations

import asyncio
import copy
import pickle
import re
from dataclasses import replace
from statistics import mean

import pytest
import torch

from langchain_aisp.methods import AISP
from langchain_aisp.methods.aisp import draw_branches
from langchain_aisp.methods.branching import Population, branch_log_weights, path_nodes
from langchain_aisp.methods.credit import beginnings, checkpoints, cut_log_weights, rewards_to_go
from langchain_aisp.methods.lookahead import Branches, best_looking, gains, looks
from langchain_aisp.noise import fold
from langchain_aisp.rewards import RewardError, WeightedSum, as_reward
from langchain_aisp.rewards.partial import is_partial
from langchain_aisp.types import Response, Sampling
from tests.toy import CHAT, ToyEngine, problem, spells

GOOD, BAD = 1, 2


def by_length(chat, texts):
    return [float(len(text)) for text in texts]


def cut_off(text: str) -> Response:
    return Response(text, "length")


def scores(reward, *responses: Response) -> list[float]:
    return reward.submit([(CHAT, response) for response in responses]).future.result(10).tolist()


def words(chat, texts):
    """A word is worth its length; the spaces between are worth nothing."""
    return [[(found.start(), found.end(), len(found[0])) for found in re.finditer(r"\S+", text)] for text in texts]


# Rewards


def test_only_a_promise_makes_a_reward_partial():
    assert not is_partial(as_reward(by_length))
    assert is_partial(as_reward(by_length, partial=True))
    assert is_partial(as_reward(words, spans=True))


def test_a_reward_can_be_promised_to_be_partial_and_scores_as_before():
    whole = as_reward(by_length)
    promised = as_reward(whole, partial=True)
    assert is_partial(promised)
    assert promised.name == whole.name
    assert scores(promised, Response("four"), cut_off("fo")) == [4.0, 2.0]
    assert as_reward(promised, partial=True) is promised
    assert as_reward(promised) is promised


def test_a_reward_that_is_asked_for_beginnings_has_another_fingerprint():
    whole = as_reward(by_length, fingerprint="length")
    prints = [whole, as_reward(by_length, fingerprint="length", partial=True), as_reward(whole, partial=True)]
    prints.append(as_reward(by_length, fingerprint="length", spans=True))
    assert len({reward.fingerprint for reward in prints}) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda reward: pickle.loads(pickle.dumps(reward))])
def test_a_copy_keeps_the_promise(copied):
    reward = copied(as_reward(words, spans=True))
    assert is_partial(reward)
    assert scores(reward, Response("one three")) == [8.0]


def test_a_sum_is_partial_if_all_its_parts_are():
    partial, whole = as_reward(by_length, partial=True), as_reward(by_length)
    assert is_partial(WeightedSum([(partial, 1.0), (as_reward(words, spans=True), 2.0)]))
    assert not is_partial(WeightedSum([(partial, 1.0), (whole, 1.0)]))


def test_spans_are_refused_of_a_reward_that_gives_one_number_already():
    with pytest.raises(ValueError, match="is a reward already"):
        as_reward(as_reward(by_length), spans=True)


def test_the_score_of_spans_is_their_sum():
    assert scores(as_reward(words, spans=True), Response("one three"), Response(""), Response("a")) == [8.0, 0.0, 1.0]


def test_spans_of_an_async_function_are_awaited():
    async def later(chat, texts):
        await asyncio.sleep(0)
        return words(chat, texts)

    assert scores(as_reward(later, spans=True), Response("one three"), cut_off("one")) == [8.0, 3.0]


def test_spans_may_be_told_of_whole_responses():
    reward = as_reward(
        lambda chat, responses: words(chat, [each.text for each in responses]), spans=True, sees="response"
    )
    assert scores(reward, Response("one three")) == [8.0]


def test_beginnings_of_a_text_are_told_by_the_pieces_of_that_text():
    asked: list[str] = []

    def watching(chat, texts):
        asked.extend(texts)
        return words(chat, texts)

    given = ["one", "one thr", "one three", "on", "two"]
    assert scores(as_reward(watching, spans=True), *map(cut_off, given)) == [3.0, 3.0, 8.0, 0.0, 3.0]
    assert sorted(asked) == ["one three", "two"]


def test_a_whole_text_is_told_by_its_own_pieces_whatever_else_begins_like_it():
    reward = as_reward(lambda chat, texts: [[(0, len(text), 1.0)] for text in texts], spans=True)
    assert scores(reward, Response("yes"), Response("yes please")) == [1.0, 1.0]
    assert scores(reward, cut_off("yes"), Response("yes please")) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ([[(0, 9, 1.0)]], r"the span \(0, 9\) of 3 characters"),
        ([[(2, 1, 1.0)]], r"the span \(2, 1\)"),
        ([[(0, 1)]], r"answered \(0, 1\) for a span"),
        ([[1.0]], "answered 1.0 for a span"),
        ([[(0, 1, float("nan"))]], "answered nan"),
        ([1.0], "answered float"),
        ([], "answered 0 lists of spans for 1 responses"),
        (None, "answered NoneType"),
    ],
)
def test_what_is_no_span_of_the_text_is_refused_by_name(answer, problem):
    with pytest.raises(RewardError, match=f"'pieces' .*{problem}"):
        scores(as_reward(lambda chat, texts: answer, spans=True, name="pieces"), Response("one"))


# Credit


def population(tokens: list[list[int]], rewards: list[float]) -> Population:
    """Members whose alternatives are the tokens 1, 2 and 3, equally likely at every position; -1 ends them."""
    ids = torch.tensor(tokens)
    alternatives = torch.tensor([1, 2, 3]).expand(*ids.shape, 3)
    return Population(
        tokens=ids,
        keys=torch.zeros_like(ids),
        lengths=(ids >= 0).sum(dim=1),
        nodes=path_nodes(ids, 5),
        rewards=torch.tensor(rewards),
        complete=torch.ones(len(ids), dtype=torch.bool),
        alternatives=alternatives,
        logprobs=torch.full(alternatives.shape, 1 / 3).log(),
        checked=torch.ones(len(ids), dtype=torch.bool),
        scores=torch.zeros(*ids.shape, 0),
    )


def planted(*losses: list[int], length: int = 12) -> tuple[Population, torch.Tensor]:
    """Members of good tokens but for some bad ones, and what their beginnings earn: a point per good token."""
    tokens = [[BAD if position in bad else GOOD for position in range(length)] for bad in losses]
    members = population(tokens, [float(length - len(bad)) for bad in losses])
    member, kept = checkpoints(members.lengths)
    good = (members.tokens == GOOD).cumsum(dim=1).float()
    return members, good[member, kept - 1]


def test_checkpoints_are_few_and_lie_where_those_of_longer_answers_lie():
    member, kept = checkpoints(torch.tensor([5, 3]))
    assert list(zip(member.tolist(), kept.tolist(), strict=True)) == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2)]
    for length in range(1, 300):
        _, ends = checkpoints(torch.tensor([length]))
        _, later = checkpoints(torch.tensor([2 * length]))
        assert len(ends) < 9
        assert set(later.tolist()) & set(range(length)) <= set(ends.tolist())


def test_beginnings_are_spelled_without_decoding_anything():
    members = population([[1, 2, 3, 0], [2, 2, -1, -1]], [1.0, 2.0])
    rollouts = ToyEngine().decode(beginnings(members, problem(ToyEngine(), Sampling(max_tokens=4))))
    assert [response.text for response in rollouts.responses] == ["a", "ab", "abc", "b"]
    assert rollouts.sampled_tokens == 0


def test_rewards_to_go_are_what_the_beginning_has_not_earned():
    members = population([[1, 1, 1, 1], [1, 2, -1, -1]], [5.0, 3.0])
    found = rewards_to_go(members, torch.tensor([1.0, 1.0, 4.0, 2.0]))
    # nothing is taken to earn what the poorest first token earns, 1
    torch.testing.assert_close(found, torch.tensor([[4.0, 4.0, 4.0, 1.0], [2.0, 1.0, 0.0, 0.0]]))


def test_between_checkpoints_earnings_are_spread_evenly():
    members = population([[GOOD] * 16], [15.0])
    values = torch.arange(2.0, 16.0, 2.0) - 1  # at 2, 4, … tokens
    expected = torch.cat([torch.tensor([14.0, 14.0]), 15 - torch.arange(1.0, 15.0)])
    torch.testing.assert_close(rewards_to_go(members, values)[0], expected)


def test_parents_of_equal_reward_are_cut_where_each_of_them_loses():
    """The third member shows that nothing need be lost from position 2 on, the others that it began poorly."""
    members, values = planted([3], [6], [0, 1], length=8)
    cuts = cut_log_weights(members, rewards_to_go(members, values))
    worth_most = [(row == cuts.max()).nonzero().squeeze(1).tolist() for row in cuts]
    assert worth_most == [[2, 3], [2, 3, 4, 5, 6], [0]]


def test_credit_that_is_equal_everywhere_changes_nothing():
    members, values = planted([2], [2], [2])
    cuts = cut_log_weights(members, rewards_to_go(members, values))
    assert torch.equal(cuts, torch.zeros_like(cuts))
    plain, credited = (branch_log_weights(members, members.weights(1.8), Sampling(12), given) for given in (None, cuts))
    assert torch.equal(plain, credited)


def test_the_scale_of_a_reward_does_not_move_the_cuts():
    members, values = planted([3], [6], [1, 9])
    cuts = cut_log_weights(members, rewards_to_go(members, values))
    larger = replace(members, rewards=1000 * members.rewards)
    torch.testing.assert_close(cut_log_weights(larger, rewards_to_go(larger, 1000 * values)), cuts)


def test_one_position_stands_out_and_the_others_are_still_possible():
    members, values = planted([10], [], [])
    cuts = cut_log_weights(members, rewards_to_go(members, values))
    assert bool((cuts[:, :12] >= -50).all())
    assert bool(branch_log_weights(members, members.weights(1.8), Sampling(12), cuts).flatten().isfinite().any())


def test_with_credit_a_bad_spot_is_mended_after_fewer_samples():
    """The best parent lost one point in the middle, others lost more elsewhere: how soon is the right branch drawn?

    All five are worth cutting, and the right branch is one of about a hundred; over 60 draws the mean rank has a
    standard error of about 2.
    """
    members, values = planted([6], [1, 3], [8, 9], [2, 11], [0, 10])
    method = AISP(samples=64, iterations=2)
    plain = method.init(problem(ToyEngine(), Sampling(12)))
    start = replace(plain, waves=1, population=members, weights=members.weights(1.8))
    credited = start.credited(ToyEngine().decode(start.beginnings), values)

    def rank(state, key: int) -> int:
        prompt = replace(state.problem.prompt, key=key)
        there = replace(members, nodes=path_nodes(members.tokens, key))
        drawn = replace(state, problem=replace(state.problem, prompt=prompt), population=there)
        branches = draw_branches(drawn, 120)
        mended = (branches.parents == 0) & (branches.positions == 6) & (branches.tokens == GOOD)
        return int(mended.nonzero()[0])

    without = mean(rank(start, key) for key in range(60))
    found = mean(rank(credited, key) for key in range(60))
    assert found < 0.8 * without


# The search


def progress(method: AISP, seed: int, *, credit: bool) -> list[float]:
    """The best reward so far after each wave of a search."""
    engine, score = ToyEngine(scale=0.3, remembers=False, alternatives=10), spells("badgebadge")
    state = method.init(problem(engine, Sampling(max_tokens=10, min_tokens=10), seed))
    best: list[float] = []
    for _ in range(method.iterations):
        while credit and (wave := state.beginnings) is not None:
            texts = engine.decode(wave)
            state = state.credited(texts, torch.tensor([score(response) for response in texts.responses]))
        wave = method.propose(state)
        rollouts = engine.decode(wave)
        rewards = torch.tensor([score(response) for response in rollouts.responses])
        state, _ = method.update(state, wave, rollouts, rewards)
        best.append(max([*best, *rewards.tolist()]))
    return best


def test_a_search_with_credit_finds_as_good_an_answer_with_fewer_samples():
    """Over 16 seeds, the same for both; standard errors of the means are about 0.2."""
    method = AISP(samples=96, iterations=8, cooling=1.0, overlap=1, guidance=0)
    without = [progress(method, seed, credit=False) for seed in range(16)]
    credited = [progress(method, seed, credit=True) for seed in range(16)]
    assert mean(best[-1] for best in credited) > mean(best[-1] for best in without) + 0.4
    assert mean(best[5] for best in credited) >= mean(best[7] for best in without)  # 72 samples against 96


def test_new_parents_have_no_credit_before_their_beginnings_are_scored():
    engine, method = ToyEngine(), AISP(samples=8, iterations=2, overlap=1, guidance=0)
    state = method.init(problem(engine, Sampling(max_tokens=4)))
    wave = method.propose(state)
    rollouts = engine.decode(wave)
    state, _ = method.update(state, wave, rollouts, torch.arange(4.0))
    assert state.beginnings is not None
    looked = engine.decode(state.beginnings)
    credited = state.credited(looked, torch.arange(float(len(looked.responses))))
    assert credited.cuts is not None
    assert method.update(credited, wave, rollouts, torch.arange(4.0))[0].cuts is None


def test_the_first_wave_has_no_beginnings_to_ask_for():
    assert AISP().init(problem(ToyEngine(), Sampling(8))).beginnings is None


def test_responses_of_one_token_have_no_beginnings():
    engine, method = ToyEngine(), AISP(samples=8, iterations=2, overlap=1, guidance=0)
    state = method.init(problem(engine, Sampling(max_tokens=1)))
    wave = method.propose(state)
    rollouts = engine.decode(wave)
    state, _ = method.update(state, wave, rollouts, torch.arange(4.0))
    assert state.beginnings is None


# One token ahead


def branches(*places: tuple[int, int, int]) -> Branches:
    """Branches by parent, position and token."""
    parents, positions, tokens = torch.tensor(places).T
    return Branches(parents, positions, tokens, torch.arange(len(places)))


def test_branches_and_the_beginnings_that_they_leave_are_spelled_without_decoding_anything():
    members = population([[1, 2, 3, 0], [2, 2, -1, -1]], [1.0, 2.0])
    wave = looks(members, branches((0, 1, 3), (1, 0, 1), (0, 1, 1)), problem(ToyEngine(), Sampling(max_tokens=4)))
    rollouts = ToyEngine().decode(wave)
    assert [response.text for response in rollouts.responses] == ["ac", "a", "aa", "ab", "b"]
    assert rollouts.sampled_tokens == 0
    assert members.tokens[0, 1] == 2  # the parents are as they were


def test_a_branch_gains_what_its_token_earns_more_than_the_parents_own():
    members = population([[1, 2, 3, 0], [2, 2, 3, 0]], [1.0, 2.0])
    found = gains(members, branches((0, 1, 3), (1, 2, 1), (0, 1, 1)), torch.tensor([5.0, 6.0, 3.0, 4.0, 10.0]))
    assert found.tolist() == [1.0, -4.0, -1.0]


def test_branches_that_gain_are_chosen_whatever_the_scale_and_none_is_chosen_twice():
    many = branches(*((0, position, 1) for position in range(40)))
    found = torch.zeros(40)
    gained = torch.linspace(-1, 1, 40)
    for key in range(200):
        keys = fold(key, torch.arange(40))
        chosen = best_looking(many, gained, keys, 8)
        assert len(set(chosen.positions.tolist())) == 8
        assert torch.equal(chosen.positions, best_looking(many, 1000 * gained, keys, 8).positions)
        found[chosen.positions] += 1
    assert found[20:].sum() > 0.85 * found.sum()  # about twelve of them are in play
    assert len(best_looking(many, gained, fold(1, torch.arange(40)), 100)) == 40
    even = [best_looking(many, torch.zeros(40), fold(key, torch.arange(40)), 8).positions for key in range(200)]
    assert torch.cat(even).bincount(minlength=40).min() > 20  # 40 each on average


def test_what_was_chosen_is_decoded_and_a_shortened_wave_takes_the_first():
    engine, method = ToyEngine(), AISP(samples=24, iterations=3, lookahead=4, guidance=0, overlap=1)
    state = method.init(problem(engine, Sampling(max_tokens=6)))
    wave = method.propose(state)
    rollouts = engine.decode(wave)
    state, _ = method.update(state, wave, rollouts, torch.arange(8.0))
    state = state.credited(engine.decode(state.beginnings), torch.zeros(len(state.beginnings)))
    asked = state.beginnings
    assert state.looked_at == 4 * 8
    assert 4 * 8 < len(asked) <= 2 * 4 * 8
    texts = engine.decode(asked)
    state = state.credited(texts, torch.tensor([float("a" in text.text) for text in texts.responses]))
    assert state.beginnings is None
    wave = method.propose(state)
    begun = [row[:cut].tolist() for row, cut in zip(wave.prefix, wave.cut, strict=True)]
    known = [row[:cut].tolist() for row, cut in zip(asked.prefix, asked.cut, strict=True)][:32]
    assert len(begun) == 8
    assert all(text in known for text in begun)
    state, _ = method.update(state, wave, engine.decode(wave), torch.arange(8.0))
    assert state.branches is None


def test_a_search_that_looks_ahead_finds_better_answers():
    """Over 16 seeds, the same for both; standard errors of the means are about 0.2."""
    found = {
        count: mean(
            progress(AISP(samples=96, cooling=1.0, overlap=1, lookahead=count, guidance=0), seed, credit=True)[-1]
            for seed in range(16)
        )
        for count in (0, 8)
    }
    assert found[8] > found[0] + 0.4
