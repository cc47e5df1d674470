"""Scoring ahead: rows are scored as they end, in batches that grow, and nothing else about a search changes."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from langchain_aisp import AISP, AISPChatModel, BestOfN, as_reward
from langchain_aisp.ahead import Ahead, waits
from langchain_aisp.align import aalign, align
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.rewards import (
    EnsembleReward,
    JudgeReward,
    RemoteReward,
    RuleReward,
    WeightedSum,
    as_call_reward,
    must_match,
)
from langchain_aisp.tools import json_grammar
from langchain_aisp.types import Response, Reward, Sampling, Ticket
from tests import tiny

CHAT = [{"role": "user", "content": "Where is my parcel?"}]


@dataclass
class Slow:
    """A reward that answers when it is told to; a response is worth its length."""

    waits: bool = True
    name: str = "slow"
    fingerprint: str = "slow"
    batches: list[list[str]] = field(default_factory=list)
    open: list[Future[Tensor]] = field(default_factory=list)

    def submit(self, pairs: Any, *, loop: Any = None) -> Ticket[Tensor]:
        self.batches.append([response.text for _, response in pairs])
        self.open.append(Future())
        return Ticket(self.open[-1])

    def answer(self, batch: int) -> None:
        self.open[batch].set_result(torch.tensor([float(len(text)) for text in self.batches[batch]]))


def said(*texts: str) -> list[Response]:
    return [Response(text) for text in texts]


def pairs(*texts: str) -> list[tuple[Any, Response]]:
    return [(CHAT, response) for response in said(*texts)]


# -- the batches ------------------------------------------------------------------------------------------------------


def test_one_batch_is_under_way_and_what_ends_meanwhile_makes_the_next() -> None:
    reward = Slow()
    ahead = Ahead(reward, CHAT, None)
    for text in ("a", "bb", "ccc", "bb"):
        ahead.tell(said(text))
    assert reward.batches == [["a"]]
    reward.answer(0)
    assert reward.batches == [["a"], ["bb", "ccc"]]
    ticket = ahead.submit(pairs("ccc", "dddd", "a", "dddd"))
    assert reward.batches == [["a"], ["bb", "ccc"], ["dddd"]]  # whoever waits for it is not kept waiting
    reward.answer(2)
    assert not ticket.future.done()
    reward.answer(1)
    assert ticket.future.result().tolist() == [3, 4, 1, 4]
    assert ahead.submit(pairs("bb")).future.result().tolist() == [2]
    assert len(reward.batches) == 3


def test_an_error_reaches_the_search_and_abandons_the_rest() -> None:
    reward = Slow()
    ahead = Ahead(reward, CHAT, None)
    ahead.tell(said("a"))
    ticket = ahead.submit(pairs("a", "b"))
    reward.open[0].set_exception(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        ticket.future.result()
    assert reward.open[1].cancelled()
    ahead.tell(said("c"))
    assert len(reward.batches) == 2


def test_a_reward_that_cannot_even_start_fails_the_search_and_not_the_engine() -> None:
    class Broken(Slow):
        def submit(self, pairs: Any, *, loop: Any = None) -> Ticket[Tensor]:
            raise RuntimeError("not today")

    ahead = Ahead(Broken(), CHAT, None)
    ahead.tell(said("a"))
    with pytest.raises(RuntimeError, match="not today"):
        ahead.submit(pairs("a")).future.result()


def test_scores_of_another_shape_are_refused() -> None:
    reward = Slow()
    ticket = Ahead(reward, CHAT, None).submit(pairs("a", "b"))
    reward.open[0].set_result(torch.zeros(3))
    with pytest.raises(AssertionError, match="2 pairs got rewards of shape"):
        ticket.future.result()


@pytest.mark.parametrize("fails", [False, True])
def test_a_wave_that_ends_early_abandons_its_scores(fails: bool) -> None:
    reward, wave = Slow(), Future[Any]()
    ahead = Ahead(reward, CHAT, None)
    told: list[str] = []
    ticket = ahead.during(Ticket(wave, lambda: told.append("cancelled")))
    ahead.tell(said("a"))
    if fails:
        wave.set_exception(RuntimeError("out of luck"))
    else:
        ticket.cancel()
    assert reward.open[0].cancelled()
    assert told == ([] if fails else ["cancelled"])


def test_what_hangs_on_the_context_follows_the_reward_to_the_engines_thread() -> None:
    who: ContextVar[str] = ContextVar("who", default="nobody")
    seen: list[str] = []

    class Watching(Slow):
        def submit(self, pairs: Any, *, loop: Any = None) -> Ticket[Tensor]:
            seen.append(who.get())
            return super().submit(pairs, loop=loop)

    who.set("caller")
    ahead = Ahead(Watching(), CHAT, None)
    thread = threading.Thread(target=ahead.tell, args=(said("a"),))
    thread.start()
    thread.join()
    assert seen == ["caller"]


# -- the engine -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine():
    with TransformersEngine(tiny.model(), tiny.tokenizer(), max_rows=6) as engine:
        yield engine


@pytest.mark.parametrize("grammar", [None, json_grammar()])
def test_the_engine_tells_of_every_row_once_and_of_early_ones_early(engine, grammar) -> None:
    options = {"grammar": grammar} if grammar else {"stop": tuple("abcdefghijklmnop")}
    wave = tiny.wave(engine.encode(CHAT, seed=3), 10, 40, min_tokens=0, **options)
    told: list[tuple[bool, Response]] = []
    job: list[Future[Any]] = []

    def ended(responses: Any) -> None:
        told.extend((bool(job) and job[0].done(), response) for response in responses)

    job.append(engine.submit(wave, ended=ended).future)
    rollouts = job[0].result(timeout=60)
    assert sorted(response.text for _, response in told) == sorted(response.text for response in rollouts.responses)
    assert {response.finish_reason for _, response in told} == {each.finish_reason for each in rollouts.responses}
    assert not any(done for done, _ in told)
    assert grammar or len(told[0][1].text) < max(len(response.text) for _, response in told)


def test_rows_that_time_cuts_off_are_told_too(engine) -> None:
    wave = tiny.wave(engine.encode(CHAT, seed=3), 4, 40, min_tokens=40)
    told: list[Response] = []
    engine.submit(wave, ended=told.extend, deadline=time.monotonic() - 1).future.result(timeout=60)
    assert [response.finish_reason for response in told] == ["timeout"] * 4


# -- the search -------------------------------------------------------------------------------------------------------

SAMPLING = Sampling(max_tokens=32, stop=("e", "a"))


def letters(chat: Any, texts: Any) -> list[float]:
    return [float(len(set(text))) for text in texts]


def numbers(found: Any) -> list[Any]:
    return [(each.tokens, each.reward, each.iteration, each.row) for each in found.candidates]


@pytest.mark.parametrize("method", [BestOfN(24, samples_per_wave=12), AISP(24, 3)])
def test_a_search_finds_the_same_whether_it_scores_ahead_or_not(engine, method) -> None:
    sizes: list[int] = []

    def counted(chat: Any, texts: Any) -> list[float]:
        sizes.append(len(texts))
        return letters(chat, texts)

    expected = align(engine, as_reward(letters), method, CHAT, sampling=SAMPLING)
    found = align(engine, as_reward(counted, waits=True), method, CHAT, sampling=SAMPLING)
    assert numbers(found) == numbers(expected)
    assert found.reward_calls == expected.reward_calls == sum(sizes)
    assert len(sizes) > len(found.trace)


async def test_the_reward_is_asked_while_rows_still_decode(engine) -> None:
    passes: list[int] = []
    handle = engine.model.register_forward_pre_hook(lambda *_: passes.append(0))
    asked_at: list[int] = []

    async def patient(chat: Any, texts: Any) -> list[float]:
        asked_at.append(len(passes))
        await asyncio.sleep(0.001)
        return letters(chat, texts)

    found = await aalign(engine, as_reward(patient), BestOfN(12), CHAT, sampling=SAMPLING)
    handle.remove()
    assert numbers(found) == numbers(align(engine, as_reward(letters), BestOfN(12), CHAT, sampling=SAMPLING))
    assert asked_at[0] < len(passes)


async def test_whoever_stops_waiting_stops_the_scores(engine) -> None:
    started, stopped = asyncio.Event(), asyncio.Event()

    async def endless(chat: Any, texts: Any) -> list[float]:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()
        return [0.0] * len(texts)

    task = asyncio.create_task(aalign(engine, as_reward(endless), BestOfN(12), CHAT, sampling=SAMPLING))
    await asyncio.wait_for(started.wait(), 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(stopped.wait(), 30)


def test_rewards_say_whether_they_wait() -> None:
    async def asks(chat: Any, texts: Any) -> list[float]:
        return [0.0] * len(texts)

    async def asks_of_calls(chat: Any, name: str, args: Any) -> float:
        return 0.0

    remote = RemoteReward("http://127.0.0.1:1", "tei-predict")
    judge = JudgeReward(AISPChatModel(model="demo"))
    waiting: list[Reward] = [
        remote,
        judge,
        as_reward(asks),
        as_reward(letters, waits=True),
        as_call_reward(asks_of_calls),
    ]
    waiting += [
        WeightedSum([(remote, 1.0), (asks, 2.0)]),
        EnsembleReward([judge, asks]),
        as_reward(remote, partial=True),
    ]
    computing: list[Reward] = [as_reward(letters), RuleReward([must_match("a")]), as_reward(asks, waits=False)]
    computing += [WeightedSum([(remote, 1.0), (letters, 2.0)]), as_call_reward(asks_of_calls, text=letters)]
    assert all(map(waits, waiting))
    assert not any(map(waits, computing))
