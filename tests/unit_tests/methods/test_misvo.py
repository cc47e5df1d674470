"""MISVO: its step in closed form, where it comes to rest, and that it climbs."""

from statistics import mean
from typing import Any

import pytest
import torch

from langchain_aisp.methods import MISVO, PublishedAISP
from langchain_aisp.methods.misvo import PositionSteering, advantages, slopes_of
from langchain_aisp.noise import normal
from langchain_aisp.types import Sampling, Wave
from tests.toy import ToyEngine, counts, outcome, play, problem, waves_of

SAMPLING = Sampling(max_tokens=8)


def test_advantages_are_centred_among_the_rows_that_reach_a_position() -> None:
    written = torch.tensor([[True, True], [True, True], [True, False]])
    found = advantages(torch.tensor([1.0, 3.0, 5.0]), torch.ones(3, dtype=torch.bool), written)
    deviation = (8 / 3) ** 0.5
    expected = torch.tensor([[-2.0, -1.0], [0.0, 1.0], [2.0, 0.0]]) / deviation
    torch.testing.assert_close(found, expected)


def test_a_cut_off_row_is_as_bad_as_the_worst_complete_one() -> None:
    written = torch.ones(3, 1, dtype=torch.bool)
    found = advantages(torch.tensor([1.0, 2.0, 99.0]), torch.tensor([True, True, False]), written)
    assert float(found[0]) == float(found[2]) < 0 < float(found[1])


def test_slopes_are_means_of_advantage_times_score() -> None:
    scores, weights = normal(torch.arange(6).view(3, 2), 4), normal(torch.arange(3), 2)
    expected = sum(weights[row, 1] * scores[row, 1] for row in range(3)) / 3
    torch.testing.assert_close(slopes_of(scores, weights)[1], expected)


def test_a_step_goes_along_the_natural_gradient_and_back_towards_the_model() -> None:
    method, engine = MISVO(samples_per_iteration=16, iterations=2, learning_rate=0.2, kl_penalty=0.5), ToyEngine()
    state = method.init(problem(engine, SAMPLING))
    for _ in range(2):
        wave = method.propose(state)
        rollouts = engine.decode(wave)
        rewards = torch.tensor([counts("d")(response) for response in rollouts.responses])
        after, info = method.update(state, wave, rollouts, rewards)
        written = torch.arange(8) < rollouts.lengths[:, None]
        scores = rollouts.observed["scores"].where(written[..., None], 0)
        fisher = after.fisher / after.tokens
        floored = fisher + 0.1 * fisher.diagonal().mean() * torch.eye(8)
        slopes = slopes_of(scores, advantages(rewards, rollouts.complete, written))
        expected = state.controls + 0.2 * (slopes @ torch.linalg.inv(floored) - 0.5 * state.controls)
        torch.testing.assert_close(after.controls, expected)
        assert info["control_kl"] == pytest.approx(
            float((after.controls @ fisher * after.controls).sum() / 2), rel=1e-4
        )
        state = after
    assert state.controls.abs().max() > 0


def test_the_first_wave_is_unsteered_and_later_ones_are_steered_alike() -> None:
    first, second, _ = (wave for wave, _ in waves_of(MISVO(8, iterations=3)))
    assert first.steering is None
    assert isinstance(second.steering, PositionSteering)
    rows = torch.arange(3)
    offsets = second.steering.offset(rows, torch.tensor([2, 2, 9]), second.keys[:3, 0], None)
    assert torch.equal(offsets[0], offsets[1])
    assert torch.equal(offsets[0], second.steering.controls[2])


def test_nothing_is_added_from_the_horizon_on() -> None:
    played = play(MISVO(32, iterations=2, horizon=3), ToyEngine(), counts("d"), SAMPLING)
    _, wave = (request for request, _ in played if isinstance(request, Wave))
    assert isinstance(wave.steering, PositionSteering)
    offsets = wave.steering.offset(torch.zeros(6, dtype=torch.int64), torch.arange(6), wave.keys[0, :6], None)
    assert (offsets[:3] != 0).any(dim=1).all()
    assert (offsets[3:] == 0).all()


def test_without_differences_there_is_no_control() -> None:
    method, engine = MISVO(8, iterations=2), ToyEngine()
    state = method.init(problem(engine, SAMPLING))
    wave = method.propose(state)
    after, info = method.update(state, wave, engine.decode(wave), torch.ones(8))
    assert not after.controls.any()
    assert info["control_kl"] == 0


def climbed(method: Any) -> tuple[float, float]:
    """Mean reward of first and last waves over 6 seeds, in a world where a position's letters matter."""
    engine = ToyEngine(remembers=False, scale=0.3, end_bias=-3.0)
    traces = [outcome(play(method, engine, counts("d"), SAMPLING, seed=seed)).trace for seed in range(6)]
    return mean(trace[0].mean for trace in traces), mean(trace[-1].mean for trace in traces)


def test_the_mean_reward_rises_and_a_stronger_penalty_holds_it_back() -> None:
    first, free = climbed(MISVO(16, iterations=10, learning_rate=0.3, kl_penalty=0.1))
    _, held = climbed(MISVO(16, iterations=10, learning_rate=0.3, kl_penalty=3.0))
    assert free > held > first
    assert free > first + 0.6


def test_its_defaults_are_the_two_known_settings_and_those_of_its_comparison() -> None:
    method, rival = MISVO(), PublishedAISP()
    assert (method.learning_rate, method.kl_penalty) == (0.1, 1.0)
    assert method.samples_per_iteration == rival.samples_per_iteration
    assert method.iterations == rival.iterations


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"samples_per_iteration": 0}, "samples_per_iteration"),
        ({"iterations": 0}, "iterations"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"kl_penalty": -1.0}, "kl_penalty"),
        ({"learning_rate": 0.5, "kl_penalty": 3.0}, "overshoot"),
        ({"horizon": 0}, "horizon"),
    ],
)
def test_impossible_settings_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MISVO(**arguments)
