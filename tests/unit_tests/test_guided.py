"""A text written token by token as the reward leads it: what it says, what it costs, and what it is as a parent."""

from __future__ import annotations

from statistics import mean

import pytest
import torch

from langchain_aisp.align import Aligned, Budget, Check, align
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.methods import AISP, ARGS
from langchain_aisp.methods.branching import path_nodes
from langchain_aisp.methods.guided import Guided
from langchain_aisp.rewards import as_reward
from langchain_aisp.types import Sampling, Wave
from tests.toy import ToyEngine, outcome, play, problem, spells

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


def written(engine: ToyEngine, weight: float, sampling: Sampling = SAMPLING) -> Guided:
    """The toy word, written to its end."""
    text = Guided.begun(problem(engine, sampling), weight)
    while (wave := text.wave) is not None:
        rollouts = engine.decode(wave)
        text = text.told(rollouts, torch.tensor([spells(WORD)(each) for each in rollouts.responses]))
    return text


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0, 100.0])
def test_the_text_is_the_one_that_args_writes(weight):
    engine = toy()
    answer = outcome(play(ARGS(weight=weight), engine, spells(WORD), SAMPLING)).best
    assert written(engine, weight).tokens == answer.tokens
    assert (answer.response.text == WORD[:10]) == (weight == 100)


def test_as_long_as_it_is_under_way_there_is_no_text():
    engine = toy()
    text = Guided.begun(problem(engine, SAMPLING), 1.0)
    assert text.wave is not None
    assert text.tokens == ()
    state = AISP(**SMALL).init(problem(engine, SAMPLING))
    assert state.guided is None


def test_beside_the_parents_it_shows_what_the_model_would_have_said():
    engine, method = toy(), AISP(**SMALL)
    state = method.init(problem(engine, SAMPLING))
    wave = method.propose(state)
    state, _ = method.update(state, wave, engine.decode(wave), torch.arange(16.0))
    text = written(engine, 100.0)
    members = text.beside(state.population)
    assert len(members) == len(state.population) + 1
    said = Wave.saying(state.problem.prompt, [text.tokens], SAMPLING, {"alternatives"})
    observed = engine.decode(said).observed
    assert torch.equal(members.alternatives[-1], observed["alternatives"][said.said])
    torch.testing.assert_close(members.logprobs[-1], observed["alternative_logprobs"][said.said])
    assert torch.equal(members.nodes[-1:], path_nodes(torch.tensor([text.tokens]), state.problem.prompt.key))
    assert not set(members.keys[-1].tolist()) & set(wave.keys.flatten().tolist())


def test_it_is_the_first_row_of_the_second_wave_and_then_a_parent():
    engine, method, score = toy(), AISP(**SMALL), spells(WORD)
    state = method.init(problem(engine, SAMPLING))
    for number in range(2):
        while (looks := state.beginnings) is not None:
            looked = engine.decode(looks)
            state = state.credited(looked, torch.tensor([score(each) for each in looked.responses]))
        wave = method.propose(state)
        rollouts = engine.decode(wave)
        led = None if state.guided is None else state.guided.tokens
        state, _ = method.update(state, wave, rollouts, torch.tensor([score(each) for each in rollouts.responses]))
        assert len(wave) == 16  # it is one of the samples
        assert (state.guided is not None) == (number == 0)
    assert rollouts.responses[0].text == WORD
    assert tuple(wave.prefix[0, : wave.cut[0]].tolist()) == led == tuple(state.population.tokens[0].tolist())


def test_what_it_costs_is_counted():
    with_text, without = searched(AISP(**SMALL)), searched(AISP(**SMALL, guidance=0))
    first = [aligned.trace[1] for aligned in (with_text, without)]
    assert first[0].reward_calls > first[1].reward_calls
    assert with_text.samples == without.samples == 64
    looks = checks(AISP(**SMALL))
    decoded = [wave for wave in looks if bool((wave.cut < (wave.prefix >= 0).sum(dim=1)).any()) or not wave.forced]
    assert len(decoded) == 20  # the likeliest token, then its rivals, ten times
    assert sum(map(len, decoded)) == 90  # nine letters each, since the text must not end


def test_the_first_wave_is_the_same_with_it_and_without():
    found = [searched(AISP(**SMALL, guidance=each)) for each in (0.0, 32.0)]
    texts = [[each.response.text for each in aligned.candidates if each.iteration == 0] for aligned in found]
    assert sorted(texts[0]) == sorted(texts[1])


@pytest.mark.parametrize(
    ("changed", "sampling"),
    [
        ({"guidance": 0}, SAMPLING),
        ({"lookahead": 1}, SAMPLING),  # 100 reward calls, more than the looks at branches
        ({"samples": 8, "iterations": 8}, SAMPLING),  # one sample says nothing of how rewards are spread
        ({}, Sampling(max_tokens=60, min_tokens=10)),
        ({}, Sampling(max_tokens=10, min_tokens=10, temperature=0)),
    ],
)
def test_where_it_would_not_pay_none_is_written(changed, sampling):
    looks = checks(AISP(**{**SMALL, **changed}), sampling=sampling)
    assert all(wave.forced and bool(((wave.prefix >= 0).sum(dim=1) == wave.cut).all()) for wave in looks)


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
    sampling = Sampling(max_tokens=12)
    found = align(engine, reward, AISP(samples=32, iterations=4, control_kl=control_kl), chat, sampling=sampling)
    [led] = [each for each in found.candidates if (each.iteration, each.row) == (1, 0)]
    assert led.cut == len(led.tokens)
    spread = torch.tensor([each.reward for each in found.candidates if each.iteration == 0]).std()
    alone = align(engine, reward, ARGS(weight=32.0 / float(spread)), chat, sampling=sampling)
    assert led.tokens == alone.best.tokens
    assert found.best.reward >= led.reward == alone.best.reward
