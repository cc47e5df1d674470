"""RE-Control: the value network and its fit, the climb at decoding, and how it adds to other controls."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from langchain_aisp.align import align
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.fitting import collect, fit_value
from langchain_aisp.methods import AISP, BestOfN, Greedy, PublishedAISP, REControl, ValueNetwork
from langchain_aisp.methods.aisp import SharedSteering
from langchain_aisp.methods.published import GaussianSteering
from langchain_aisp.methods.recontrol import SumSteering, ValueSteering
from langchain_aisp.methods.value import fit
from langchain_aisp.noise import fold, normal
from langchain_aisp.types import Sampling, Wave
from tests import tiny
from tests.toy import CHAT, ToyEngine, ToyReward, counts, outcome, play, problem, waves_of

SAMPLING = Sampling(max_tokens=8)


def network(width: int = 8, hidden: int = 6, seed: int = 0) -> ValueNetwork:
    keys = fold(seed, torch.arange(6))
    return ValueNetwork(
        normal(fold(keys[0], torch.arange(hidden)), width),
        normal(keys[1], hidden),
        normal(fold(keys[2], torch.arange(hidden)), hidden),
        normal(keys[3], hidden),
        normal(keys[4], hidden),
        normal(keys[5], 1).squeeze(),
    )


def walks(count: int, slope: Tensor, length: int = 5) -> tuple[list[Tensor], Tensor]:
    """Responses whose pre-logits carry their reward, along a direction, more clearly at every token."""
    rewards = 4 * normal(torch.tensor(3), count) + 7
    noise = normal(fold(4, torch.arange(count * length)), len(slope)).view(count, length, -1)
    signs = (torch.arange(length) + 1) / length
    return list(noise + signs[:, None] * ((rewards - 7) / 4)[:, None, None] * slope), rewards


# The network


def test_its_gradient_is_that_of_autograd() -> None:
    hidden = normal(torch.arange(20), 8).requires_grad_()
    [expected] = torch.autograd.grad(network()(hidden).sum(), hidden)
    torch.testing.assert_close(network().gradient(hidden.detach()), expected)


def test_it_is_kept_and_read_again(tmp_path: Path) -> None:
    network().save(tmp_path / "value.safetensors")
    read = ValueNetwork.load(tmp_path / "value.safetensors")
    assert read == network() != network(seed=1)
    assert hash(read) == hash(network())
    assert repr(read) == repr(network()) != repr(network(seed=1))
    assert torch.equal(read(normal(torch.arange(3), 8)), network()(normal(torch.arange(3), 8)))
    assert pickle.loads(pickle.dumps(read)) == read


def test_a_file_that_is_no_value_network_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no value network at .*missing"):
        ValueNetwork.load(tmp_path / "missing.safetensors")
    torch.save({"weight_1": torch.zeros(2)}, tmp_path / "pickled.pt")
    with pytest.raises(ValueError, match="no file of safetensors"):
        ValueNetwork.load(tmp_path / "pickled.pt")
    save_file({"lm_head": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="it holds lm_head, not weight_1"):
        ValueNetwork.load(tmp_path / "other.safetensors")


# The fit


def test_a_fit_foretells_the_rewards_of_responses_it_has_not_seen() -> None:
    slope = normal(torch.tensor(1), 6)
    found = fit(*walks(240, slope), hidden=16, epochs=40, learning_rate=3e-3)
    assert found.explained > 0.3
    assert found.explained == max(epoch.explained for epoch in found.trace)
    assert found.trace[-1].loss < found.trace[0].loss
    fresh, rewards = walks(400, slope)
    values = found.network(torch.stack(fresh[240:]))  # [160, 5]
    last, first = ((values[:, at] - rewards[240:]).square().mean() for at in (-1, 0))
    assert last < first < rewards.var()  # what comes is known better at every token
    assert float(found.network.gradient(fresh[0][-1]) @ slope) > 0


def test_values_are_in_the_reward_s_own_unit_whatever_the_scale_of_the_pre_logits() -> None:
    prelogits, rewards = walks(120, normal(torch.tensor(1), 6))
    plain = fit(prelogits, rewards, hidden=8, epochs=5).network
    scaled = fit([100 * walk for walk in prelogits], 3 * rewards - 50, hidden=8, epochs=5).network
    for walk in prelogits[:3]:  # whose rewards, so scaled, spread by 12
        torch.testing.assert_close(scaled(100 * walk), 3 * plain(walk) - 50, rtol=1e-2, atol=0.2)


def test_the_same_seed_gives_the_same_fit_and_another_seed_another() -> None:
    data = walks(20, normal(torch.tensor(1), 4))
    first, again, other = (fit(*data, hidden=4, epochs=2, seed=seed).network for seed in (0, 0, 1))
    assert first == again != other


def test_the_value_of_a_response_of_one_token_is_its_reward() -> None:
    prelogits = [normal(torch.tensor(row), 4)[None] for row in range(200)]
    rewards = torch.stack([walk[0, 0] for walk in prelogits])
    found = fit(prelogits, rewards, hidden=16, epochs=60, learning_rate=1e-2)
    assert found.explained > 0.5


def test_empty_responses_are_left_out() -> None:
    prelogits, rewards = walks(20, normal(torch.tensor(1), 4))
    with_empty = fit([*prelogits, torch.zeros(0, 4)], torch.cat([rewards, torch.zeros(1)]), hidden=4, epochs=2)
    assert with_empty.network == fit(prelogits, rewards, hidden=4, epochs=2).network


@pytest.mark.parametrize(
    ("rewards", "options", "complaint"),
    [
        ([1.0] * 9, {}, "nothing to learn"),
        ([1.0, 2.0], {}, "needs 4 responses or more, got 2"),
        ([1.0, 2.0] * 4, {"held_out": 1.0}, "held_out"),
        ([1.0, 2.0] * 4, {"epochs": 0}, "epochs"),
    ],
)
def test_data_without_a_lesson_are_refused(rewards: list[float], options: dict[str, Any], complaint: str) -> None:
    prelogits = [normal(torch.arange(2) + row, 3) for row in range(len(rewards))]
    with pytest.raises(ValueError, match=complaint):
        fit(prelogits, torch.tensor(rewards), **options)


# The climb


def test_each_step_goes_uphill_from_where_the_last_one_led() -> None:
    hidden, value = normal(torch.arange(5), 8), network()
    rows = torch.arange(5)
    expected = hidden
    for _ in range(3):
        expected = expected + 0.1 * value.gradient(expected)
    steering = ValueSteering(value, 0.1, 3)
    assert not steering.open_loop
    torch.testing.assert_close(steering.offset(rows, rows, rows, hidden), expected - hidden)
    small = ValueSteering(value, 0.01, 5)
    assert (value(hidden + small.offset(rows, rows, rows, hidden)) >= value(hidden)).all()


def test_offsets_add_up_and_only_the_value_sees_the_pre_logits() -> None:
    class Watching:
        open_loop = True

        def offset(self, rows: Tensor, positions: Tensor, keys: Tensor, hidden: Tensor | None) -> Tensor:
            assert hidden is None
            return torch.ones(len(rows), 8)

    value, shared = ValueSteering(network(), 0.1, 2), SharedSteering(normal(torch.tensor(9), 8))
    rows, hidden = torch.arange(4), normal(torch.arange(4), 8)
    total = SumSteering((Watching(), shared, value))
    expected = 1 + shared.control + value.offset(rows, rows, rows, hidden)
    torch.testing.assert_close(total.offset(rows, rows, rows, hidden), expected)
    assert not total.open_loop
    assert SumSteering((Watching(), shared)).open_loop


def test_the_published_form_is_one_steered_greedy_answer() -> None:
    [(wave, rollouts)] = waves_of(REControl(network(), step_size=0.2, steps=3))
    assert (len(wave), wave.sampling.temperature) == (1, 0.0)
    assert wave.steering == ValueSteering(network(), 0.2, 3)
    [(_, plain)] = waves_of(Greedy())
    assert rollouts.responses != plain.responses


def test_n_samples_are_the_steered_samples_of_best_of_n() -> None:
    waves = waves_of(REControl(network(), 0.2, 3, method=BestOfN(samples=12, samples_per_wave=5)))
    assert [len(wave) for wave, _ in waves] == [5, 5, 2]
    assert all(wave.sampling.temperature == 1.0 for wave, _ in waves)
    [(plain, _)] = waves_of(BestOfN(samples=12))
    assert torch.equal(torch.cat([wave.keys for wave, _ in waves]), plain.keys)


@pytest.mark.parametrize(
    ("inner", "kind"),
    [
        (AISP(samples=24, iterations=3, control_kl=0.5), SharedSteering),
        (PublishedAISP(samples_per_iteration=8, iterations=3), GaussianSteering),
    ],
)
def test_the_controls_of_a_search_and_the_value_s_are_added_up(inner: Any, kind: type[Any]) -> None:
    last: Wave = waves_of(REControl(network(), 0.2, 3, method=inner))[-1][0]
    assert isinstance(last.steering, SumSteering)
    assert [type(part) for part in last.steering.parts] == [kind, ValueSteering]


def test_a_network_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="width 5, this model has 8"):
        REControl(network(width=5)).init(problem(ToyEngine(), SAMPLING))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"value": "value.safetensors"}, "ValueNetwork.load"),
        ({"value": network(), "step_size": 0.0}, "step_size"),
        ({"value": network(), "steps": 0}, "steps"),
    ],
)
def test_impossible_settings_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        REControl(**arguments)


# Together


def test_collected_pre_logits_are_those_that_the_answers_were_drawn_from() -> None:
    engine, chats = ToyEngine(threaded=True), [CHAT, [{"role": "user", "content": "Another thing."}]]
    found = collect(engine, ToyReward(counts("d")), chats, sampling=SAMPLING, samples_per_prompt=3)
    assert len(found.prelogits) == len(found.rewards) == 6
    for chat, first in zip(chats, (0, 3), strict=True):
        plain = align(engine, ToyReward(counts("d")), BestOfN(3), chat, sampling=SAMPLING).candidates
        for candidate in plain:
            walk, tokens = found.prelogits[first + candidate.row], torch.tensor([candidate.tokens])
            assert found.rewards[first + candidate.row] == candidate.reward
            assert len(walk) == len(candidate.tokens)
            prompt = engine.encode(chat)
            for position in range(len(walk)):
                exact = engine.prelogits(prompt, tokens, torch.tensor([position]))
                assert torch.equal(walk[position], exact[0])


def test_a_fitted_value_steers_the_toy_to_higher_rewards() -> None:
    """Each pre-logit tells how likely a d comes next, and nothing else: little is foretold, and it is enough."""
    engine, score = ToyEngine(scale=1.0, end_bias=-2.0), counts("d")
    chats = [[{"role": "user", "content": f"Case {number}."}] for number in range(40)]
    found = fit_value(engine, ToyReward(score), chats, sampling=SAMPLING, samples_per_prompt=20, hidden=16, epochs=20)
    assert found.explained > 0

    def total(method: Any) -> float:
        return sum(outcome(play(method, engine, score, SAMPLING, seed=seed)).best.reward for seed in range(12))

    assert total(REControl(found.network, step_size=1.0, steps=30)) > total(Greedy())


def test_it_steers_a_real_model_closed_loop() -> None:
    with TransformersEngine(tiny.model(), tiny.tokenizer(), name="tiny") as engine:
        reward = ToyReward(lambda response: float(sum(map(ord, response.text)) % 10))
        chats = [CHAT, [{"role": "user", "content": "And then?"}]]
        small = {"samples_per_prompt": 8, "hidden": 8, "epochs": 3, "learning_rate": 0.05}
        found = fit_value(engine, reward, chats, sampling=Sampling(max_tokens=12), **small)
        assert found.network.width == engine.head.width
        plain, steered, searched = (
            align(engine, reward, method, CHAT, sampling=Sampling(max_tokens=12))
            for method in (
                Greedy(),
                REControl(found.network, step_size=3.0, steps=4),
                REControl(found.network, 3.0, 4, method=AISP(samples=8, iterations=2, control_kl=0.3)),
            )
        )
        assert plain.best.tokens != steered.best.tokens
        assert searched.samples == 8


def test_a_failing_reward_leaves_no_answers_behind() -> None:
    def broken(response: Any) -> float:
        raise KeyError("no such judge")

    with pytest.raises(KeyError, match="no such judge"):
        fit_value(ToyEngine(), ToyReward(broken), [CHAT], sampling=SAMPLING)
    with pytest.raises(ValueError, match="no prompts"):
        fit_value(ToyEngine(), ToyReward(counts("d")), [], sampling=SAMPLING)
