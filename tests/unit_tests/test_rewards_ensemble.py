"""Ensembles: mean, minimum, lower bound; one error for all; the same joining as every combination."""

import pickle
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_aisp.rewards import EnsembleReward, Minimum, RewardError, as_reward
from langchain_aisp.types import Response

CHAT = [{"role": "user", "content": "Say something."}]
PAIRS = [(CHAT, Response("a")), (CHAT, Response("bbb"))]


def length(chat, responses):
    return [len(text) for text in responses]


async def brevity(chat, responses):
    return [3 - len(text) for text in responses]


def constant(value):
    return as_reward(lambda chat, responses: [value] * len(responses), name=f"is {value:g}")


def scores(reward, pairs=PAIRS):
    return reward.submit(pairs).future.result(timeout=20).tolist()


@pytest.mark.parametrize(
    ("aggregate", "expected"), [("mean", [1.5, 1.5]), ("minimum", [1.0, 0.0]), ("lower_bound", [1.0, 0.0])]
)
def test_each_aggregate_has_its_formula(aggregate, expected):
    assert scores(EnsembleReward([length, brevity], aggregate)) == expected


def test_more_deviations_lower_the_bound_and_none_gives_the_mean():
    bounds = [scores(EnsembleReward([length, brevity], "lower_bound", deviations=k)) for k in (0.0, 1.0, 2.0)]
    assert bounds == [[1.5, 1.5], [1.0, 0.0], [0.5, -1.5]]


def test_disagreement_costs_and_agreement_does_not():
    agreed = scores(EnsembleReward([constant(2), constant(2)], "lower_bound"))
    disputed = scores(EnsembleReward([constant(0), constant(4)], "lower_bound"))
    assert agreed == [2.0, 2.0]
    assert disputed == [0.0, 0.0]


def test_a_single_member_is_its_own_bound():
    assert scores(EnsembleReward([length], "lower_bound")) == [1.0, 3.0]


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=6), st.floats(0, 4))
@settings(max_examples=25, deadline=None)
def test_the_bound_is_the_textbook_one(values, deviations):
    [score] = scores(EnsembleReward(map(constant, values), "lower_bound", deviations=deviations), PAIRS[:1])
    assert score == pytest.approx(statistics.fmean(values) - deviations * statistics.pstdev(values), abs=1e-3)


def test_a_minimum_is_an_ensemble():
    assert scores(Minimum([length, brevity])) == scores(EnsembleReward([length, brevity], "minimum"))
    assert Minimum([length]).fingerprint == EnsembleReward([length], "minimum").fingerprint


def test_the_name_tells_members_and_aggregate():
    assert EnsembleReward([length, brevity]).name == "mean(length, brevity)"
    assert Minimum([length, brevity]).name == "min(length, brevity)"
    assert EnsembleReward([length], "lower_bound", deviations=0.5).name == "lower bound 0.5(length)"


def test_the_fingerprint_covers_members_and_settings():
    rewards = [
        EnsembleReward([length, brevity]),
        EnsembleReward([length]),
        EnsembleReward([length, brevity], "minimum"),
        EnsembleReward([length, brevity], "lower_bound"),
        EnsembleReward([length, brevity], "lower_bound", deviations=2),
    ]
    assert len({reward.fingerprint for reward in rewards}) == 5
    assert EnsembleReward([length, brevity]).fingerprint == rewards[0].fingerprint


def test_an_error_of_one_member_is_the_error_of_all():
    def broken(chat, responses):
        raise KeyError("gone")

    with pytest.raises(RewardError, match="'broken' raised KeyError"):
        scores(EnsembleReward([length, broken], "lower_bound"))


@pytest.mark.parametrize("build", [EnsembleReward, Minimum])
def test_a_pickled_ensemble_scores_the_same(build):
    reward = pickle.loads(pickle.dumps(build([length, brevity])))
    assert scores(reward) == scores(build([length, brevity]))
    assert reward.fingerprint == build([length, brevity]).fingerprint


@pytest.mark.parametrize(
    ("arguments", "options", "told"),
    [
        (([],), {}, "EnsembleReward needs at least one part"),
        (([length], "median"), {}, "aggregate is one of"),
        (([length], "lower_bound"), {"deviations": -1}, "deviations must be"),
        (([length], "lower_bound"), {"deviations": float("nan")}, "deviations must be"),
        (([length], "mean"), {"deviations": 2}, "only counts with aggregate='lower_bound'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(arguments, options, told):
    with pytest.raises(ValueError, match=told):
        EnsembleReward(*arguments, **options)
