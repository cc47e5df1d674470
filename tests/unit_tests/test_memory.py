"""Rows are planned from the free memory: as many as it holds, and the answers do not change."""

from __future__ import annotations

import pytest
import torch

from langchain_aisp.engine import TransformersEngine, memory, transformers
from langchain_aisp.engine.cache import Cache, ExpandedCache, NoCache
from langchain_aisp.engine.memory import working_bytes
from langchain_aisp.engine.slots import SlotCache, SlotStore
from langchain_aisp.methods.published import GaussianSteering
from langchain_aisp.types import Head, Wave
from tests import tiny
from tests.architectures import BY_TITLE, build

CHAT = [{"role": "user", "content": "Where is my parcel?"}]


@pytest.fixture
def engine() -> TransformersEngine:
    return TransformersEngine(tiny.model(), tiny.tokenizer())


def rows_of_steps(engine: TransformersEngine) -> list[int]:
    """A list that grows by the number of rows at every step from now on."""
    counts: list[int] = []
    step = engine.cache.step

    def counting(batch, padding):
        counts.append(sum(len(ids) for _, ids, _ in batch))
        return step(batch, padding)

    engine.cache.step = counting
    return counts


def leave(monkeypatch: pytest.MonkeyPatch, free: float | None) -> None:
    """Let the device have so many bytes left."""
    monkeypatch.setattr(transformers, "free_bytes", lambda device: None if free is None else int(free))


def room_for(engine: TransformersEngine, wave: Wave, rows: float) -> float:
    """Free bytes that hold the wave's prompt and so many of its rows."""
    prompt, row = engine._demand(wave)
    return (prompt + rows * row) / transformers._USABLE


@pytest.mark.parametrize(("rows", "most"), [(5.5, 5), (0.3, 1), (-7, 1), (100, 12), (None, 12)])
def test_as_many_rows_decode_at_once_as_the_memory_holds(engine, monkeypatch, rows, most) -> None:
    wave = tiny.wave(engine.encode(CHAT), 12, 10)
    expected = engine.submit(wave).future.result(timeout=60)
    leave(monkeypatch, None if rows is None else room_for(engine, wave, rows))
    counts = rows_of_steps(engine)
    rollouts = engine.submit(wave).future.result(timeout=60)
    assert max(counts) == most
    assert torch.equal(rollouts.tokens, expected.tokens)
    assert rollouts.responses == expected.responses


def test_a_wave_waits_until_what_decodes_has_left_memory_for_all_of_it(engine, monkeypatch) -> None:
    waves = [tiny.wave(engine.encode(CHAT, seed=seed), 4, 10, min_tokens=10) for seed in range(3)]
    expected = [engine.submit(wave).future.result(timeout=60).tokens for wave in waves]
    prompt, row = engine._demand(waves[0])
    leave(monkeypatch, (2 * prompt + 9 * row) / transformers._USABLE)
    counts = rows_of_steps(engine)
    with engine._wake:  # all of them wait before the engine looks
        tickets = [engine.submit(wave) for wave in waves]
    got = [ticket.future.result(timeout=60).tokens for ticket in tickets]
    assert counts == [8] * 10 + [4] * 10
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_longer_answers_and_more_to_observe_take_more(engine) -> None:
    prompt = engine.encode(CHAT)
    plain = engine._demand(tiny.wave(prompt, 4, 60))[1]
    assert engine._demand(tiny.wave(prompt, 4, 120))[1] > plain
    assert engine._demand(tiny.wave(prompt, 4, 5000))[1] < 4 * plain  # the context ends long before
    steering = GaussianSteering(torch.zeros(60, 32), 0.1)
    both = tiny.wave(prompt, 4, 60, steering=steering, observe=frozenset({"base_logprobs"}))
    head = Head(32, 1.0, 272)
    assert working_bytes(both, head, 4, 90) == 2 * 48 * 272 + 12 * 4 * 90 + 60 * 4


@pytest.mark.parametrize(
    ("title", "kind"),
    [("Llama", SlotCache), ("DeepSeek-V3", SlotCache), ("Gemma 4", SlotCache), ("Llama", ExpandedCache)],
)
@torch.inference_mode()
def test_a_row_takes_the_bytes_that_were_foretold(title: str, kind: type[Cache]) -> None:
    cache = kind(build(BY_TITLE[title]))
    prompt = [5, 6, 7, 8]
    zeros = torch.zeros(6, dtype=torch.int64)
    store = cache.open(cache.prefill(prompt), [()], zeros, zeros)
    for step in range(3):
        cache.step([(store, zeros + 3, zeros + 4 + step)], 0)
    if isinstance(store, SlotStore):
        held = sum(part.nbytes for pair in store.buffers.values() for part in pair)
        assert held == 6 * cache.row_bytes(4, 3)
    else:
        held = cache.size((7, store.cache))
        assert held == 6 * (cache.row_bytes(4, 3) - cache._first_token_bytes)


def test_a_recurrent_row_keeps_its_state_however_long_it_is() -> None:
    cache = ExpandedCache(build(BY_TITLE["Mamba"]), 1)
    assert cache.row_bytes(100, 100) == cache.row_bytes(0, 1) > 1000
    assert NoCache(build(BY_TITLE["Mamba"])).row_bytes(10, 5) == 120


def test_free_memory_is_what_machine_and_container_leave(monkeypatch, tmp_path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:   5000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path)
    cpu = torch.device("cpu")
    assert memory.free_bytes(cpu) == 5000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(cpu) == 5000 * 1024
    for name, content in (("max", "3000000\n"), ("current", "1000000\n"), ("stat", "anon 5\ninactive_file 200000\n")):
        (tmp_path / f"memory.{name}").write_text(content)
    assert memory.free_bytes(cpu) == 2_200_000
