"""The profiler: its parts sum to the wall time, it sees every part, and leaves everything as it was."""

import json
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from langchain_aisp import AISP, BestOfN, align, as_reward, profiling
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.engine import decode as decoding
from langchain_aisp.engine.graphs import StepGraphs
from langchain_aisp.profiling import OTHER, PARTS, TimedReward, Timeline, profile_request
from langchain_aisp.types import Response, Sampling, Ticket
from tests import tiny

CHAT = [{"role": "user", "content": "Say something."}]
METHOD = AISP(samples=8, iterations=2)
SAMPLING = Sampling(max_tokens=6, min_tokens=6)
REWARD = as_reward(lambda chat, responses: [len(set(text)) for text in responses], name="letters")


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(profiling, "time", clock)
    return clock


@pytest.fixture(scope="module")
def engine():
    with TransformersEngine(tiny.model(), tiny.tokenizer()) as engine:
        yield engine


def test_a_part_within_another_counts_for_itself_alone(clock: Clock) -> None:
    timeline = Timeline()
    timeline.start()
    clock.now += 1
    with timeline.part("decode"):
        clock.now += 2
        with timeline.part("head"):
            clock.now += 4
        clock.now += 8
    clock.now += 16
    seconds = timeline.stop()
    assert {part: seconds[part] for part in ("decode", "head", OTHER)} == {"decode": 10, "head": 4, OTHER: 17}
    assert sum(seconds.values()) == 31


def test_a_part_may_end_in_another_thread_and_after_a_later_one(clock: Clock) -> None:
    timeline = Timeline()
    timeline.start()
    reward = timeline.begin("reward")
    clock.now += 1
    decode = timeline.begin("decode")
    clock.now += 2
    thread = threading.Thread(target=timeline.end, args=(reward,))
    thread.start()
    thread.join()
    clock.now += 4
    timeline.end(decode)
    seconds = timeline.stop()
    assert (seconds["reward"], seconds["decode"], seconds[OTHER]) == (1, 6, 0)


def test_a_part_that_fails_is_over(clock: Clock) -> None:
    timeline = Timeline()
    timeline.start()
    with pytest.raises(KeyError), timeline.part("method"):
        raise KeyError
    clock.now += 1
    assert timeline.stop()[OTHER] == 1


def test_a_reward_lasts_until_its_scores_are_there(clock: Clock) -> None:
    timeline, future = Timeline(), Future()

    class Slow:
        name = fingerprint = "slow"

        def submit(self, pairs, *, loop=None):
            return Ticket(future)

    timed = TimedReward(Slow(), timeline)
    timeline.start()
    timed.submit([(CHAT, Response("yes"))])
    clock.now += 3
    future.set_result(torch.zeros(1))
    clock.now += 5
    assert (timed.name, timed.fingerprint) == ("slow", "slow")
    assert timeline.stop()["reward"] == 3


def test_the_parts_of_a_request_sum_to_its_wall_time_and_none_is_missed(engine) -> None:
    found = profile_request(engine, REWARD, METHOD, CHAT, sampling=SAMPLING, seed=1)
    assert list(found.seconds) == list(PARTS)
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.wall == pytest.approx(sum(found.seconds.values()))
    assert found.wall >= found.aligned.seconds
    assert sum(map(found.share, PARTS)) == pytest.approx(1)


def test_each_part_is_begun_as_often_as_it_happens(engine) -> None:
    found = profile_request(engine, REWARD, BestOfN(8, samples_per_wave=4), CHAT, sampling=SAMPLING, seed=2)
    once = {part: found.calls[part] for part in ("tokenising", "decode", "sampling", "reward", "method")}
    assert once == {"tokenising": 1, "decode": 12, "sampling": 12, "reward": 2, "method": 5}
    assert found.calls["head"] >= found.calls["decode"]


def test_a_profiled_request_gives_the_answer_of_any_other(engine) -> None:
    settings = {"sampling": SAMPLING, "seed": 3}
    expected = align(engine, REWARD, METHOD, CHAT, **settings)
    assert profile_request(engine, REWARD, METHOD, CHAT, **settings).aligned.candidates == expected.candidates


def test_steps_by_graphs_are_decoding_too(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = StepGraphs(engine.cache, engine._head, engine.head.width, lambda run: run)
    monkeypatch.setattr(engine, "_graphs", graphs)
    found = profile_request(engine, REWARD, BestOfN(4), CHAT, sampling=SAMPLING, seed=4)
    assert found.calls["decode"] == 6


def test_nothing_is_watched_any_more_after_the_request(engine) -> None:
    def state():
        head = engine.model.get_output_embeddings()
        hooks = {*head._forward_pre_hooks, *head._forward_hooks}
        return (
            decoding.draw,
            StepGraphs.step,
            hooks,
            set(vars(engine.cache)),
            set(vars(engine)),
            engine.tokenizer.batch_decode,
        )

    before = state()
    profile_request(engine, REWARD, METHOD, CHAT, sampling=SAMPLING)
    failing = as_reward(lambda chat, responses: [float("nan")] * len(responses), name="broken")
    with pytest.raises(Exception, match="broken"):
        profile_request(engine, failing, METHOD, CHAT, sampling=SAMPLING)
    assert state() == before


def test_a_trace_shows_the_parts_in_the_engine_s_own_thread(engine, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with profiling.tracing(path):
        profile_request(engine, REWARD, BestOfN(4), CHAT, sampling=Sampling(max_tokens=2))
    events = json.loads(path.read_text())["traceEvents"]
    threads = {event["name"]: event["tid"] for event in events if event.get("cat") == "user_annotation"}
    assert {"aisp: prefill", "aisp: decode", "aisp: head", "aisp: sampling", "aisp: method"} <= set(threads)
    assert threads["aisp: decode"] != threads["aisp: method"]
    assert {"aten::mm", "mkldnn::_linear_pointwise"} & {event["name"] for event in events}


def test_without_a_file_nothing_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_profiler", lambda: pytest.fail("traced"))
    with profiling.tracing(None):
        pass


def test_the_table_has_a_row_for_each_part_and_their_sum_below(engine) -> None:
    found = profile_request(engine, REWARD, METHOD, CHAT, sampling=SAMPLING)
    shown = profiling.table(found)
    parts, seconds = (list(shown.columns[at].cells) for at in (0, 1))
    assert parts == list(PARTS)
    assert sum(map(float, seconds)) == pytest.approx(float(shown.columns[1].footer), abs=0.005)


def test_warming_up_is_a_request_of_its_own(engine) -> None:
    scored = []
    counting = as_reward(lambda chat, responses: [scored.append(chat) or 0.0 for _ in responses], name="counting")
    profiling.warm_up(engine, counting)
    assert scored
    assert all(chat[0]["content"] != CHAT[0]["content"] for chat in scored)


def test_the_command_prints_the_table_and_writes_the_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from langchain_aisp import cli

    options = ["--samples", "8", "--iterations", "2", "--max-tokens", "4", "--trace", str(tmp_path / "trace.json")]
    monkeypatch.setattr("sys.argv", ["langchain-aisp", "profile", "My parcel is late.", *options])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    printed = capsys.readouterr().out
    assert all(part in printed for part in [*PARTS, "wall time"])
    assert (tmp_path / "trace.json").stat().st_size > 0
