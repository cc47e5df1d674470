"""Sums and minima of rewards: values, errors, cancelling."""

import asyncio
import threading

import pytest

from langchain_aisp.rewards import Minimum, RewardError, WeightedSum, as_reward
from langchain_aisp.types import Response

CHAT = [{"role": "user", "content": "Say something."}]
PAIRS = [(CHAT, Response("a")), (CHAT, Response("bbb"))]


def length(chat, responses):
    return [len(text) for text in responses]


async def brevity(chat, responses):
    return [2 - len(text) for text in responses]


def scores(reward):
    return reward.submit(PAIRS).future.result(timeout=20).tolist()


def test_a_weighted_sum_adds_its_parts():
    assert scores(WeightedSum([(length, 2.0), (brevity, 0.5)])) == [2.5, 5.5]
    assert scores(WeightedSum({length: 2.0, brevity: 0.5})) == [2.5, 5.5]


def test_a_minimum_is_the_weakest_part():
    assert scores(Minimum([length, brevity])) == [1.0, -1.0]


def test_combinations_nest():
    assert scores(WeightedSum([(Minimum([length, brevity]), 10.0), (length, 1)])) == [11.0, -7.0]


def test_the_name_tells_the_parts():
    assert WeightedSum([(length, 2), (Minimum([length, brevity]), -0.5)]).name == "2·length + -0.5·min(length, brevity)"


def test_the_parts_are_asked_at_the_same_time():
    together = threading.Barrier(2, timeout=20)

    def waits(chat, responses):
        together.wait()
        return [1.0] * len(responses)

    assert scores(WeightedSum([(as_reward(waits), 1), (as_reward(waits), 1)])) == [2.0, 2.0]


def test_an_error_of_one_part_names_it_and_cancels_the_others():
    started, cancelled = threading.Event(), threading.Event()

    def broken(chat, responses):
        started.wait(20)
        raise ValueError("no")

    async def waits(chat, responses):
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    with pytest.raises(RewardError, match="'broken' raised ValueError: no"):
        scores(Minimum([waits, broken]))
    assert cancelled.wait(20)


def test_cancelling_cancels_all_parts():
    started = [threading.Event(), threading.Event()]
    cancelled = [threading.Event(), threading.Event()]

    def part(number):
        async def waits(chat, responses):
            started[number].set()
            try:
                await asyncio.sleep(60)
            finally:
                cancelled[number].set()

        return waits

    with WeightedSum([(part(0), 1.0), (part(1), 1.0)]).submit(PAIRS):
        assert all(event.wait(20) for event in started)
    assert all(event.wait(20) for event in cancelled)


def test_a_sum_that_overflows_is_an_error():
    with pytest.raises(RewardError, match="not a finite 32-bit number"):
        scores(WeightedSum([(length, 1e39)]))


@pytest.mark.parametrize("build", [lambda: WeightedSum([]), lambda: WeightedSum({}), lambda: Minimum([])])
def test_a_combination_needs_parts(build):
    with pytest.raises(ValueError, match="at least one part"):
        build()


def test_weights_must_be_finite():
    with pytest.raises(ValueError, match="finite"):
        WeightedSum([(length, float("nan"))])


def test_a_part_that_is_no_reward_is_refused():
    with pytest.raises(TypeError, match="got str"):
        WeightedSum([("length", 1.0)])
