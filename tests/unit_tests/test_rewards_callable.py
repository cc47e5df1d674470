"""Functions as rewards: what they may answer, how they are called, how they fail."""

import asyncio
import contextvars
import functools
import pickle
import threading
import time
from concurrent.futures import CancelledError, wait

import numpy as np
import pytest
import torch

from langchain_aisp.rewards import CallableReward, RewardError, as_reward, check_scores
from langchain_aisp.types import Response

CHAT = [{"role": "user", "content": "Name a colour."}]
OTHER = [{"role": "user", "content": "Name a number."}]
RESPONSES = [Response("red"), Response("dark blue"), Response("")]


def pairs(chat=CHAT, responses=RESPONSES):
    return [(chat, response) for response in responses]


def scores(reward, some_pairs=None):
    return reward.submit(pairs() if some_pairs is None else some_pairs).future.result(timeout=20)


def by_length(chat, responses):
    return [len(text) for text in responses]


async def by_length_async(chat, responses):
    await asyncio.sleep(0)
    return [len(text) for text in responses]


class Lengths:
    def __call__(self, chat, responses):
        return by_length(chat, responses)

    def method(self, chat, responses):
        return by_length(chat, responses)


class AsyncLengths:
    async def __call__(self, chat, responses):
        return await by_length_async(chat, responses)


def by_length_plus(bonus, chat, responses):
    return [len(text) + bonus for text in responses]


async def by_length_plus_async(bonus, chat, responses):
    return [len(text) + bonus for text in responses]


@pytest.mark.parametrize(
    "fn",
    [
        by_length,
        by_length_async,
        lambda chat, responses: by_length(chat, responses),
        lambda chat, responses: by_length_async(chat, responses),
        Lengths(),
        Lengths().method,
        AsyncLengths(),
        functools.partial(by_length_plus, 0),
        functools.partial(by_length_plus_async, 0),
        functools.partial(AsyncLengths()),
    ],
)
def test_every_kind_of_callable_is_a_reward(fn):
    answer = scores(as_reward(fn))
    assert answer.dtype == torch.float32
    assert answer.tolist() == [3.0, 9.0, 0.0]


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2.5, True],
        (1, 2.5, True),
        np.array([1, 2.5, 1]),
        [np.float32(1), np.float64(2.5), np.bool_(True)],
        torch.tensor([1.0, 2.5, 1.0], dtype=torch.float64, requires_grad=True),
        [torch.tensor(1.0), torch.tensor(2.5), torch.tensor(True)],
        iter([1, 2.5, 1]),
    ],
)
def test_lists_arrays_and_tensors_are_scores(answer):
    checked = check_scores("r", answer, ["a", "b", "c"])
    assert checked.tolist() == [1.0, 2.5, 1.0]
    assert checked.dtype == torch.float32
    assert not checked.requires_grad


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ([1.0, float("nan")], "answered nan"),
        ([1.0, float("-inf")], "answered -inf"),
        ([1.0, 1e39], "not a finite 32-bit number"),
        ([1.0, 10**400], "not a finite 32-bit number"),
        ([1.0, None], "answered NoneType"),
        ([1.0, "good"], "answered str"),
        ([1.0, 1j], "answered complex"),
        (torch.tensor([1.0, float("nan")]), "answered nan"),
        (torch.tensor([1j, 1j]), "answered complex"),
    ],
)
def test_a_score_that_is_no_finite_number_is_named_with_its_response(answer, told):
    with pytest.raises(RewardError, match=told) as caught:
        check_scores("helpful", answer, ["fine", "z" * 500])
    assert "'helpful'" in str(caught.value)
    assert "Return a" in str(caught.value)
    assert len(str(caught.value)) < 500  # the response is shortened


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ([1.0], "answered 1 scores for 2 responses"),
        (np.zeros(3), "answered 3 scores for 2 responses"),
        ([], "answered 0 scores"),
        (1.0, "answered float"),
        (None, "answered NoneType"),
        ("ab", "answered str"),
        ({"a": 1, "b": 2}, "answered dict"),
        ({1.0, 2.0}, "answered set"),
        (torch.zeros(2, 1), r"array of shape \(2, 1\)"),
        (torch.tensor(0.0), r"array of shape \(\)"),
        (np.zeros((1, 2)), r"array of shape \(1, 2\)"),
    ],
)
def test_an_answer_of_another_form_is_refused(answer, told):
    with pytest.raises(RewardError, match=told):
        check_scores("helpful", answer, ["a", "b"])


def test_a_bad_answer_reaches_the_caller_of_the_ticket():
    with pytest.raises(RewardError, match="answered nan.*dark blue"):
        scores(as_reward(lambda chat, responses: [1.0, float("nan"), 0.0]))


def test_the_function_is_called_once_per_conversation_in_the_order_of_the_pairs():
    calls = []

    def reward(chat, responses):
        calls.append((chat, responses))
        return [len(chat[0]["content"]) + len(text) for text in responses]

    equal = [dict(message) for message in CHAT]
    mixed = [(CHAT, Response("a")), (OTHER, Response("bbbb")), (equal, Response("cc")), (OTHER, Response(""))]
    mixed[1][0][0]["content"] = "Other, longer than the first."
    answer = scores(as_reward(reward), mixed)
    assert answer.tolist() == [15.0, 33.0, 16.0, 29.0]
    assert sorted(len(responses) for _, responses in calls) == [2, 2]
    assert ["a", "cc"] in [responses for _, responses in calls]


def test_the_function_cannot_edit_the_conversation():
    chat = [{"role": "user", "content": "hello"}]

    def rude(chat, responses):
        chat[0]["content"] = "changed"
        chat.clear()
        responses.clear()
        return [0.0]

    scores(as_reward(rude), [(chat, Response("x"))])
    assert chat == [{"role": "user", "content": "hello"}]


def test_no_pairs_give_no_scores():
    assert scores(as_reward(by_length), []).shape == (0,)


def test_a_reward_may_see_the_whole_response():
    response = Response("", finish_reason="length", reasoning="hm", tool_calls=({"name": "look", "args": {}},))
    reward = as_reward(lambda chat, responses: [len(each.tool_calls) for each in responses], sees="response")
    assert scores(reward, [(CHAT, response)]).tolist() == [1.0]
    assert reward.fingerprint != as_reward(reward.fn).fingerprint


def test_an_exception_is_chained_and_names_the_reward_and_the_response():
    def broken(chat, responses):
        raise KeyError("missing")

    async def broken_async(chat, responses):
        raise KeyError("missing")

    for fn in (broken, broken_async, lambda chat, responses: broken_async(chat, responses)):
        with pytest.raises(RewardError, match="raised KeyError: 'missing'.*'red'") as caught:
            scores(as_reward(fn, name="judge"))
        assert caught.value.reward == "judge"
        assert isinstance(caught.value.__cause__, KeyError)


def test_a_reward_that_exits_does_not_leave_its_caller_waiting():
    def leaves(chat, responses):
        raise SystemExit(3)

    with pytest.raises(RewardError, match="raised SystemExit"):
        scores(as_reward(leaves))


def test_a_reward_that_hangs_is_named_and_the_next_call_is_served():
    release = threading.Event()

    def hangs(chat, responses):
        if responses == ["wait"]:
            release.wait(60)
        return [1.0] * len(responses)

    reward = as_reward(hangs, name="slow one", timeout=0.05)
    stuck = [reward.submit([(CHAT, Response("wait"))]) for _ in range(6)]  # more than there are threads
    for ticket in stuck:
        with pytest.raises(RewardError, match="'slow one' did not answer within 0.05 seconds"):
            ticket.future.result(timeout=20)
    reward_in_time = as_reward(hangs, timeout=20)
    assert scores(reward_in_time).tolist() == [1.0, 1.0, 1.0]
    assert scores(reward, [(CHAT, Response("go"))]).tolist() == [1.0]
    release.set()


def test_an_async_reward_that_hangs_is_named_and_its_task_cancelled():
    cancelled = threading.Event()

    async def hangs(chat, responses):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(RewardError, match="did not answer within"):
        scores(as_reward(hangs, timeout=0.05))
    assert cancelled.wait(20)


def test_cancelling_the_ticket_cancels_the_task_of_an_async_reward():
    started, cancelled = threading.Event(), threading.Event()

    async def waits(chat, responses):
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    with as_reward(waits).submit(pairs()) as ticket:
        assert started.wait(20)
    assert cancelled.wait(20)
    with pytest.raises(CancelledError):
        ticket.future.result(timeout=20)


def test_cancelling_the_ticket_drops_a_queued_call():
    release, asked = threading.Event(), []

    def slow(chat, responses):
        asked.append(responses[0])
        release.wait(60)
        return [0.0]

    reward = as_reward(slow)
    tickets = [reward.submit([(CHAT, Response(str(index)))]) for index in range(6)]
    tickets[5].cancel()
    release.set()
    for ticket in tickets[:5]:
        ticket.future.result(timeout=20)
    scores(reward, [(CHAT, Response("last"))])
    assert "5" not in asked
    assert "last" in asked


def test_an_async_reward_that_cancels_itself_is_an_error_not_a_silence():
    async def gives_up(chat, responses):
        raise asyncio.CancelledError

    with pytest.raises(RewardError, match="was cancelled before it answered"):
        scores(as_reward(gives_up))


async def test_an_async_reward_runs_on_the_loop_of_its_caller():
    async def where(chat, responses):
        return [float(asyncio.get_running_loop() is loop)] * len(responses)

    loop = asyncio.get_running_loop()
    for fn in (where, lambda chat, responses: where(chat, responses)):
        ticket = as_reward(fn).submit(pairs(), loop=loop)
        assert (await asyncio.wrap_future(ticket.future)).tolist() == [1.0, 1.0, 1.0]


async def test_a_caller_that_gives_up_cancels_the_task_of_an_async_reward():
    cancelled = asyncio.Event()

    async def waits(chat, responses):
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    ticket = as_reward(waits).submit(pairs(), loop=asyncio.get_running_loop())
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.wrap_future(ticket.future), timeout=0.05)
    await asyncio.wait_for(cancelled.wait(), timeout=20)


def test_async_rewards_of_callers_without_a_loop_share_one_loop():
    loops = []

    async def where(chat, responses):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(responses)

    for _ in range(3):
        scores(as_reward(where))
    assert len(set(loops)) == 1


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_context_variables_follow_the_call(kind):
    variable = contextvars.ContextVar("request", default=0.0)
    variable.set(7.0)

    def sync(chat, responses):
        return [variable.get()] * len(responses)

    async def awaited(chat, responses):
        return [variable.get()] * len(responses)

    assert scores(as_reward(sync if kind == "sync" else awaited)).tolist() == [7.0, 7.0, 7.0]


def test_calls_for_several_conversations_run_at_the_same_time():
    together = threading.Barrier(2, timeout=20)

    def reward(chat, responses):
        together.wait()  # passes only when two calls are inside
        return [0.0] * len(responses)

    answer = scores(as_reward(reward), [(CHAT, Response("a")), ([{"role": "user", "content": "?"}], Response("b"))])
    assert answer.tolist() == [0.0, 0.0]


def test_many_requests_from_many_threads_are_all_answered():
    reward = as_reward(by_length)
    tickets = []

    def submit_some():
        for _ in range(25):
            tickets.append(reward.submit(pairs()))
            time.sleep(0)

    threads = [threading.Thread(target=submit_some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = wait([ticket.future for ticket in tickets], timeout=20).done
    assert len(done) == 100
    assert all(future.result().tolist() == [3.0, 9.0, 0.0] for future in done)


@pytest.mark.parametrize(
    ("fn", "told"),
    [
        (3, "got int"),
        (None, "got NoneType"),
        (lambda responses: [], "cannot take two positional arguments"),
        (lambda chat, responses, third: [], "cannot take two positional arguments"),
        (lambda chat, *, responses: [], "cannot take two positional arguments"),
        (Lengths, "pass an instance"),
    ],
)
def test_what_cannot_be_called_as_a_reward_is_refused_at_once(fn, told):
    with pytest.raises(TypeError, match=told):
        as_reward(fn)


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": -1.0}, {"sees": "tokens"}, {"fingerprint": ""}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        as_reward(by_length, **options)


def test_a_reward_stays_itself_and_takes_no_options():
    reward = as_reward(by_length)
    assert as_reward(reward) is reward
    with pytest.raises(ValueError, match="is a reward already"):
        as_reward(reward, timeout=3)


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (by_length, "by_length"),
        (functools.partial(by_length_plus, 1), "by_length_plus"),
        (Lengths(), "Lengths"),
        (Lengths().method, "method"),
    ],
)
def test_a_reward_has_the_name_of_its_function_unless_given(fn, name):
    assert as_reward(fn).name == name
    assert as_reward(fn, name="mine").name == "mine"


def test_a_reward_and_its_error_survive_pickling():
    reward = pickle.loads(pickle.dumps(as_reward(by_length, name="length", timeout=9)))
    assert isinstance(reward, CallableReward)
    assert (reward.name, reward.timeout) == ("length", 9)
    assert scores(reward).tolist() == [3.0, 9.0, 0.0]
    error = RewardError("length", "failed", "Do something.", "a response")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_worker_threads_do_not_hold_up_the_exit_of_the_interpreter():
    ours = {"aisp-reward", "aisp-async-rewards"}
    names = {thread.name: thread.daemon for thread in threading.enumerate() if thread.name in ours}
    scores(as_reward(by_length))
    scores(as_reward(by_length_async))
    names |= {thread.name: thread.daemon for thread in threading.enumerate() if thread.name in ours}
    assert set(names) == ours
    assert all(names.values())
