"""The arithmetic of weights, Best-of-N and the published form; what all methods promise is in methods/."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from langchain_aisp.methods import published
from langchain_aisp.methods.best_of_n import BestOfN
from langchain_aisp.methods.greedy import Greedy
from langchain_aisp.methods.published import GaussianSteering, PublishedAISP
from langchain_aisp.methods.weights import (
    complete_first,
    effective_sample_size,
    importance_weights,
    temperature_for_ess,
)
from langchain_aisp.noise import fold, normal, wave_keys
from langchain_aisp.types import Head, Problem, Prompt, Response, Rollouts, Sampling, Wave
from tests.toy import END, ToyEngine, outcome, play, problem, spells, waves_of

SAMPLING = Sampling(max_tokens=10)

# Weights


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30), st.floats(0.01, 100))
@settings(max_examples=60, deadline=None)
def test_weights_follow_the_closed_form_and_sum_to_one(rewards: list[float], temperature: float) -> None:
    weights = importance_weights(torch.tensor(rewards), temperature)
    exact = [math.exp((reward - max(rewards)) / temperature) for reward in rewards]
    assert weights.tolist() == pytest.approx([value / sum(exact) for value in exact], rel=1e-5, abs=1e-7)
    assert float(weights.double().sum()) == pytest.approx(1, abs=1e-5)
    assert 1 - 1e-5 <= effective_sample_size(weights) <= len(rewards) * (1 + 1e-5)


def test_weights_do_not_change_when_a_constant_is_added() -> None:
    rewards = torch.tensor([0.25, 1.5, -2.0, 0.0])
    for shift in (4096.0, -4096.0):
        assert torch.equal(importance_weights(rewards + shift, 0.3), importance_weights(rewards, 0.3))


def test_a_small_reward_temperature_takes_the_best_and_a_large_one_everything() -> None:
    rewards = torch.tensor([0.0, 3.0, 1.0, 2.9])
    assert importance_weights(rewards, 1e-6).tolist() == [0, 1, 0, 0]
    assert importance_weights(rewards, 1e9).tolist() == pytest.approx([0.25] * 4)


def test_costs_are_subtracted_in_nats() -> None:
    rewards, cost = torch.tensor([1.0, 1.0]), torch.tensor([0.0, math.log(3.0)])
    assert importance_weights(rewards, 2.0, cost).tolist() == pytest.approx([0.75, 0.25])


def test_the_effective_sample_size_counts_equal_weights() -> None:
    assert effective_sample_size(torch.tensor([0.25] * 4 + [0.0] * 9)) == pytest.approx(4)
    assert effective_sample_size(torch.tensor([0.0, 1.0])) == 1


@pytest.mark.parametrize("target", [1.5, 2.0, 7.3, 19.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
def test_the_temperature_for_an_effective_sample_size_reaches_it_on_any_scale(target: float, scale: float) -> None:
    rewards = scale * normal(fold(1, torch.tensor(0)), 20)
    weights = importance_weights(rewards, temperature_for_ess(rewards, target))
    assert effective_sample_size(weights) == pytest.approx(target, rel=1e-4)


def test_the_temperature_of_equal_rewards_is_one() -> None:
    assert temperature_for_ess(torch.full((5,), 3.0), 2.0) == 1.0
    assert temperature_for_ess(torch.tensor([3.0]), 1.0) == 1.0
    assert temperature_for_ess(torch.tensor([3.0, -torch.inf]), 1.0) == 1.0


def test_a_target_out_of_reach_gives_the_nearest_effective_sample_size() -> None:
    tied = torch.tensor([2.0, 2.0, 2.0, 1.0, 0.0, -torch.inf])
    fewest = importance_weights(tied, temperature_for_ess(tied, 1.0))
    most = importance_weights(tied, temperature_for_ess(tied, 100.0))
    assert fewest.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 0, 0])
    assert most.tolist() == pytest.approx([1 / 5] * 5 + [0])


def test_an_outlier_does_not_hide_the_differences_among_the_rest() -> None:
    rewards = torch.tensor([-1e4, 0.0, 0.5, 1.0])
    assert effective_sample_size(importance_weights(rewards, temperature_for_ess(rewards, 2.0))) == pytest.approx(2)


def test_no_rows_are_worth_none() -> None:
    assert effective_sample_size(torch.empty(0)) == 0


def test_an_effective_sample_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        temperature_for_ess(torch.tensor([1.0, 2.0]), 0.5)


def test_cut_off_rows_count_only_when_there_is_nothing_else() -> None:
    rewards = torch.tensor([1.0, 5.0, 2.0])
    assert complete_first(rewards, torch.tensor([True, False, True])).tolist() == [1.0, -math.inf, 2.0]
    assert torch.equal(complete_first(rewards, torch.zeros(3, dtype=torch.bool)), rewards)


# Best-of-N


def test_the_first_samples_of_a_larger_best_of_n_are_a_smaller_one_whatever_the_waves() -> None:
    def tokens(method: BestOfN) -> list[list[int]]:
        return [row for _, rollouts in waves_of(method) for row in rollouts.tokens.tolist()]

    large = tokens(BestOfN(64, samples_per_wave=32))
    assert large[:32] == tokens(BestOfN(32)) == tokens(BestOfN(32, samples_per_wave=5))
    assert len(large) == 64


def test_best_of_n_takes_its_own_sampling_or_the_requests() -> None:
    asked = Sampling(max_tokens=5, temperature=0.9, top_p=0.8, top_k=7)
    start = problem(ToyEngine(), asked)

    def used(method: BestOfN) -> Sampling:
        return method.propose(method.init(start)).sampling

    assert used(BestOfN()) == asked
    assert used(BestOfN(temperature=0.0)) == replace(asked, temperature=0.0)
    assert used(BestOfN(temperature=0.7, top_p=1.0)) == replace(asked, temperature=0.7, top_p=1.0)


def test_best_of_n_draws_from_the_models_own_distribution() -> None:
    engine, first_tokens = ToyEngine(), []
    for wave, rollouts in waves_of(BestOfN(samples=4000, samples_per_wave=500)):
        assert wave.steering is None
        first_tokens += rollouts.tokens[:, 0].tolist()
    start = torch.zeros(1, 10, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    logits = engine.logits(engine.prelogits(wave.prompt, *start), start[1], SAMPLING)
    expected = logits.softmax(dim=-1).squeeze(0)
    deviation = torch.tensor(first_tokens).bincount(minlength=10) / 4000 - expected
    assert (deviation.abs() <= 5 * (expected * (1 - expected) / 4000).sqrt()).all()  # false alarm: 5 in a million
    assert END not in first_tokens


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"samples": 0}, "samples"),
        ({"samples_per_wave": 0}, "samples_per_wave"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_impossible_settings_of_best_of_n_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        BestOfN(**arguments)


# Greedy


def test_greedy_takes_the_likeliest_tokens_and_tells_how_likely_they_are() -> None:
    [(wave, rollouts)] = waves_of(Greedy())
    [(_, plain)] = waves_of(BestOfN(samples=1, temperature=0.0))
    assert rollouts.responses == plain.responses
    _, info = Greedy().update(Greedy().init(problem(ToyEngine(), SAMPLING)), wave, rollouts, torch.zeros(1))
    steps = rollouts.observed["base_logprobs"][0, : int(rollouts.lengths[0])]
    assert math.isclose(info["base_logprob"], float(steps.sum()), rel_tol=1e-6)
    assert float(steps.max()) < 0


# The published form


def toy_controls(width: int = 3, horizon: int = 2) -> Problem:
    """A problem of which only the controls matter."""
    prompt = Prompt([{"role": "user", "content": ""}], (1,), 42)
    return Problem(prompt, Sampling(max_tokens=horizon), Head(width, 1.0, 8))


def controls_of(wave: Wave) -> Tensor:
    """The control sequences [N, T, D] a wave stands for."""
    assert isinstance(wave.steering, GaussianSteering)
    return torch.cat([controls for _, controls in wave.steering.sequences(wave.keys)])


def empty_rollouts(wave: Wave, complete: Tensor | None = None) -> Rollouts:
    flags = [True] * len(wave) if complete is None else complete.tolist()
    responses = tuple(Response("", "stop" if flag else "length") for flag in flags)
    return Rollouts(torch.full_like(wave.keys, -1), torch.zeros_like(wave.cut), responses, 0)


def iterated(method: PublishedAISP, start: Problem, reward: Any) -> list[Tensor]:
    """The mean controls of a search in which the reward is a function of the controls."""
    state, means = method.init(start), []
    for _ in range(method.iterations):
        wave = method.propose(state)
        state, _ = method.update(state, wave, empty_rollouts(wave), reward(controls_of(wave)))
        means.append(state.mean)
    return means


def test_an_offset_is_the_control_of_its_row_and_position_in_any_order() -> None:
    mean, keys = normal(torch.arange(4), 5), wave_keys(1, 0, torch.arange(6), 9)
    steering = GaussianSteering(mean, 0.3)
    (_, controls), *_ = steering.sequences(keys)
    rows, positions = torch.tensor([5, 0, 0, 3]), torch.tensor([2, 0, 3, 1])
    assert torch.equal(steering.offset(rows, positions, keys[rows, positions], None), controls[rows, positions])


def test_nothing_is_added_from_the_horizon_on() -> None:
    steering, keys = GaussianSteering(torch.ones(3, 5), 0.3), wave_keys(1, 0, torch.arange(2), 9)
    offsets = steering.offset(torch.zeros(9, dtype=torch.int64), torch.arange(9), keys[0], None)
    assert (offsets[:3] != 0).all()
    assert (offsets[3:] == 0).all()


def test_control_sequences_are_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    method, start = PublishedAISP(samples_per_iteration=7, alpha=0.5), toy_controls()
    state = replace(method.init(start), mean=torch.ones(2, 3))
    wave = method.propose(state)
    rewards = torch.arange(7.0)
    whole = method.update(state, wave, empty_rollouts(wave), rewards)
    monkeypatch.setattr(published, "_CHUNK", 2 * 3 * 2)
    chunks = method.update(state, wave, empty_rollouts(wave), rewards)
    assert torch.allclose(whole[0].mean, chunks[0].mean, atol=1e-6)
    assert whole[1] == pytest.approx(chunks[1])


def test_the_weights_are_the_papers() -> None:
    method = PublishedAISP(samples_per_iteration=6, sigma=0.8, reward_temperature=0.4, alpha=0.3)
    mean, rewards = normal(torch.arange(2), 3), normal(torch.tensor(9), 6)
    wave = method.propose(replace(method.init(toy_controls()), mean=mean))
    exponents = [
        float(rewards[i]) / 0.4 - (1 - 0.3) / 0.8**2 * float((mean * controls).sum())
        for i, controls in enumerate(controls_of(wave))
    ]
    exact = [math.exp(exponent - max(exponents)) for exponent in exponents]
    weights = method.weights(mean, wave.keys, rewards)
    assert weights.tolist() == pytest.approx([value / sum(exact) for value in exact], rel=1e-4)


def test_alpha_one_drops_the_cost() -> None:
    method = PublishedAISP(samples_per_iteration=6, alpha=1.0)
    mean, rewards = normal(torch.arange(2), 3), normal(torch.tensor(9), 6)
    wave = method.propose(replace(method.init(toy_controls()), mean=mean))
    assert torch.equal(method.weights(mean, wave.keys, rewards), importance_weights(rewards, 0.5))


def test_a_tiny_reward_temperature_moves_the_mean_to_the_best_controls() -> None:
    method = PublishedAISP(samples_per_iteration=6, reward_temperature=1e-6)
    state = method.init(toy_controls())
    wave, rewards = method.propose(state), normal(torch.tensor(9), 6)
    after, info = method.update(state, wave, empty_rollouts(wave), rewards)
    assert torch.allclose(after.mean, controls_of(wave)[rewards.argmax()])
    assert info["ess"] == pytest.approx(1)


def test_the_reported_divergence_is_that_of_the_new_mean() -> None:
    method = PublishedAISP(samples_per_iteration=6, sigma=0.5)
    state = method.init(toy_controls())
    wave = method.propose(state)
    after, info = method.update(state, wave, empty_rollouts(wave), normal(torch.tensor(9), 6))
    assert info["control_kl"] == pytest.approx(float(after.mean.square().sum()) / (2 * 0.5**2))


def test_a_cut_off_response_does_not_attract_the_mean() -> None:
    method = PublishedAISP(samples_per_iteration=4, reward_temperature=1e-6)
    state = method.init(toy_controls())
    wave, rewards = method.propose(state), torch.tensor([0.0, 1.0, 9.0, 8.0])
    complete = torch.tensor([True, True, False, False])
    after, _ = method.update(state, wave, empty_rollouts(wave, complete), rewards)
    assert torch.allclose(after.mean, controls_of(wave)[1])
    after, _ = method.update(state, wave, empty_rollouts(wave, complete & False), rewards)
    assert torch.allclose(after.mean, controls_of(wave)[2])


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_mean_finds_the_optimum_of_a_linear_reward(alpha: float) -> None:
    # r(V) = g·V: one update from U gives αU + σ²g/λ, whose fixed point is σ²g / (λ (1 - α))
    method = PublishedAISP(2000, iterations=12, sigma=0.6, reward_temperature=0.8, alpha=alpha)
    slope = torch.tensor([[0.5, -1.0, 0.0], [0.25, 0.0, 0.75]])
    means = iterated(method, toy_controls(), lambda controls: torch.einsum("td,ntd->n", slope, controls))
    expected = 0.6**2 * slope / (0.8 * (1 - alpha))
    assert (torch.stack(means[6:]).mean(dim=0) - expected).abs().max() < 0.05


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_mean_finds_the_optimum_of_a_quadratic_reward(alpha: float) -> None:
    # r(V) = -k|V - c|²/2: precisions add, so the fixed point is (kc/λ) / ((1 - α)/σ² + k/λ); with α = 1 it is c
    method = PublishedAISP(2000, iterations=16, sigma=0.6, reward_temperature=0.5, alpha=alpha)
    centre = torch.tensor([[1.0, -0.5, 0.0], [0.5, 0.0, -1.0]])
    means = iterated(method, toy_controls(), lambda controls: -(controls - centre).square().sum(dim=(1, 2)) / 2)
    expected = centre / 0.5 / ((1 - alpha) / 0.6**2 + 1 / 0.5)
    assert (torch.stack(means[8:]).mean(dim=0) - expected).abs().max() < 0.05


@pytest.mark.parametrize("remembers", [False, True])
def test_the_mean_reward_rises_over_the_iterations(remembers: bool) -> None:
    method = PublishedAISP(32, iterations=10, sigma=1.0, reward_temperature=0.3)
    aligned = outcome(play(method, ToyEngine(remembers=remembers, end_bias=-2.0), spells("badge"), SAMPLING))
    means = [step.mean for step in aligned.trace]
    assert sum(means[-3:]) / 3 > means[0] + 1


def test_argmax_decoding_without_noise_is_the_models_own_greedy_answer() -> None:
    quiet = PublishedAISP(samples_per_iteration=4, iterations=1, sigma=1e-6)
    (_, steered), (_, greedy) = waves_of(quiet)[0], waves_of(BestOfN(samples=1, temperature=0.0))[0]
    assert {tuple(row) for row in steered.tokens.tolist()} == {tuple(greedy.tokens[0].tolist())}


def test_with_argmax_the_controls_decide_and_with_sample_they_do_not_alone() -> None:
    def used(decode: Any) -> Sampling:
        method = PublishedAISP(decode=decode)
        return method.propose(method.init(problem(ToyEngine(), SAMPLING))).sampling

    assert used("argmax") == replace(SAMPLING, temperature=0.0)
    assert used("sample") == SAMPLING


def test_the_horizon_is_never_longer_than_the_response() -> None:
    start = problem(ToyEngine(), SAMPLING)
    shapes = [tuple(PublishedAISP(horizon=horizon).init(start).mean.shape) for horizon in (None, 4, 99)]
    assert shapes == [(10, 8), (4, 8), (10, 8)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"samples_per_iteration": 0}, "samples_per_iteration"),
        ({"iterations": 0}, "iterations"),
        ({"sigma": 0.0}, "sigma"),
        ({"reward_temperature": 0.0}, "reward_temperature"),
        ({"alpha": 1.5}, "alpha"),
        ({"horizon": 0}, "horizon"),
        ({"decode": "beam"}, "decode"),
    ],
)
def test_impossible_settings_of_the_published_form_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PublishedAISP(**arguments)
