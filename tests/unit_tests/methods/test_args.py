"""ARGS: which token is chosen, what that costs, and that the text it wrote is the answer."""

from collections import Counter
from typing import Any

import pytest
import torch

from langchain_aisp.align import Budget
from langchain_aisp.methods import ARGS, Greedy
from langchain_aisp.methods.args import Extension
from langchain_aisp.types import Response, Sampling
from tests.toy import END, ToyEngine, counts, outcome, play, problem, spells, waves_of

SAMPLING = Sampling(max_tokens=10)


def by_hand(engine: ToyEngine, score: Any, weight: float, candidates: int, seed: int = 0) -> list[int]:
    """The tokens of ARGS-greedy, from the toy's pre-logits, written as the paper says it."""
    prompt, written = problem(engine, SAMPLING, seed).prompt, list[int]()
    while len(written) < SAMPLING.max_tokens and END not in written:
        position = torch.tensor([len(written)])
        tokens = torch.tensor([[*written, *[-1] * (10 - len(written))]])
        logits = engine.logits(engine.prelogits(prompt, tokens, position), position, SAMPLING)[0]
        likeliest = [token for token in logits.topk(candidates).indices.tolist() if logits[token] > -torch.inf]
        texts = {token: Response(engine.text([*written, token], ())) for token in likeliest}
        scores = {token: float(logits[token]) + weight * score(texts[token]) for token in likeliest}
        written.append(max(scores, key=scores.__getitem__))
    return written


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_answer_is_that_of_the_paper_s_rule(weight: float, seed: int) -> None:
    method, score = ARGS(weight=weight, candidates=4), spells("badgebadge")
    aligned = outcome(play(method, ToyEngine(), score, SAMPLING, seed=seed))
    assert list(aligned.best.tokens) == by_hand(ToyEngine(), score, weight, 4, seed)


def test_without_a_weight_it_writes_the_greedy_answer() -> None:
    plain, ours = (
        outcome(play(method, ToyEngine(), counts("d"), SAMPLING)).best.tokens
        for method in (Greedy(), ARGS(weight=0.0, candidates=3))
    )
    assert ours == plain


def test_each_token_is_judged_once_per_candidate() -> None:
    aligned = outcome(play(ARGS(candidates=4), ToyEngine(end_bias=-9.0), spells("badge"), SAMPLING))
    length = len(aligned.best.tokens)
    assert length == 10
    assert aligned.samples == aligned.sampled_tokens == 4 * length
    assert aligned.reward_calls == 4 * length
    assert aligned.stopped == "finished"


def test_a_wave_says_the_likeliest_token_or_all_its_rivals() -> None:
    waves = [wave for wave, _ in waves_of(ARGS(candidates=4), seed=1)]
    assert [len(wave) for wave in waves] == [1, 3] * (len(waves) // 2)
    assert [wave.forced for wave in waves] == [False, True] * (len(waves) // 2)
    assert [wave.cut.unique().tolist() for wave in waves] == [[position // 2] for position in range(len(waves))]


def test_the_written_text_is_the_answer_even_where_a_text_on_the_way_scored_higher() -> None:
    """A reward that pays for ends: complete texts on the way beat the one that was written, and are not the answer."""
    tempting = lambda response: 5.0 * response.complete - len(response.text)  # noqa: E731
    found = [outcome(play(ARGS(weight=0.0, candidates=4), ToyEngine(), tempting, SAMPLING, seed=s)) for s in range(6)]
    assert any(aligned.best.reward < max(c.reward for c in aligned.candidates) for aligned in found)
    for seed, aligned in enumerate(found):
        assert list(aligned.best.tokens) == by_hand(ToyEngine(), tempting, 0.0, 4, seed)
        assert (aligned.trace[-1].best, aligned.trace[-1].response) == (aligned.best.reward, aligned.best.response)


def test_a_budget_that_ends_in_the_middle_gives_the_text_so_far() -> None:
    method, score = ARGS(candidates=4), spells("badge")
    whole = outcome(play(method, ToyEngine(), score, SAMPLING))
    part = outcome(play(method, ToyEngine(), score, SAMPLING, budget=Budget(samples=9)))
    assert part.stopped == "samples"
    assert part.best.tokens == whole.best.tokens[:2]


def test_chains_differ_and_the_best_of_them_is_the_answer() -> None:
    method = ARGS(candidates=4, temperature=1.0, chains=5)
    aligned = outcome(play(method, ToyEngine(), spells("badge"), SAMPLING))
    written = [c for c in aligned.candidates[:5] if c.response.complete or len(c.tokens) == 10]
    assert len(written) == 5
    assert len({candidate.tokens for candidate in written}) > 1
    assert aligned.best.rank == min(candidate.rank for candidate in written)


def test_a_stochastic_choice_follows_the_softmax_of_the_scores() -> None:
    """Chi-square with 2 degrees of freedom exceeds 13.8 by chance once in a thousand seeds."""
    engine, sampling, score = ToyEngine(), Sampling(max_tokens=1), counts("d")
    method = ARGS(weight=1.0, candidates=3, temperature=0.7, chains=2000)
    state = method.init(problem(engine, sampling))
    while not state.finished:
        wave = method.propose(state)
        rollouts = engine.decode(wave)
        state, _ = method.update(state, wave, rollouts, torch.tensor([score(each) for each in rollouts.responses]))
    found = Counter(chain.tokens for chain in state.chains)

    position = torch.tensor([0])
    hidden = engine.prelogits(state.problem.prompt, torch.full((1, 1), -1), position)
    logits, tokens = engine.logits(hidden, position, sampling)[0].topk(3)
    rewards = torch.tensor([score(Response(engine.text([token], ()))) for token in tokens.tolist()])
    expected = 2000 * ((logits + rewards) / 0.7).softmax(dim=0)
    deviations = torch.tensor([float(found[(token,)]) for token in tokens.tolist()]) - expected
    assert float((deviations.square() / expected).sum()) < 13.8


def test_scores_add_the_weighted_reward_to_the_log_probability() -> None:
    candidates = [Extension(0, 1, -1.0, 2.0), Extension(0, 2, -0.5, 1.0), Extension(0, 3, -3.0, 4.0)]
    scores = ARGS(weight=1.5).scores(candidates)
    assert (scores - scores[0]).tolist() == pytest.approx([0.0, 0.5 - 1.5, -2.0 + 3.0])


def test_a_token_without_rivals_costs_one_row() -> None:
    waves = [wave for wave, _ in waves_of(ARGS(candidates=1))]
    assert [len(wave) for wave in waves] == [1] * len(waves)
    assert not any(wave.forced for wave in waves)


def test_more_candidates_than_an_engine_observes_are_named() -> None:
    with pytest.raises(ValueError, match="candidates=9, but the engine observes the 4"):
        outcome(play(ARGS(candidates=9), ToyEngine(), counts("d"), SAMPLING))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"weight": -1.0}, "weight"),
        ({"candidates": 0}, "candidates"),
        ({"temperature": -0.1}, "temperature"),
        ({"chains": 0}, "chains"),
        ({"chains": 2}, "all be the same text"),
    ],
)
def test_impossible_settings_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ARGS(**arguments)
