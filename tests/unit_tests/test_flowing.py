"""Rows that take the places of others: a wave that has enough comes back, and the rest goes on as if it had not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from langchain_aisp.align import Budget, align
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.engine.cache import ExpandedCache, NoCache
from langchain_aisp.engine.decode import Rows
from langchain_aisp.methods import AISP, BestOfN
from langchain_aisp.rewards import as_reward
from langchain_aisp.types import Response, Rollouts, Sampling, Wave
from tests import tiny
from tests.architectures import BY_TITLE, build
from tests.toy import ToyEngine, ToyReward, counts, outcome, play, spells
from tests.toy import waves_of as toy_waves

CHAT = [{"role": "user", "content": "Where is my parcel?"}]
LENGTH = 90  # longer than a block of columns
STOP = tuple("aeiou0123")  # random weights seldom end by themselves


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(tiny.model(), tiny.tokenizer())


def decode(engine: TransformersEngine, wave: Wave) -> Rollouts:
    return engine.submit(wave).future.result(timeout=60)


def waves_of(engine: TransformersEngine, count: int, rows: int = 8) -> list[Wave]:
    """A wave from scratch, and waves that keep beginnings of its rows."""
    first = tiny.wave(engine.encode(CHAT, seed=3), rows, LENGTH, temperature=1.5, stop=STOP)
    parents = decode(engine, first)
    waves = [first]
    for number in range(1, count):
        fresh = tiny.wave(first.prompt, rows, LENGTH, iteration=number, temperature=0.8, stop=STOP)
        order = torch.arange(rows).roll(number)
        cut = (parents.lengths[order] * number) // (count + 1)
        kept = torch.arange(LENGTH) < cut[:, None]
        keys = torch.where(kept, first.keys[order], fresh.keys)
        waves.append(replace(fresh, prefix=parents.tokens[order], cut=cut, keys=keys))
    return waves


def in_places(engine: TransformersEngine, waves: list[Wave], enough: int, *, hold: bool = True) -> list[list[int]]:
    """What the rows of all waves say, in order; those of the later waves take the places of rows that have ended."""
    places = len(waves[0])
    parts = ("prefix", "cut", "keys")
    rows = {name: torch.cat([getattr(wave, name) for wave in waves]) for name in parts}
    rows["temperatures"] = torch.cat([torch.full((len(wave),), wave.sampling.temperature) for wave in waves])
    said: list[list[int]] = [[] for _ in range(len(rows["cut"]))]
    flying, following, held = torch.arange(places), places, None
    while len(flying):
        now = {name: value[flying] for name, value in rows.items()}
        wanted = enough if following < len(said) else None
        rollouts = decode(engine, replace(waves[0], **now, enough=wanted, held=held if hold else None))
        assert len(rollouts.responses) == len(rollouts.ended) >= (wanted or len(flying))
        for row in rollouts.ended.tolist():
            said[int(flying[row])] = rollouts.tokens[row, : rollouts.lengths[row]].tolist()
        left = torch.tensor([], dtype=torch.int64)
        if rollouts.unfinished is not None:
            left = flying[rollouts.unfinished]
            rows["prefix"][left] = rollouts.tokens[rollouts.unfinished]
            rows["cut"][left] = rollouts.lengths[rollouts.unfinished]
        new = min(places - len(left), len(said) - following)
        flying, held = torch.cat([left, torch.arange(following, following + new)]), rollouts.held
        following += new
    return said


def one_by_one(engine: TransformersEngine, waves: list[Wave]) -> list[list[int]]:
    found = [decode(engine, wave) for wave in waves]
    return [row[:n] for each in found for row, n in zip(each.tokens.tolist(), each.lengths.tolist(), strict=True)]


@pytest.mark.parametrize("enough", [1, 3, 8])
@pytest.mark.parametrize("hold", [True, False], ids=["held", "read again"])
def test_rows_in_the_places_of_others_say_what_they_say_by_themselves(engine, enough, hold):
    waves = waves_of(engine, 5)
    alone = one_by_one(engine, waves)
    assert len(set(map(len, alone))) > 10
    assert in_places(engine, waves, enough, hold=hold) == alone


@pytest.mark.parametrize("kind", [ExpandedCache, NoCache])
def test_other_caches_read_again_what_goes_on(engine, kind):
    plain = TransformersEngine(tiny.model(), tiny.tokenizer())
    plain.cache = kind(plain.model)
    waves = waves_of(engine, 3)
    assert decode(plain, replace(waves[0], enough=2)).held is None
    assert in_places(plain, waves, 3) == one_by_one(engine, waves)


@pytest.mark.parametrize("title", ["Mistral", "Gemma 2", "gpt-oss"])
def test_windows_caps_and_sinks_stay_right(title):
    engine = TransformersEngine(build(BY_TITLE[title]), tiny.tokenizer())
    assert engine.cache.name == "slots"
    prompt = engine.encode([{"role": "user", "content": "Hi"}], seed=3)
    waves = [tiny.wave(prompt, 6, 30, iteration=number, temperature=3.0, stop=STOP) for number in range(4)]
    alone = one_by_one(engine, waves)
    assert len(set(map(len, alone))) > 3
    assert in_places(engine, waves, 2) == alone


def test_what_goes_on_and_what_was_said_lately_is_not_read_again():
    fresh = TransformersEngine(tiny.model(), tiny.tokenizer())
    first, second = waves_of(fresh, 1)[0], tiny.wave(fresh.encode(CHAT, seed=3), 8, LENGTH, iteration=1, stop=STOP)
    shapes: list[tuple[int, int]] = []
    fresh.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    rollouts = decode(fresh, replace(first, enough=4))
    left, ended = rollouts.unfinished.nonzero().squeeze(1), rollouts.ended
    children = replace(  # of the rows that have ended, in their places
        first,
        prefix=torch.cat([rollouts.tokens[left], rollouts.tokens[ended]]),
        cut=torch.cat([rollouts.lengths[left], rollouts.lengths[ended] // 2]),
        keys=torch.cat([first.keys[left], second.keys[: len(ended)]]),
    )
    flowing = decode(fresh, replace(children, held=rollouts.held))
    assert {width for _, width in shapes} == {1}  # the prompt was read by the first wave of all
    assert torch.equal(flowing.tokens, decode(fresh, children).tokens)
    assert max(width for _, width in shapes) > 1


def test_more_rows_than_before_find_places(engine):
    first, second = waves_of(engine, 2)
    rollouts = decode(engine, replace(first, enough=2))
    left = rollouts.unfinished.nonzero().squeeze(1)
    more = replace(
        first,
        prefix=torch.cat([rollouts.tokens[left], second.prefix]),
        cut=torch.cat([rollouts.lengths[left], second.cut]),
        keys=torch.cat([first.keys[left], second.keys]),
        temperatures=torch.cat([torch.full((len(left),), 1.5), torch.full((len(second),), 0.8)]),
        held=rollouts.held,
    )
    assert len(more) > len(first)
    tokens = decode(engine, more).tokens
    assert torch.equal(tokens[: len(left)], decode(engine, first).tokens[left])
    assert torch.equal(tokens[len(left) :], decode(engine, second).tokens)


def test_columns_that_no_row_needs_are_cut_off(engine):
    """Many short rows one after the other: the steps are far more than the longest of them needs columns."""
    prompt = engine.encode(CHAT, seed=3)
    waves = [tiny.wave(prompt, 8, 12, iteration=number, stop=STOP) for number in range(12)]
    rollouts, columns = decode(engine, replace(waves[0], enough=1)), []
    flying = replace(waves[0], prefix=rollouts.tokens, cut=rollouts.lengths)
    for wave in waves[1:]:
        assert rollouts.unfinished is not None
        columns.append(rollouts.held._store.column)
        left, new = rollouts.unfinished.nonzero().squeeze(1), len(rollouts.responses)
        parts = {
            name: torch.cat([getattr(flying, name)[left], getattr(wave, name)[:new]])
            for name in ("prefix", "cut", "keys")
        }
        flying = replace(wave, **parts, enough=1, held=rollouts.held)
        rollouts = decode(engine, flying)
        flying = replace(flying, prefix=rollouts.tokens, cut=rollouts.lengths)
    assert 12 < max(columns) < 12 + 16 + 1


def test_each_row_has_its_own_temperature(engine):
    wave = tiny.wave(engine.encode(CHAT), 4, 16)
    cold, warm = (decode(engine, replace(wave, sampling=replace(wave.sampling, temperature=t))) for t in (0.0, 1.0))
    mixed = decode(engine, replace(wave, temperatures=torch.tensor([0.0, 1.0, 0.0, 1.0])))
    assert torch.equal(mixed.tokens[[0, 2]], cold.tokens[[0, 2]])
    assert torch.equal(mixed.tokens[[1, 3]], warm.tokens[[1, 3]])


def test_what_is_held_serves_once(engine):
    waves = waves_of(engine, 2)
    rollouts = decode(engine, replace(waves[0], enough=2))
    left = rollouts.unfinished
    on = replace(waves[0], prefix=rollouts.tokens[left], cut=rollouts.lengths[left], keys=waves[0].keys[left])
    once, twice = (decode(engine, replace(on, held=rollouts.held)) for _ in range(2))
    assert torch.equal(once.tokens, twice.tokens)
    assert torch.equal(once.tokens, decode(engine, waves[0]).tokens[left])


def test_memory_that_runs_out_on_the_way_changes_nothing(engine):
    fresh = TransformersEngine(tiny.model(), tiny.tokenizer())
    waves, calls, step = waves_of(engine, 3), [0], fresh.cache.step

    def failing(*args, **options):
        calls[0] += 1
        if calls[0] == 40:
            raise torch.OutOfMemoryError("no more")
        return step(*args, **options)

    fresh.cache.step = failing
    with pytest.warns(ResourceWarning, match="out of memory"):
        found = in_places(fresh, waves, 8)
    assert found == one_by_one(engine, waves)


# -- the search -------------------------------------------------------------------------------------------------------

SAMPLING = Sampling(max_tokens=8)
SIZES = [(64, 4, 2, 0.25), (50, 7, 3, 0.5), (33, 4, 2, 0.0), (24, 24, 2, 0.25), (40, 1, 2, 0.25), (64, 4, 1, 0.25)]


@pytest.mark.parametrize(("samples", "iterations", "overlap", "refill"), SIZES)
def test_all_samples_come_in_at_most_so_many_iterations(samples, iterations, overlap, refill):
    method = AISP(samples, iterations, overlap=overlap, refill=refill)
    found = outcome(play(method, ToyEngine(), spells("badge"), SAMPLING))
    assert found.samples == len(found.candidates) == samples
    assert found.stopped == "iterations"
    assert 1 <= len(found.trace) <= iterations
    assert [now.samples for now in found.trace] == sorted({now.samples for now in found.trace})
    assert len({(each.iteration, each.row) for each in found.candidates}) == samples


@pytest.mark.parametrize("seed", range(5))
def test_the_first_rows_are_those_of_best_of_n(seed):
    """However late they end: so the answer is never worse than theirs."""
    flowing = outcome(play(AISP(64, 4), ToyEngine(), spells("badge"), SAMPLING, seed=seed))
    plain = outcome(play(BestOfN(16), ToyEngine(), spells("badge"), SAMPLING, seed=seed))
    assert {each.tokens for each in plain.candidates} <= {each.tokens for each in flowing.candidates}
    assert flowing.best.reward >= plain.best.reward


def test_no_branch_is_drawn_twice_while_others_are_decoded():
    seen: list[tuple[int, ...]] = []
    for wave, _ in toy_waves(AISP(96, 6)):
        rows = zip(wave.prefix[wave.resumed :], wave.cut[wave.resumed :], strict=True)
        seen += [tuple(row[:cut].tolist()) for row, cut in rows]
    begun = [beginning for beginning in seen if beginning]
    assert len(begun) == len(set(begun)) > 50


def test_rows_go_on_at_their_own_temperature():
    """Plain samples at the request's, branches at the cooled one, side by side."""
    mixed = [wave for wave, _ in toy_waves(AISP(96, 6)) if wave.temperatures is not None]
    assert {1.0, 0.25} == {value for wave in mixed for value in wave.temperatures.tolist()}
    assert any(len(set(wave.temperatures.tolist())) == 2 for wave in mixed)


def test_an_overlap_of_one_waits_for_whole_waves():
    whole = toy_waves(AISP(96, 6, overlap=1, crossings=0))
    assert [len(wave) for wave, _ in whole] == [16] * 6
    assert all(rollouts.unfinished is None for _, rollouts in whole)


@pytest.mark.parametrize("overlap", [2, 3])
def test_so_many_iterations_decode_at_once(overlap):
    sizes = [len(wave) for wave, _ in toy_waves(AISP(96, 6, overlap=overlap))]
    assert sizes[0] == 16
    assert max(sizes) == 16 * overlap


@pytest.mark.parametrize("how", ["partial", "waits"])
def test_rewards_that_are_asked_once_per_wave_get_whole_waves(how):
    engine = ToyEngine()
    reward = as_reward(lambda chat, texts: [float(len(text)) for text in texts], **{how: True})
    align(engine, reward, AISP(32, 4, guidance=0, crossings=0), CHAT, sampling=SAMPLING)
    decoded = [wave for wave in engine.waves if not wave.forced]
    assert len(decoded) == 4
    assert all(wave.enough is None for wave in decoded)


def test_a_control_needs_whole_waves():
    assert all(wave.enough is None for wave, _ in toy_waves(AISP(32, 4, control_kl=0.1)))


@pytest.mark.parametrize("most", [1, 5, 17, 40])
def test_a_budget_of_samples_is_met_exactly(most):
    found = outcome(play(AISP(64, 4), ToyEngine(), spells("badge"), SAMPLING, budget=Budget(samples=most)))
    assert found.samples == len(found.candidates) == most
    assert found.stopped == "samples"


def test_patience_counts_iterations_not_refills():
    flat = outcome(play(AISP(64, 8), ToyEngine(), lambda response: 0.0, SAMPLING, budget=Budget(patience=2)))
    assert flat.stopped == "patience"
    assert len(flat.trace) == 3
    assert flat.samples >= 24


def test_a_search_ends_when_time_is_up_though_its_iteration_goes_on():
    ticks = iter(range(10_000))
    engine = ToyEngine(clock=lambda: 0.0)
    steps = play(AISP(64, 4), engine, counts("a"), SAMPLING, budget=Budget(seconds=9), clock=lambda: float(next(ticks)))
    found = outcome(steps)
    assert found.stopped == "seconds"
    assert found.samples < 64


def test_argmax_decoding_begins_with_its_one_response():
    found = outcome(play(AISP(30, 4), ToyEngine(), spells("badge"), Sampling(max_tokens=8, temperature=0)))
    assert found.samples == 30
    assert found.trace[0].samples == 1


def test_a_search_gives_the_same_answers_alone_and_beside_others(engine):
    method, reward = AISP(48, 4), ToyReward(lambda response: float(response.text.count("e") - len(response.text) / 50))

    def answers(seed: int) -> list[tuple[int, ...]]:
        sampling = Sampling(max_tokens=24)
        chat = [{"role": "user", "content": "word " * (3 + seed)}]
        found = align(engine, reward, method, chat, sampling=sampling, seed=seed)
        return [candidate.tokens for candidate in found.candidates]

    alone = [answers(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as callers:
        assert list(callers.map(answers, range(4))) == alone


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r"refill must be between 0 and 1, got 1\.5"):
        AISP(refill=1.5)
    with pytest.raises(ValueError, match="overlap must be at least 1, got 0; 1 decodes whole waves"):
        AISP(overlap=0)


# A token at a time, and what is given


@pytest.mark.parametrize("hold", [True, False], ids=["held", "read again"])
def test_a_wave_that_wants_no_row_comes_back_after_a_token_which_others_may_replace(engine, hold):
    """A text of tokens that the model did not choose is read a token at a time, and shows what it would have said."""
    prompt = engine.encode(CHAT, seed=3)
    asking = replace(tiny.wave(prompt, 4, LENGTH), observe=frozenset(("alternatives",)), enough=0)
    chosen = torch.randint(5, 100, (4, 12), generator=torch.Generator().manual_seed(0))
    shown, held = [], None
    for place in range(chosen.shape[1]):
        prefix = torch.zeros(4, LENGTH, dtype=torch.int64)
        prefix[:, :place] = chosen[:, :place]
        wave = replace(asking, prefix=prefix, cut=torch.full((4,), place), held=held if hold else None)
        rollouts = decode(engine, wave)
        assert rollouts.responses == ()
        assert rollouts.sampled_tokens == 4
        shown.append(rollouts.observed["alternatives"][:, place])
        held = rollouts.held
    given = replace(asking, prefix=chosen, keys=asking.keys[:, :12], cut=torch.zeros(4, dtype=torch.int64), forced=True)
    whole = decode(engine, replace(given, enough=None, sampling=replace(given.sampling, max_tokens=12)))
    assert torch.equal(torch.stack(shown, dim=1), whole.observed["alternatives"])


def test_what_is_given_is_said_at_once_as_it_is_token_by_token(engine, monkeypatch):
    prompt, end = engine.encode(CHAT, seed=3), int(engine._vocabulary.ends.nonzero()[0])
    given = torch.randint(5, 100, (6, 20), generator=torch.Generator().manual_seed(1))
    given[1, 7] = given[2, 3] = given[3, 19] = end
    given[4, 9:] = -1
    cut = torch.tensor([0, 2, 4, 5, 9, 20])  # the third row has said its end already, the last two have no more to say
    wave = replace(tiny.wave(prompt, 6, 20), prefix=given, cut=cut, forced=True)
    steps: list[object] = []
    hook = engine.model.register_forward_pre_hook(lambda *_: steps.append(None))
    at_once = decode(engine, wave)
    assert not steps
    monkeypatch.setattr(Rows, "_say_script", lambda self, script: None)
    by_steps = decode(engine, wave)
    hook.remove()
    assert steps
    assert torch.equal(at_once.tokens, by_steps.tokens)
    assert torch.equal(at_once.lengths, by_steps.lengths)
    assert at_once.responses == by_steps.responses
    assert at_once.sampled_tokens == by_steps.sampled_tokens
    assert [each.finish_reason for each in at_once.responses] == ["length", "stop", "stop", "stop", "length", "length"]


def test_a_stop_string_in_what_was_kept_ends_a_row(engine):
    prompt = engine.encode(CHAT, seed=2)
    free = decode(engine, tiny.wave(prompt, 8, 12, min_tokens=12))
    row, letter = next((n, each.text[5]) for n, each in enumerate(free.responses) if each.text[5] not in each.text[:5])
    kept = next(n for n in range(12) if letter in engine._vocabulary.decode([free.tokens[row, :n].tolist()])[0])
    child = replace(
        tiny.wave(prompt, 1, 12, stop=(letter,)), prefix=free.tokens[row : row + 1], cut=torch.tensor([kept])
    )
    found = decode(engine, child)
    assert found.sampled_tokens == 0
    assert found.responses[0] == Response(free.responses[row].text.split(letter)[0], "stop")
