"""A text written token by token as the reward leads it: what it says, what it costs, and what it is as a parent."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

import pytest
import torch

from langchain_aisp.align import Aligned, Budget, Check, Iteration, align
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.methods import AISP, ARGS
from langchain_aisp.methods.aisp import AISPState, draw_branches
from langchain_aisp.methods.branching import path_nodes
from langchain_aisp.methods.guided import Guided
from langchain_aisp.noise import wave_keys
from langchain_aisp.rewards import as_reward
from langchain_aisp.types import Problem, Sampling, Wave
from tests.toy import ALPHABET, CHAT, ToyEngine, counts, outcome, play, problem, spells

WORD = "badgebadge"
SAMPLING = Sampling(max_tokens=10, min_tokens=10)
SMALL = {"samples": 64, "iterations": 4}


def toy() -> ToyEngine:
    """Ten letters, all of which are shown as alternatives."""
    return ToyEngine(scale=0.3, alternatives=10)


def searched(method: AISP, *, partial: bool = True, sampling: Sampling = SAMPLING, **settings) -> Aligned:
    """What a search for a word found."""
    return outcome(play(method, toy(), spells(WORD), sampling, partial=partial, **settings))


def checks(method: AISP, **settings) -> list[Wave]:
    """What a search looks at between its waves."""
    played = play(method, toy(), spells(WORD), settings.pop("sampling", SAMPLING), partial=True, **settings)
    return [request.wave for request, _ in played if isinstance(request, Check)]


def unled(engine, weight: float, sampling: Sampling = SAMPLING) -> Guided:
    """A text that has not begun."""
    chat = Problem(engine.encode(CHAT, seed=0), sampling, engine.head)
    [keys] = wave_keys(chat.prompt.key, -1, torch.arange(1), sampling.max_tokens)
    return Guided(chat, weight, most=sampling.max_tokens, keys=keys)


def led(engine, score, guided: Guided, *, hold: bool = True) -> Guided:
    """A text, led to its end."""
    while (wave := guided.wave) is not None:
        rollouts = engine.submit(wave if hold else replace(wave, held=None)).future.result()
        guided = guided.told(rollouts, torch.tensor([score(each) for each in rollouts.responses]))
    return guided


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0, 100.0])
def test_the_text_is_the_one_that_args_writes(weight):
    engine = toy()
    answer = outcome(play(ARGS(weight=weight), engine, spells(WORD), SAMPLING)).best
    assert led(engine, spells(WORD), unled(engine, weight)).tokens == answer.tokens
    assert (answer.response.text == WORD[:10]) == (weight == 100)


def parents(engine: ToyEngine) -> tuple[AISPState, Wave]:
    """A search after its first wave, and that wave."""
    method = AISP(**SMALL)
    state = method.init(problem(engine, SAMPLING))
    wave = method.propose(state)
    state, _ = method.update(state, wave, engine.decode(wave), torch.arange(16.0))
    return state, wave


def test_beside_the_parents_it_shows_what_the_model_would_have_said():
    engine = toy()
    state, wave = parents(engine)
    text = led(engine, spells(WORD), unled(engine, 100.0))
    members = text.beside(state.population)
    assert len(members) == len(state.population) + 1
    said = Wave.saying(state.problem.prompt, [text.tokens], SAMPLING, {"alternatives"})
    observed = engine.decode(said).observed
    assert torch.equal(members.alternatives[-1], observed["alternatives"][said.said])
    torch.testing.assert_close(members.logprobs[-1], observed["alternative_logprobs"][said.said])
    assert torch.equal(members.nodes[-1:], path_nodes(torch.tensor([text.tokens]), state.problem.prompt.key))
    assert not set(members.keys[-1].tolist()) & set(wave.keys.flatten().tolist())


def test_the_first_is_an_iteration_of_its_own_and_the_others_are_rows_of_their_waves():
    engine, method, score = toy(), AISP(**SMALL, overlap=1), spells(WORD[::-1])
    state = method.init(problem(engine, SAMPLING))
    sizes = []
    while not state.exhausted:
        while (looks := state.beginnings) is not None:
            looked = engine.decode(looks)
            state = state.credited(looked, torch.tensor([score(each) for each in looked.responses]))
        wave, text = method.propose(state), state.led
        sizes.append(len(wave))
        rollouts = engine.decode(wave)
        after, _ = method.update(state, wave, rollouts, torch.tensor([score(each) for each in rollouts.responses]))
        assert (text is None) == (len(sizes) == 1)
        if text is not None:
            assert tuple(wave.prefix[0, : wave.cut[0]].tolist()) == text.tokens
            assert int(wave.cut[0]) == len(text.tokens)
            nodes = path_nodes(torch.tensor([text.tokens]), state.problem.prompt.key)[0]
            assert bool(torch.isin(nodes[max(text.begun - 1, 0) :], after.visited).all())
            others = wave.cut[1:]
            assert (len(others) == 0) == (text.begun == 0) == (len(sizes) == 2)
            begun = {tuple(row[:cut].tolist()) for row, cut in zip(wave.prefix[1:], others, strict=True)}
            assert text.tokens[: text.begun] not in begun  # the branch is not taken twice
            assert len(begun) == len(others)
        state = after
    assert sizes == [16, 1, 15, 16, 16]


@pytest.mark.parametrize("hold", [True, False], ids=["held", "read again"])
def test_what_the_engine_holds_changes_nothing(hold):
    engine = TransformersEngine.shared("demo")
    text = unled(engine, 1.0, Sampling(max_tokens=80))
    text = led(engine, counts("e"), text, hold=hold)
    said = Wave.saying(text.problem.prompt, [text.tokens], text.problem.sampling, {"alternatives"})
    observed = engine.submit(said).future.result().observed
    assert torch.equal(torch.stack(text.alternatives), observed["alternatives"][said.said])
    assert len(text.tokens) > 8


def test_it_goes_on_from_a_branch_as_far_as_it_may():
    engine = toy()
    state, _ = parents(engine)
    branch = draw_branches(state, 5).take(slice(1, 2))
    parent, place = int(branch.parents), int(branch.positions)
    begun = replace(unled(engine, 100.0), most=3).after(state.population, branch, ended=False)
    text = led(engine, spells(WORD), begun)
    assert text.tokens[:place] == tuple(state.population.tokens[parent, :place].tolist())
    assert text.tokens[place] == int(branch.tokens)
    assert text.tokens[place + 1 :] == tuple(ALPHABET.index(letter) + 1 for letter in WORD[place + 1 : place + 4])
    assert text.finished
    assert text.keys[:place].tolist() == state.population.keys[parent, :place].tolist()
    whole = begun.after(state.population, branch, ended=True)
    assert whole.finished
    assert whole.wave is None
    sources = text.beside(state.population)
    own = text.branch(sources)
    assert int(own.parents) == len(state.population)
    assert (int(own.positions), int(own.tokens)) == (len(text.tokens) - 1, text.tokens[-1])


def test_as_long_as_it_is_under_way_others_go_on_without_it():
    engine = toy()
    state, _ = parents(engine)
    assert state.guided is not None
    begun = state.credited(engine.decode(state.beginnings), torch.zeros(0))
    begun = begun.credited(engine.decode(begun.beginnings), torch.arange(9.0))
    assert len(begun.guided.tokens) == 1
    assert begun.led is None
    method = AISP(**SMALL, overlap=1)
    wave = method.propose(begun)
    assert torch.equal(wave.prefix, method.propose(state).prefix)
    assert method.update(begun, wave, engine.decode(wave), torch.arange(16.0))[0].guided is None


def test_what_it_costs_is_counted_and_bounded():
    played = list(play(AISP(**SMALL), toy(), spells(WORD[::-1]), SAMPLING, partial=True))
    looks = [request.wave for request, _ in played if isinstance(request, Check)]
    asking = [number for number, wave in enumerate(looks) if not wave.forced]
    assert all(len(looks[number]) == 1 for number in asking)
    assert all(0 < len(looks[number + 1]) <= 9 for number in asking)  # letters: a text must not end
    assert 10 < len(asking) <= 10 + 3 * (8 * 16 // 10)  # after the first wave, then as far as looks at branches cost
    decoded = sum(answer.sampled_tokens for request, answer in played if isinstance(request, Wave | Check))
    *_, (last, _), (aligned, _) = played
    assert isinstance(last, Iteration)
    assert last.sampled_tokens == decoded
    assert aligned.samples == 64


def test_the_first_wave_is_the_same_with_it_and_without():
    found = [searched(AISP(**SMALL, guidance=each)) for each in (0.0, 32.0)]
    texts = [[each.response.text for each in aligned.candidates if each.iteration == 0] for aligned in found]
    assert sorted(texts[0]) == sorted(texts[1])


@pytest.mark.parametrize(
    ("changed", "sampling"),
    [
        ({"guidance": 0}, SAMPLING),
        ({"lookahead": 0}, SAMPLING),  # so many reward calls per wave may leading take
        ({"samples": 8, "iterations": 8}, SAMPLING),  # one sample says nothing of how rewards are spread
        ({}, Sampling(max_tokens=10, min_tokens=10, temperature=0)),
    ],
)
def test_where_it_would_not_pay_none_is_written(changed, sampling):
    looks = checks(AISP(**{**SMALL, **changed}), sampling=sampling)
    assert all(wave.forced and bool(((wave.prefix >= 0).sum(dim=1) == wave.cut).all()) for wave in looks)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_tree_is_led_until_nothing_is_left_of_it(length):
    """Two letters: there are soon fewer branches than are wanted, then one, then none."""
    engine, sampling = ToyEngine(letters=2, alternatives=3), Sampling(max_tokens=length)
    method = AISP(samples=64, iterations=8)
    found = outcome(play(method, engine, counts("b"), sampling, partial=True))
    assert found.samples == 64
    assert found.best.response.text == "b" * max(1, length - 1)  # complete ones come first, if there are any


def test_equal_rewards_lead_nowhere():
    played = play(AISP(**SMALL), toy(), lambda response: 1.0, SAMPLING, partial=True)
    looks = [request.wave for request, _ in played if isinstance(request, Check)]
    assert looks
    assert all(wave.forced for wave in looks)


def test_without_a_reward_of_unfinished_texts_nothing_changes():
    found = [searched(AISP(**SMALL, guidance=each), partial=False) for each in (0.0, 32.0)]
    texts = [[(each.response.text, each.iteration) for each in aligned.candidates] for aligned in found]
    assert texts[0] == texts[1]


def test_the_scale_of_the_reward_does_not_matter():
    rewards = [spells(WORD), lambda response: 1024 * spells(WORD)(response)]
    found = [outcome(play(AISP(**SMALL), toy(), reward, SAMPLING, partial=True)) for reward in rewards]
    texts = [[each.response.text for each in aligned.candidates] for aligned in found]
    assert texts[0] == texts[1]


def test_when_time_is_up_nothing_more_is_asked():
    now = iter(range(10_000))
    budget = Budget(seconds=40)
    played = play(AISP(**SMALL), toy(), spells(WORD), SAMPLING, partial=True, budget=budget, clock=lambda: next(now))
    requests = [request for request, _ in played]
    aligned = requests[-1]
    assert aligned.stopped == "seconds"
    assert 0 < sum(isinstance(request, Check) for request in requests) < 20
    assert aligned.best.reward == max(candidate.reward for candidate in aligned.candidates)


def test_a_search_that_is_led_finds_better_answers():
    """Over 16 seeds, the same for both: letters of a word of which each plain sample has one or two by chance."""
    found = {
        guidance: mean(
            searched(AISP(samples=64, iterations=4, guidance=guidance), seed=seed).best.reward for seed in range(16)
        )
        for guidance in (0.0, 32.0)
    }
    assert found[32.0] == len(WORD) > found[0.0] + 0.5


@pytest.mark.parametrize("control_kl", [0.0, 0.2])
def test_a_real_model_is_led_too(control_kl):
    """More letters ``e``: the text is the one that ARGS writes, and its end needs no decoding."""
    engine = TransformersEngine.shared("demo")
    reward = as_reward(lambda chat, texts: [float(text.count("e")) for text in texts], partial=True)
    chat = [{"role": "user", "content": "Hello, my parcel is late."}]
    sampling = Sampling(max_tokens=12)  # no longer than it may be led
    found = align(engine, reward, AISP(samples=64, iterations=4, control_kl=control_kl), chat, sampling=sampling)
    [first] = [each for each in found.candidates if each.iteration == 1]
    assert first.cut == len(first.tokens)
    spread = torch.tensor([each.reward for each in found.candidates if each.iteration == 0]).std()
    alone = align(engine, reward, ARGS(weight=32.0 / float(spread)), chat, sampling=sampling)
    assert first.tokens == alone.best.tokens
    assert first.reward == alone.best.reward
