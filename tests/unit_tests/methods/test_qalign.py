"""QAlign: the chains' stationary distribution, known exactly in a small world, and what is kept and redrawn."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from langchain_aisp.methods import BestOfN, QAlign
from langchain_aisp.methods.qalign import Links
from langchain_aisp.types import Response, Sampling
from tests.toy import END, ToyEngine, counts, outcome, play, problem, waves_of

SMALL = Sampling(max_tokens=3, min_tokens=0)
PLAIN = Sampling(max_tokens=10)


def texts(engine: ToyEngine, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Every response of a small world with its probability."""
    prompt, open_texts, found = problem(engine, sampling).prompt, {(): 1.0}, dict[tuple[int, ...], float]()
    for length in range(sampling.max_tokens):
        position, longer = torch.tensor([length]), dict[tuple[int, ...], float]()
        for text, probability in open_texts.items():
            tokens = torch.tensor([[*text, *[-1] * (sampling.max_tokens - length)]])
            logits = engine.logits(engine.prelogits(prompt, tokens, position), position, sampling)
            for token, share in enumerate(logits.softmax(dim=-1)[0].tolist()):
                home = found if token == END or length + 1 == sampling.max_tokens else longer
                home[*text, token] = probability * share
        open_texts = longer
    return found


def target(
    engine: ToyEngine, sampling: Sampling, score: Callable[[Response], float], reward_temperature: float
) -> dict[tuple[int, ...], float]:
    """What the chains are to sample: complete responses, tilted by their rewards."""
    weights = {
        text: probability * torch.tensor(score(Response(engine.text(text, ()))) / reward_temperature).exp().item()
        for text, probability in texts(engine, sampling).items()
        if text[-1] == END
    }
    return {text: weight / sum(weights.values()) for text, weight in weights.items()}


def last_states(method: QAlign, engine: ToyEngine, sampling: Sampling, score: Callable[[Response], float]) -> Any:
    state = method.init(problem(engine, sampling))
    for _ in range(method.iterations):
        wave = method.propose(state)
        rollouts = engine.decode(wave)
        state, _ = method.update(state, wave, rollouts, torch.tensor([score(each) for each in rollouts.responses]))
    return state


@pytest.mark.parametrize("reward_temperature", [1.0, 0.7])
@pytest.mark.parametrize("score", [counts("a"), lambda response: 0.0], ids=["counts a", "indifferent"])
def test_the_chains_end_in_the_tilted_distribution(
    score: Callable[[Response], float], reward_temperature: float
) -> None:
    """Many chains of 50 steps; with an indifferent reward a missing length ratio would show as too many long texts.

    The statistic is compared with its mean plus five standard deviations: a false alarm once in some ten thousand.
    """
    engine, chains = ToyEngine(letters=2, alternatives=2, end_bias=1.0), 500
    method = QAlign(samples=50 * chains, chains=chains, reward_temperature=reward_temperature)
    state = last_states(method, engine, SMALL, score)
    expected = target(engine, SMALL, score, reward_temperature)
    assert state.links.complete.all()
    found = [tuple(row[:n].tolist()) for row, n in zip(state.links.tokens, state.links.lengths, strict=True)]
    statistic = sum((found.count(text) - chains * share) ** 2 / (chains * share) for text, share in expected.items())
    freedom = len(expected) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_cuts_are_uniform_over_the_tokens_of_a_response() -> None:
    method = QAlign(samples=8000, chains=4000)
    engine = ToyEngine(end_bias=-9.0)
    state = method.init(problem(engine, Sampling(max_tokens=4)))
    wave = method.propose(state)
    rollouts = engine.decode(wave)
    state, _ = method.update(state, wave, rollouts, torch.zeros(4000))
    cuts = method.propose(state).cut[rollouts.lengths == 4]
    shares = cuts.bincount(minlength=4) / len(cuts)
    assert shares.shape == (4,)
    assert (shares - 0.25).abs().max() < 5 * (0.25 * 0.75 / len(cuts)) ** 0.5  # false alarm: a few in a million


def links(rewards: list[float], lengths: list[int], complete: list[bool]) -> Links:
    tokens = torch.zeros(len(rewards), 9, dtype=torch.int64)
    return Links(
        tokens, tokens, torch.tensor(lengths), torch.tensor(rewards), torch.tensor(complete), torch.tensor(lengths) * 0
    )


def test_acceptance_weighs_rewards_and_the_number_of_possible_cuts() -> None:
    now, new = links([1.0, 1.0, 2.0], [4, 4, 8], [True] * 3), links([1.0, 2.0, 1.0], [8, 4, 4], [True] * 3)
    ratios = QAlign(reward_temperature=0.5).log_acceptance(now, new).exp().tolist()
    assert ratios == pytest.approx([4 / 8, 2.718281828**2, 2.718281828**-2 * 2])


def test_a_cut_off_response_never_replaces_a_complete_one_and_a_complete_one_always_a_cut_off_one() -> None:
    now, new = (
        links([0.0, 9.0, 1.0], [4] * 3, [True, False, False]),
        links([9.0, 0.0, 1.0], [4] * 3, [False, True, False]),
    )
    assert QAlign().log_acceptance(now, new).tolist() == [-torch.inf, torch.inf, 0.0]


def test_a_proposal_keeps_what_stands_before_its_cut() -> None:
    method = QAlign(samples=40, chains=8, reward_temperature=100.0)  # hot: nearly every proposal is accepted
    (before, rollouts), (after, redrawn), *_ = waves_of(method)
    kept = torch.arange(10) < after.cut[:, None]
    assert torch.equal(redrawn.tokens[kept], rollouts.tokens[kept])
    assert torch.equal(after.keys[kept], before.keys[kept])
    assert (after.keys[~kept] != before.keys[~kept]).all()
    assert (after.cut < rollouts.lengths).all()
    assert len(after.cut.unique()) > 2


def test_the_answer_may_be_the_last_state_instead_of_the_best_response() -> None:
    """So hot, the chains know little of the reward, and where they end is seldom the best they have seen."""
    hot, score = QAlign(64, chains=4, reward_temperature=50.0), counts("d")
    worse = 0
    for seed in range(5):
        best, last = (
            outcome(play(method, ToyEngine(), score, PLAIN, seed=seed)) for method in (hot, replace(hot, answer="last"))
        )
        assert best.best.reward == max(c.reward for c in best.candidates if c.response.complete)
        assert last.best.reward <= best.best.reward
        worse += last.best.reward < best.best.reward
    assert worse >= 2
    state = last_states(replace(hot, answer="last"), ToyEngine(), PLAIN, score)
    aligned = outcome(play(replace(hot, answer="last"), ToyEngine(), score, PLAIN))
    assert {(c.iteration, c.row) for c in aligned.candidates[:4]} == state.answers
    assert aligned.best.reward == max(state.links.rewards[state.links.complete].tolist())


def test_the_last_wave_takes_what_is_left_of_the_samples() -> None:
    assert [len(wave) for wave, _ in waves_of(QAlign(samples=11, chains=4))] == [4, 4, 3]


def test_colder_chains_find_higher_rewards_than_plain_samples_do_on_average() -> None:
    """Over 8 seeds, the chains' last rewards against those of plain samples."""

    def rewards(seed: int) -> tuple[Tensor, Tensor]:
        method, engine = QAlign(samples=96, chains=8, reward_temperature=0.3, answer="last"), ToyEngine()
        cold = outcome(play(method, engine, counts("d"), PLAIN, seed=seed)).candidates[:8]
        plain = outcome(play(BestOfN(samples=8), engine, counts("d"), PLAIN, seed=seed)).candidates
        return tuple(torch.tensor([candidate.reward for candidate in each]) for each in (cold, plain))  # type: ignore[return-value]

    cold, plain = (torch.cat(each) for each in zip(*map(rewards, range(8)), strict=True))
    assert cold.mean() > plain.mean() + 0.5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"samples": 0}, "samples"),
        ({"samples": 4, "chains": 5}, "between 1 and samples = 4"),
        ({"chains": 0}, "chains"),
        ({"reward_temperature": 0.0}, "reward_temperature"),
        ({"answer": "mean"}, "answer"),
    ],
)
def test_impossible_settings_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        QAlign(**arguments)
