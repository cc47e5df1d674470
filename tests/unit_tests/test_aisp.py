"""The default search: what branches weigh, that none is drawn twice, what the shared control does, and that it pays."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

import pytest
import torch
from torch import Tensor

from langchain_aisp.methods import AISP, BestOfN
from langchain_aisp.methods.aisp import Evidence, draw_branches
from langchain_aisp.methods.branching import (
    Population,
    branch_log_weights,
    distinct_branches,
    merged,
    moved,
    new_nodes,
    path_nodes,
)
from langchain_aisp.methods.published import PublishedAISP
from langchain_aisp.methods.weights import effective_sample_size
from langchain_aisp.noise import fold, uniform
from langchain_aisp.types import Sampling, Wave
from tests.toy import ToyEngine, counts, outcome, play, problem, spells

SAMPLING = Sampling(max_tokens=8)


def population(rewards: list[float], tokens: list[list[int]], logprobs: list[list[list[float]]]) -> Population:
    """Members of two tokens each with the alternatives 1, 2, 3 at every position."""
    ids = torch.tensor(tokens)
    alternatives = torch.tensor([1, 2, 3]).expand(*ids.shape, 3)
    scores = torch.zeros(*ids.shape, 0)
    lengths = torch.full((len(ids),), ids.shape[1])
    complete = torch.ones(len(ids), dtype=torch.bool)
    return Population(
        ids,
        torch.zeros_like(ids),
        lengths,
        path_nodes(ids, 5),
        torch.tensor(rewards),
        complete,
        alternatives,
        torch.tensor(logprobs).log(),
        complete,
        scores,
    )


TWO = population(
    [2.0, 1.0], [[1, 2], [3, 3]], [[[0.7, 0.2, 0.1], [0.3, 0.5, 0.2]], [[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]]
)


EVEN = torch.tensor([0.5, 0.5])


def waves_and_states(method: AISP, seed: int = 0, score=None, sampling: Sampling = SAMPLING):
    """Each wave of a search in whole waves with the state it was proposed from."""
    method = replace(method, overlap=1)
    engine, state, found = ToyEngine(), method.init(problem(ToyEngine(), sampling, seed)), []
    score = score or spells("badge")
    for _ in range(method.iterations):
        wave = method.propose(state)
        rollouts = engine.decode(wave)
        found.append((wave, state, rollouts))
        rewards = torch.tensor([score(response) for response in rollouts.responses])
        state, _ = method.update(state, wave, rollouts, rewards)
    return found


def test_a_branch_weighs_its_parents_weight_times_its_share_of_the_parents_branches():
    first, second = 0.75, 0.25
    weights = branch_log_weights(TWO, torch.tensor([first, second]), SAMPLING).exp()
    expected = torch.tensor(
        [
            [[0.0, 0.2, 0.1], [0.3, 0.0, 0.2]],  # without the parent's own tokens 1 and 2
            [[0.7, 0.2, 0.0], [0.25, 0.25, 0.0]],
        ]
    )
    expected *= torch.tensor([first / 0.8, second / 1.4])[:, None, None]
    torch.testing.assert_close(weights, expected)
    assert float(weights.sum()) == pytest.approx(1.0)


def test_a_colder_sampling_prefers_likely_branches():
    hot, cold = (branch_log_weights(TWO, EVEN, Sampling(8, temperature=t)).exp() for t in (1.0, 0.5))
    assert float(cold[0, 0, 1] / cold[0, 0, 2]) == pytest.approx(float(hot[0, 0, 1] / hot[0, 0, 2]) ** 2, rel=1e-4)


def test_branches_outside_top_k_or_top_p_are_not_drawn():
    narrow = branch_log_weights(TWO, EVEN, Sampling(8, top_k=2))
    assert float(narrow[0, 0, 2]) == -torch.inf
    nucleus = branch_log_weights(TWO, EVEN, Sampling(8, top_p=0.6))
    assert nucleus[1, 0].isfinite().tolist() == [True, False, False]


def test_nodes_visited_stay_sorted_whatever_joins_them():
    few, many = (uniform(fold(seed, torch.arange(count))).mul(2**40).long() for seed, count in ((1, 7), (2, 300)))
    visited = few[:0]
    for nodes in (few, few[:0], many, many[:5]):
        expected = torch.cat([visited, nodes]).sort().values
        visited = merged(visited, nodes)
        assert torch.equal(visited, expected)


def test_equal_branches_of_several_parents_are_one_and_those_visited_none():
    nodes, weights = torch.tensor([7, 9, 7, 8, 9, 6]), torch.tensor([0.1, 0.2, 0.3, 0.2, 0.0, 0.2]).log()
    for visited, left in ([], [0.2, 0.2]), ([8], [0.0, 0.2]), ([5, 6, 10], [0.2, 0.0]):
        merged = new_nodes(nodes, weights, torch.tensor(visited, dtype=torch.int64))
        torch.testing.assert_close(merged.exp(), torch.tensor([0.4, 0.2, 0.0, left[0], 0.0, left[1]]))


def test_parents_weights_have_the_wanted_effective_sample_size():
    members = population([4.0, 3.5, 1.0, 0.0, -2.0], [[1, 2]] * 5, [[[0.7, 0.2, 0.1]] * 2] * 5)
    for effective in (4.0, 2.0):
        assert effective_sample_size(members.weights(effective)) == pytest.approx(effective, rel=0.01)


def test_the_search_narrows_as_it_goes_on():
    spread = [effective_sample_size(state.weights) for _, state, _ in waves_and_states(AISP(samples=96, iterations=6))]
    distinct = population([4.0, 3.5, 1.0, 0.0, -2.0], [[1, 2]] * 5, [[[0.7, 0.2, 0.1]] * 2] * 5)
    method = AISP(samples=100)
    sizes = [effective_sample_size(method._weights(distinct, drawn)) for drawn in (0, 50, 100, 130)]
    assert sizes == pytest.approx([3.2, 2.1, 1.0, 1.0], rel=0.02)
    assert all(1 <= each <= method.population for each in spread[1:])


def test_first_branches_are_drawn_in_proportion_to_their_weights():
    """Gumbel top-k: chi-square with 4 degrees of freedom exceeds 18.5 by chance once in a thousand seeds.

    Of the three tokens that either parent could begin with they say 1 and 3 themselves; 2 is one branch, and it counts
    for the first.
    """
    method, draws = AISP(samples=64, iterations=2), 2000
    start = method.init(problem(ToyEngine(), SAMPLING))
    expected = branch_log_weights(TWO, EVEN, SAMPLING).exp().flatten()
    expected[1] += expected[7]
    expected[[2, 6, 7]] = 0
    expected /= expected.sum()
    found = torch.zeros_like(expected)
    for key in range(draws):
        prompt = replace(start.problem.prompt, key=key)
        members = replace(TWO, nodes=path_nodes(TWO.tokens, key))
        state = replace(
            start,
            problem=replace(start.problem, prompt=prompt),
            waves=1,
            population=members,
            weights=EVEN,
            visited=members.nodes.flatten().sort().values,
        )
        drawn = draw_branches(state, 1)
        found[int(drawn.parents) * 6 + int(drawn.positions) * 3 + int(drawn.tokens) - 1] += 1
    possible = expected > 0
    assert found[~possible].sum() == 0
    deviation = (found - draws * expected)[possible].square() / (draws * expected[possible])
    assert int(possible.sum()) == 5
    assert float(deviation.sum()) < 18.5


def test_no_branch_is_drawn_twice_in_a_whole_search():
    seen: set[tuple[int, ...]] = set()
    for wave, _, _ in waves_and_states(AISP(samples=96, iterations=6, crossings=0)):
        begun = [tuple(row[:cut].tolist()) for row, cut in zip(wave.prefix, wave.cut, strict=True) if cut > 0]
        assert len(begun) == len(set(begun))
        assert not seen & set(begun)
        seen |= set(begun)
    assert len(seen) > 60


def test_branches_lead_where_no_response_has_been():
    earlier: list[tuple[int, ...]] = []
    for wave, _, rollouts in waves_and_states(AISP(samples=96, iterations=6)):
        for row, cut in zip(wave.prefix, wave.cut, strict=True):
            beginning = tuple(row[:cut].tolist())
            assert cut == 0 or all(text[: len(beginning)] != beginning for text in earlier)
        earlier += [tuple(row[:n].tolist()) for row, n in zip(rollouts.tokens, rollouts.lengths, strict=True)]


def test_plain_samples_fill_up_when_the_tree_is_exhausted():
    sampling = Sampling(max_tokens=1)
    waves = [wave for wave, _, _ in waves_and_states(AISP(samples=40, iterations=2), sampling=sampling)]
    assert [len(wave) for wave in waves] == [20, 20]
    assert (waves[1].cut == 0).sum() > 10
    assert len(set(waves[1].keys[:, 0].tolist()) | set(waves[0].keys[:, 0].tolist())) == 40


def test_the_first_wave_is_that_of_best_of_n():
    ours = AISP(samples=64, iterations=2).propose(AISP(samples=64, iterations=2).init(problem(ToyEngine(), SAMPLING)))
    method = BestOfN(samples=32)
    theirs = method.propose(method.init(problem(ToyEngine(), SAMPLING)))
    assert torch.equal(ours.keys, theirs.keys)
    assert torch.equal(ours.cut, theirs.cut)
    assert ours.sampling == theirs.sampling
    assert ours.steering is None


def test_members_are_distinct_and_the_best():
    for _, state, _ in waves_and_states(AISP(samples=80, iterations=5, population=4))[1:]:
        members = state.population
        assert members is not None
        texts = [tuple(row[:n].tolist()) for row, n in zip(members.tokens, members.lengths, strict=True)]
        assert len(set(texts)) == len(texts) <= 4
        assert members.rewards.tolist() == sorted(members.rewards.tolist(), reverse=True)


def test_a_cut_off_response_never_displaces_a_complete_one():
    score = lambda response: 10.0 * (not response.complete) + len(response.text)  # noqa: E731
    for _, state, _ in waves_and_states(AISP(samples=40, iterations=4, population=4), score=score)[1:]:
        assert state.population is not None
        complete = state.population.complete.tolist()
        assert complete == sorted(complete, reverse=True)


def test_alternatives_of_a_child_are_those_of_its_own_text():
    """What a child keeps of its parent is copied, not decoded: it must equal what decoding would have observed."""
    engine = ToyEngine()
    for _, state, _ in waves_and_states(AISP(samples=60, iterations=5, control_kl=0.3, crossings=0))[1:]:
        members = state.population
        assert members is not None
        keys = members.keys
        wave = Wave(
            state.problem.prompt,
            members.tokens.clamp(min=0),
            torch.zeros_like(members.lengths),
            keys,
            state.problem.sampling,
            observe=frozenset({"alternatives"}),
        )
        for row in range(len(members)):
            for position in range(int(members.lengths[row])):
                one = Wave(
                    wave.prompt,
                    wave.prefix[row : row + 1],
                    torch.tensor([position]),
                    keys[row : row + 1],
                    wave.sampling,
                    observe=wave.observe,
                )
                observed = engine.decode(one).observed
                assert torch.equal(observed["alternatives"][0, position], members.alternatives[row, position])
                torch.testing.assert_close(
                    observed["alternative_logprobs"][0, position], members.logprobs[row, position]
                )


def test_at_temperature_zero_the_search_starts_from_the_one_greedy_answer():
    found = waves_and_states(AISP(samples=33, iterations=5, crossings=0), sampling=Sampling(8, temperature=0.0))
    assert [len(wave) for wave, _, _ in found] == [1, 8, 8, 8, 8]
    texts = [response.text for _, _, rollouts in found for response in rollouts.responses]
    assert len(set(texts)) > 25


def test_with_equal_samples_branching_beats_best_of_n():
    """Over 20 seeds; standard errors are about 0.2. Likelier is not better in this world, so cooling gains nothing."""

    def best(method, seed: int) -> float:
        engine = ToyEngine(scale=0.3, remembers=False, alternatives=10)
        return outcome(play(method, engine, spells("badgebad"), Sampling(max_tokens=14), seed=seed)).best.reward

    ours = mean(best(AISP(samples=64, iterations=8, cooling=1.0), seed) for seed in range(20))
    cooled = mean(best(AISP(samples=64, iterations=8), seed) for seed in range(20))
    plain = mean(best(BestOfN(samples=64), seed) for seed in range(20))
    assert ours > plain + 0.4
    assert cooled > plain


def test_what_follows_a_branch_is_drawn_at_a_lower_temperature():
    method = AISP(samples=24, iterations=3, cooling=0.5, overlap=1, crossings=0)
    played = play(method, ToyEngine(), spells("badge"), Sampling(max_tokens=10, temperature=0.8))
    waves = [request for request, _ in played if isinstance(request, Wave)]
    assert [wave.sampling.temperature for wave in waves] == [0.8, 0.4, 0.4]


@pytest.mark.parametrize("settings", [{"overlap": 1}, {"crossings": 0}], ids=["whole waves", "all decoded"])
def test_the_mean_reward_rises_over_iterations(settings):
    method = AISP(samples=80, iterations=5, **settings)
    traces = [
        [now.mean for now in outcome(play(method, ToyEngine(), spells("badgebad"), SAMPLING, seed=seed)).trace]
        for seed in range(20)
    ]
    assert mean(trace[-1] for trace in traces) > mean(trace[0] for trace in traces) + 1.0


# The shared control


def evidence(engine: ToyEngine, samples: int, score) -> Evidence:
    """What plain samples say."""
    method = AISP(samples=samples, iterations=1, control_kl=1.0)
    state = method.init(problem(engine, SAMPLING))
    wave = method.propose(state)
    rollouts = engine.decode(wave)
    rewards = torch.tensor([score(response) for response in rollouts.responses])
    return method.update(state, wave, rollouts, rewards)[0].evidence


def test_features_and_fisher_matrix_are_sums_of_scores():
    engine = ToyEngine()
    method = AISP(samples=12, iterations=1, control_kl=1.0)
    state = method.init(problem(engine, SAMPLING))
    wave = method.propose(state)
    rollouts = engine.decode(wave)
    found = method.update(state, wave, rollouts, torch.arange(12.0))[0].evidence
    scores = [rollouts.observed["scores"][row, : rollouts.lengths[row]] for row in range(12)]
    torch.testing.assert_close(found.features, torch.stack([s.sum(0) for s in scores]))
    torch.testing.assert_close(found.fisher, torch.cat(scores).T @ torch.cat(scores))
    assert found.tokens == int(rollouts.lengths.sum())


def test_the_control_raises_the_probability_of_what_is_rewarded():
    engine = ToyEngine(remembers=False, scale=0.3)
    control = evidence(engine, 400, counts("d")).control(0.2)
    centred = engine.weight - engine.weight.mean(dim=0)
    pushes = centred @ control
    assert int(pushes.argmax()) == 4  # the letter d
    assert pushes[4] > 3 * pushes[[i for i in range(10) if i != 4]].abs().mean()


def test_a_control_that_predicts_nothing_is_short_and_one_that_predicts_is_long():
    engine = ToyEngine(remembers=False)

    def nats(found: Evidence, control: Tensor) -> float:
        return float(control @ (found.fisher / found.tokens) @ control) / 2

    clear = evidence(engine, 200, counts("d"))
    assert 0.3 < nats(clear, clear.control(1.0)) <= 1.0
    noisy = replace(clear, rewards=torch.randn(200, generator=torch.Generator().manual_seed(0)))
    assert nats(noisy, noisy.control(1.0)) < 0.05


def test_without_evidence_there_is_no_control():
    found = Evidence.none(4)
    assert torch.equal(found.control(1.0), torch.zeros(4))
    flat = replace(evidence(ToyEngine(), 10, counts("d")), rewards=torch.ones(10))
    assert torch.equal(flat.control(1.0), torch.zeros(8))


def test_branches_are_each_once_with_the_node_of_the_text_they_begin():
    weights = branch_log_weights(TWO, EVEN, SAMPLING)
    visited = path_nodes(torch.tensor([[2, 1]]), 5)[0, :1]  # only a text that begins with 2
    places, nodes, found = distinct_branches(TWO, weights, visited, 5)
    parents, positions, ranks = torch.unravel_index(places, weights.shape)
    texts = TWO.tokens[parents].where(torch.arange(2) < positions[:, None], -1)
    texts[torch.arange(len(texts)), positions] = TWO.alternatives[parents, positions, ranks]
    assert nodes.tolist() == path_nodes(texts, 5).gather(1, positions[:, None]).flatten().tolist()
    begun = {
        tuple(text[: end + 1]): weight
        for text, end, weight in zip(texts.tolist(), positions.tolist(), found.exp().tolist(), strict=True)
    }
    assert set(begun) == {(1,), (3,), (1, 1), (1, 3), (3, 1), (3, 2)}
    assert len(begun) == len(nodes)
    assert begun[(3,)] == pytest.approx(float(weights[0, 0, 2].exp()))
    everything = distinct_branches(TWO, weights, visited[:0], 5)[-1]
    assert float(everything.exp().sum()) == pytest.approx(1)


def test_a_run_of_tokens_adds_to_the_hash_what_it_adds_elsewhere_times_a_factor():
    one, other = torch.tensor([[7, 3, 9, 4, 8]]), torch.tensor([[1, 1, 1, 3, 9]])
    there, here = ((nodes := path_nodes(each, 5)[0])[end] - nodes[end - 2] for each, end in ((one, 2), (other, 4)))
    by = torch.tensor([2, -2, 0])
    assert (int(here), int(there), int(there)) == tuple((torch.stack([there, here, there]) * moved(by)).tolist())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"samples": 4, "iterations": 5}, "between 1 and samples = 4"),
        ({"population": 0}, "population must be at least 1"),
        ({"cooling": -0.1}, "cooling must not be negative"),
        ({"control_kl": -0.1}, "must not be negative"),
        ({"lookahead": -1}, "lookahead must not be negative, got -1"),
        ({"guidance": -1}, "guidance must not be negative, got -1"),
    ],
)
def test_settings_that_leave_nothing_to_search_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AISP(**settings)


@pytest.mark.parametrize(("samples", "iterations"), [(1, 1), (5, 5), (8, 8), (64, 8), (256, 8), (257, 9), (512, 16)])
def test_a_search_has_eight_iterations_or_as_many_as_leave_each_32_samples(samples, iterations):
    assert AISP(samples=samples).iterations == iterations


def test_published_makes_the_published_form():
    assert AISP.published(sigma=0.3, iterations=4) == PublishedAISP(sigma=0.3, iterations=4)
