"""The loop: what it asks for, when it stops, what it counts, and that whoever leaves cancels what is in flight."""

import asyncio
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from langchain_aisp.align import (
    Aligned,
    Budget,
    Candidate,
    Iteration,
    Score,
    aalign,
    aiterate,
    align,
    first_rows,
    iterate,
)
from langchain_aisp.methods.best_of_n import BestOfN, BestOfNState
from langchain_aisp.types import Info, Response, Rollouts, Sampling, Ticket, Wave
from tests.toy import CHAT, END, ToyEngine, ToyReward, counts, outcome, play

SAMPLING = Sampling(max_tokens=12)
METHOD = BestOfN(samples=24, samples_per_wave=8)


def ticking(step: float = 1.0) -> Callable[[], float]:
    """A clock that goes on by a step whenever it is read."""
    ticks = itertools.count()
    return lambda: next(ticks) * step


def flat(response: Response) -> float:
    return 1.0


@dataclass
class StuckEngine(ToyEngine):
    """An engine that never answers, and tells when it is told to stop."""

    def __post_init__(self) -> None:
        self.asked, self.cancelled = threading.Event(), threading.Event()

    def submit(self, wave: Wave, *, deadline: float | None = None) -> Ticket[Rollouts]:
        self.asked.set()
        return Ticket(Future(), self.cancelled.set)


class StuckReward(ToyReward):
    """A reward that never answers, and tells when it is told to stop."""

    def __init__(self) -> None:
        super().__init__(flat)
        self.asked, self.cancelled = threading.Event(), threading.Event()

    def submit(self, pairs: Any, *, loop: Any = None) -> Ticket[Tensor]:
        self.asked.set()
        return Ticket(Future(), self.cancelled.set)


# What is asked, in which order


def test_a_search_asks_for_a_wave_then_for_scores_then_tells_of_the_iteration() -> None:
    *requests, last = [type(request) for request, _ in play(METHOD, ToyEngine(), counts("a"), SAMPLING)]
    assert requests == [Wave, Score, Iteration] * 3
    assert last is Aligned


def test_the_first_rows_of_a_wave_are_rows_of_the_wave() -> None:
    wave = next(request for request, _ in play(METHOD, ToyEngine(), flat, SAMPLING))
    short = first_rows(wave, 3)
    assert len(short) == 3
    assert torch.equal(short.keys, wave.keys[:3])
    assert short.prefix.shape == short.keys.shape
    assert len(first_rows(wave, 100)) == len(wave)


def test_a_response_that_comes_up_again_is_scored_once() -> None:
    engine, reward = ToyEngine(end_bias=3.0), ToyReward(counts("a"))
    aligned = align(engine, reward, replace(METHOD, samples=96), CHAT, sampling=SAMPLING)
    texts = [(response.text, response.finish_reason) for response in reward.scored]
    assert len(set(texts)) == len(texts) == aligned.reward_calls < aligned.samples
    assert {texts.index((c.response.text, c.response.finish_reason)) for c in aligned.candidates} == set(
        range(len(texts))
    )
    assert all(candidate.reward == candidate.response.text.count("a") for candidate in aligned.candidates)


def test_nothing_is_asked_of_the_reward_when_every_response_is_known() -> None:
    engine, reward = ToyEngine(), ToyReward(flat)
    greedy = BestOfN(samples=12, temperature=0.0, samples_per_wave=4)
    assert align(engine, reward, greedy, CHAT, sampling=SAMPLING).samples == 12
    assert len(reward.loops) == len(reward.scored) == 1


def test_responses_that_differ_in_a_tool_call_or_in_how_they_ended_are_scored_apart() -> None:
    def answer(rows: int) -> tuple[Response, ...]:
        calls = ({"name": "look", "args": {"x": 1}},), ({"name": "look", "args": {"x": True}},), ()
        reasons = ("stop", "length")
        kinds = [Response("a", reason, tool_calls=call) for call in calls for reason in reasons]  # type: ignore[arg-type]
        return tuple(itertools.islice(itertools.cycle(kinds), rows))

    class Scripted(ToyEngine):
        def decode(self, wave: Wave, *_: Any) -> Rollouts:
            return replace(super().decode(wave), responses=answer(len(wave)))

    reward = ToyReward(flat)
    aligned = align(Scripted(), reward, METHOD, CHAT, sampling=SAMPLING)
    assert aligned.reward_calls == len(aligned.distinct) == 6


def test_rewards_of_the_wrong_shape_are_refused() -> None:
    class Wrong(ToyReward):
        def submit(self, pairs: Any, *, loop: Any = None) -> Ticket[Tensor]:
            future: Future[Tensor] = Future()
            future.set_result(torch.zeros(len(pairs) + 1))
            return Ticket(future)

    with pytest.raises(AssertionError, match="got rewards of shape"):
        align(ToyEngine(), Wrong(flat), METHOD, CHAT, sampling=SAMPLING)


# When it stops


@pytest.mark.parametrize("samples", [1, 3, 8, 11, 16, 24])
def test_a_budget_of_samples_is_met_exactly(samples: int) -> None:
    engine = ToyEngine()
    aligned = align(engine, ToyReward(flat), METHOD, CHAT, sampling=SAMPLING, budget=Budget(samples=samples))
    assert aligned.samples == len(aligned.candidates) == sum(len(wave) for wave in engine.waves) == samples
    assert aligned.stopped == "samples"


def test_a_search_without_limits_runs_all_iterations() -> None:
    aligned = align(ToyEngine(), ToyReward(flat), METHOD, CHAT, sampling=SAMPLING)
    assert (aligned.stopped, len(aligned.trace), aligned.samples) == ("iterations", 3, 24)


def test_time_up_ends_the_search_after_the_iteration_under_way() -> None:
    # the clock is read four times per iteration: before and after the rewards, and for the record
    aligned = outcome(play(METHOD, ToyEngine(), flat, SAMPLING, budget=Budget(seconds=5), clock=ticking()))
    assert (aligned.stopped, len(aligned.trace)) == ("seconds", 2)
    assert aligned.seconds == 6
    assert aligned.reward_seconds == 2


def test_the_engine_is_told_when_time_is_up() -> None:
    engine = ToyEngine(clock=lambda: 0.0)
    align(engine, ToyReward(flat), METHOD, CHAT, sampling=SAMPLING, budget=Budget(seconds=1e6))
    assert len(set(engine.deadlines)) == 1
    assert engine.deadlines[0] is not None
    engine = ToyEngine()
    align(engine, ToyReward(flat), METHOD, CHAT, sampling=SAMPLING)
    assert engine.deadlines == [None] * 3


def test_time_up_in_the_first_wave_still_gives_the_best_of_what_was_cut_off() -> None:
    steps = iter([0.0] * 3 + [1e300] * 100)
    engine = ToyEngine(clock=lambda: next(steps))
    sampling = Sampling(max_tokens=12, min_tokens=8)
    aligned = align(
        engine,
        ToyReward(lambda response: len(set(response.text))),
        METHOD,
        CHAT,
        sampling=sampling,
        budget=Budget(seconds=1e6, samples=8),
    )
    assert {candidate.response.finish_reason for candidate in aligned.candidates} == {"timeout"}
    assert aligned.best.reward == max(candidate.reward for candidate in aligned.candidates) > 1
    assert len(aligned.best.tokens) == 3


def test_a_good_enough_response_ends_the_search() -> None:
    reward = counts("a")
    full = align(ToyEngine(), ToyReward(reward), METHOD, CHAT, sampling=SAMPLING)
    target = full.trace[0].best
    aligned = align(
        ToyEngine(), ToyReward(reward), METHOD, CHAT, sampling=SAMPLING, budget=Budget(target_reward=target)
    )
    assert (aligned.stopped, len(aligned.trace)) == ("target_reward", 1)
    assert aligned.best.reward == target


def test_a_cut_off_response_is_never_good_enough() -> None:
    sampling = Sampling(max_tokens=4, min_tokens=4)  # no end token fits
    aligned = align(ToyEngine(), ToyReward(flat), METHOD, CHAT, sampling=sampling, budget=Budget(target_reward=0.5))
    assert aligned.stopped == "iterations"
    assert not aligned.best.response.complete


@pytest.mark.parametrize("patience", [1, 2])
def test_a_search_that_no_longer_improves_loses_patience(patience: int) -> None:
    aligned = align(ToyEngine(), ToyReward(flat), METHOD, CHAT, sampling=SAMPLING, budget=Budget(patience=patience))
    assert (aligned.stopped, len(aligned.trace)) == ("patience", 1 + patience)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"samples": 0}, "samples"),
        ({"seconds": 0.0}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"patience": 0}, "patience"),
        ({"target_reward": float("nan")}, "target_reward"),
    ],
)
def test_a_budget_that_leaves_nothing_to_do_is_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Budget(**settings)


# What comes out


def test_complete_candidates_come_first_then_higher_rewards_then_earlier_ones() -> None:
    whole, cut = Response("whole"), Response("cut", "length")
    ranked = [
        Candidate(whole, 2.0, 1, 0, ()),
        Candidate(whole, 1.0, 0, 3, ()),
        Candidate(whole, 1.0, 1, 2, ()),
        Candidate(cut, 9.0, 0, 0, ()),
        Candidate(cut, 8.0, 0, 1, ()),
    ]
    assert sorted([ranked[i] for i in (3, 1, 4, 0, 2)], key=lambda candidate: candidate.rank) == ranked


def test_the_outcome_has_every_row_ranked_and_its_tokens() -> None:
    engine, waves = ToyEngine(), []
    for request, answer in play(METHOD, engine, counts("a"), SAMPLING):
        if isinstance(request, Wave):
            waves.append(answer)
    aligned = request
    assert len(aligned.candidates) == 24
    assert [c.rank for c in aligned.candidates] == sorted(c.rank for c in aligned.candidates)
    for candidate in aligned.candidates:
        rollouts, row = waves[candidate.iteration], candidate.row
        assert candidate.response == rollouts.responses[row]
        assert list(candidate.tokens) == rollouts.tokens[row, : rollouts.lengths[row]].tolist()
        assert (candidate.tokens[-1] == END) == candidate.response.complete
    assert aligned.sampled_tokens == sum(rollouts.sampled_tokens for rollouts in waves)
    assert aligned.prompt_tokens == len(engine.encode(CHAT).ids)


def test_distinct_candidates_keep_their_order() -> None:
    aligned = align(ToyEngine(end_bias=3.0), ToyReward(counts("a")), METHOD, CHAT, sampling=SAMPLING)
    texts = [candidate.response.text for candidate in aligned.candidates]
    assert [candidate.response.text for candidate in aligned.distinct] == list(dict.fromkeys(texts))
    assert aligned.distinct[0] == aligned.best


def test_the_record_of_an_iteration_adds_up() -> None:
    aligned = align(ToyEngine(), ToyReward(counts("a")), METHOD, CHAT, sampling=SAMPLING)
    for iteration, record in enumerate(aligned.trace):
        so_far = [candidate for candidate in aligned.candidates if candidate.iteration <= iteration]
        wave = [candidate.reward for candidate in so_far if candidate.iteration == iteration]
        assert record.iteration == iteration
        assert record.samples == len(so_far)
        assert record.sampled_tokens == sum(len(candidate.tokens) for candidate in so_far)
        assert record.mean == pytest.approx(sum(wave) / len(wave))
        assert (record.best, record.response) == (so_far[0].reward, so_far[0].response)
        assert (record.ess, record.control_kl) == (8.0, 0.0)
    keys = ["iteration", "best", "mean", "ess", "control_kl", "seconds"]
    assert list(aligned.trace[0].numbers)[:6] == keys
    assert {"samples", "sampled_tokens", "reward_calls", "reward_seconds"} < set(aligned.trace[0].numbers)


# Those who drive it


def costs(steps: list[Iteration | Aligned]) -> list[Any]:
    """Everything about a run but the time it took."""
    *iterations, aligned = steps
    assert isinstance(aligned, Aligned)
    records = [
        {**step.numbers, "seconds": 0, "reward_seconds": 0} for step in iterations if isinstance(step, Iteration)
    ]
    return [*records, aligned.candidates, aligned.stopped, aligned.prompt, aligned.method]


@pytest.mark.parametrize("threaded", [False, True])
async def test_sync_and_async_callers_get_the_same(threaded: bool) -> None:
    engine, reward = ToyEngine(threaded=threaded), ToyReward(counts("a"))
    arguments: dict[str, Any] = {"sampling": SAMPLING, "seed": 3, "budget": Budget(samples=20)}
    sync: list[Any] = list(iterate(engine, reward, METHOD, CHAT, **arguments))
    asynchronous: list[Any] = [step async for step in aiterate(engine, reward, METHOD, CHAT, **arguments)]
    assert costs(sync) == costs(asynchronous)
    assert align(engine, reward, METHOD, CHAT, **arguments).candidates == sync[-1].candidates
    assert (await aalign(engine, reward, METHOD, CHAT, **arguments)).best == sync[-1].best


async def test_many_searches_share_one_event_loop() -> None:
    engine, reward = ToyEngine(threaded=True), ToyReward(counts("a"))
    together = await asyncio.gather(
        *(aalign(engine, reward, METHOD, CHAT, sampling=SAMPLING, seed=seed) for seed in range(6))
    )
    alone = [align(engine, reward, METHOD, CHAT, sampling=SAMPLING, seed=seed) for seed in range(6)]
    assert [aligned.candidates for aligned in together] == [aligned.candidates for aligned in alone]


async def test_a_reward_is_given_the_loop_of_an_asynchronous_caller_only() -> None:
    reward = ToyReward(flat)
    align(ToyEngine(), reward, METHOD, CHAT, sampling=SAMPLING, budget=Budget(samples=1))
    await aalign(ToyEngine(), reward, METHOD, CHAT, sampling=SAMPLING, budget=Budget(samples=1))
    assert reward.loops == [None, asyncio.get_running_loop()]


async def test_the_event_loop_is_not_kept_busy_by_the_method() -> None:
    threads = set()

    @dataclass(frozen=True)
    class Observed(BestOfN):
        def propose(self, state: BestOfNState) -> Wave:
            threads.add(threading.get_ident())
            return super().propose(state)

        def update(self, state: BestOfNState, wave: Wave, rollouts: Rollouts, rewards: Tensor) -> tuple[Any, Info]:
            threads.add(threading.get_ident())
            return super().update(state, wave, rollouts, rewards)

    await aalign(ToyEngine(), ToyReward(flat), Observed(samples=8), CHAT, sampling=SAMPLING)
    assert threads
    assert threading.get_ident() not in threads


async def test_waiting_callers_in_the_default_executor_block_no_search() -> None:
    loop, leave = asyncio.get_running_loop(), threading.Event()
    parked = [loop.run_in_executor(None, leave.wait) for _ in range(64)]
    aligned = await asyncio.wait_for(aalign(ToyEngine(), ToyReward(flat), METHOD, CHAT, sampling=SAMPLING), 30)
    leave.set()
    await asyncio.gather(*parked)
    assert aligned.samples == 24


@pytest.mark.parametrize("stuck", ["engine", "reward"])
async def test_a_cancelled_task_cancels_what_is_in_flight(stuck: str) -> None:
    engine = StuckEngine() if stuck == "engine" else ToyEngine()
    reward = StuckReward() if stuck == "reward" else ToyReward(flat)
    waiting: Any = engine if stuck == "engine" else reward
    task = asyncio.create_task(aalign(engine, reward, METHOD, CHAT, sampling=SAMPLING))
    while not waiting.asked.is_set():
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert waiting.cancelled.is_set()


async def test_a_timeout_of_the_caller_cancels_what_is_in_flight() -> None:
    engine = StuckEngine()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(aalign(engine, ToyReward(flat), METHOD, CHAT, sampling=SAMPLING), 0.05)
    assert engine.cancelled.is_set()


def test_an_interrupted_caller_cancels_what_is_in_flight() -> None:
    class Interrupted(Future):  # type: ignore[type-arg]
        def result(self, timeout: float | None = None) -> Any:
            raise KeyboardInterrupt

    class Engine(StuckEngine):
        def submit(self, wave: Wave, *, deadline: float | None = None) -> Ticket[Rollouts]:
            return Ticket(Interrupted(), self.cancelled.set)

    engine = Engine()
    with pytest.raises(KeyboardInterrupt):
        align(engine, ToyReward(flat), METHOD, CHAT, sampling=SAMPLING)
    assert engine.cancelled.is_set()


def test_a_closed_iterator_asks_for_nothing_more() -> None:
    engine = ToyEngine()
    steps: Any = iterate(engine, ToyReward(flat), METHOD, CHAT, sampling=SAMPLING)
    assert next(steps).iteration == 0
    steps.close()
    assert len(engine.waves) == 1


async def test_a_closed_asynchronous_iterator_asks_for_nothing_more() -> None:
    engine = ToyEngine()
    steps: Any = aiterate(engine, ToyReward(flat), METHOD, CHAT, sampling=SAMPLING)
    assert (await anext(steps)).iteration == 0
    await steps.aclose()
    assert len(engine.waves) == 1


async def test_errors_of_engine_and_reward_reach_the_caller_unchanged() -> None:
    class BrokenEngine(ToyEngine):
        def decode(self, *_: Any) -> Rollouts:
            raise RuntimeError("out of memory")

    def broken(response: Response) -> float:
        raise KeyError("no such judge")

    for engine, reward, error, words in (
        (BrokenEngine(), ToyReward(flat), RuntimeError, "out of memory"),
        (ToyEngine(), ToyReward(broken), KeyError, "no such judge"),
    ):
        with pytest.raises(error, match=words):
            align(engine, reward, METHOD, CHAT, sampling=SAMPLING)
        with pytest.raises(error, match=words):
            await aalign(engine, reward, METHOD, CHAT, sampling=SAMPLING)


def test_continuing_the_last_message_reaches_the_engine() -> None:
    plain, continued = (
        align(ToyEngine(), ToyReward(flat), METHOD, CHAT, sampling=SAMPLING, continue_last=last)
        for last in (False, True)
    )
    assert plain.prompt.ids[:-1] == continued.prompt.ids
    assert plain.prompt.key != continued.prompt.key
