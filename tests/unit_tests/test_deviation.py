"""How far an answer parts from the model: what steering may spend, and what may be returned."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from langchain_core.messages import HumanMessage
from torch import Tensor

from benchmarks import common, frontier, plots
from benchmarks.pairs import PAIRS, Opened
from langchain_aisp import AISP, AISPChatModel, BestOfN, Budget, aalign, align
from langchain_aisp.align import Aligned, Candidate, Iteration, first_rows, iterate
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.engine.deviation import within
from langchain_aisp.engine.graphs import StepGraphs
from langchain_aisp.evaluation.datasets import PromptRecord
from langchain_aisp.methods import ARGS, MISVO, Greedy, PublishedAISP, QAlign, REControl, ValueNetwork
from langchain_aisp.methods.aisp import SharedSteering
from langchain_aisp.methods.published import GaussianSteering
from langchain_aisp.noise import fold, normal, uniform, wave_keys
from langchain_aisp.rewards import as_reward
from langchain_aisp.types import Grammar, Info, Method, Problem, Response, Rollouts, Sampling, Steering, Wave
from tests import tiny
from tests.toy import CHAT, END, ToyEngine, ToyReward, counts

WIDTH = 32
LENGTH = 12
CONTROL = 0.6 * normal(torch.tensor(11), WIDTH)
STEERINGS: list[Steering] = [SharedSteering(CONTROL), GaussianSteering(0.3 * CONTROL.expand(8, -1).clone(), 0.6)]


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(tiny.model(), tiny.tokenizer(), name="tiny")


def decode(engine: TransformersEngine, wave: Wave) -> Rollouts:
    return engine.submit(wave).future.result(timeout=60)


def steered(engine: TransformersEngine, steering: Steering, rows: int = 6, seed: int = 0, **sampling: Any) -> Wave:
    return tiny.wave(engine.encode(CHAT, seed=seed), rows, LENGTH, steering=steering, **sampling)


def letters_a_to_m(chat: Any, responses: Sequence[str]) -> list[float]:
    return [float(sum(letter in "abcdefghijklm" for letter in text)) for text in responses]


# -- logits on their way back -----------------------------------------------------------------------------------------


def divergence(logits: Tensor, base: Tensor) -> Tensor:
    """KL divergences [r] in float64, as they stand in a textbook; forbidden tokens are no part of the sum."""
    p, q = logits.double().softmax(dim=-1), base.double().softmax(dim=-1)
    return torch.where(p > 0, p * (p / q).log(), 0).sum(dim=-1)


def some_logits(rows: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Steered logits, unsteered ones, some tokens forbidden in both, and budgets of which some are large enough."""
    base = 3 * normal(torch.arange(rows), vocabulary)
    moved = base + normal(fold(5, torch.arange(rows)), vocabulary)
    forbidden = uniform(fold(torch.arange(rows)[:, None], torch.arange(vocabulary))) < 0.2
    return *(logits.masked_fill(forbidden, -torch.inf) for logits in (moved, base)), torch.linspace(0, 1.2, rows)


def test_no_row_goes_further_than_its_budget_and_none_gives_away_more_than_it_must() -> None:
    moved, base, budget = some_logits(40, 300)
    logits, kl = within(moved, base, budget)
    torch.testing.assert_close(kl.double(), divergence(logits, base), atol=2e-6, rtol=0)
    assert bool((kl <= budget).all())
    free = divergence(moved, base) < budget
    assert 5 < int(free.sum()) < 35
    assert torch.equal(logits[free], moved[free])
    assert bool((kl >= 0.999 * budget)[~free].all())


def test_a_row_moves_along_the_line_between_the_two() -> None:
    moved, base, budget = some_logits(40, 300)
    logits, _ = within(moved, base, budget)
    allowed = base.isfinite()
    assert torch.equal(logits.isfinite(), allowed)
    for row in range(1, 40):
        pull, went = ((each[row] - base[row])[allowed[row]] for each in (moved, logits))
        scale = float(went @ pull) / float(pull @ pull)
        assert 0 <= scale <= 1 + 1e-6
        torch.testing.assert_close(went, scale * pull, atol=1e-5, rtol=0)


def test_nothing_to_spend_gives_the_unsteered_logits_and_no_bound_the_steered_ones_bit_for_bit() -> None:
    moved, base, _ = some_logits(9, 300)
    assert torch.equal(within(moved, base, torch.zeros(9))[0], base)
    assert torch.equal(within(moved, base, torch.full((9,), math.inf))[0], moved)


@pytest.mark.parametrize("vocabulary", [300, 40_000])
def test_a_row_comes_out_the_same_alone_and_among_others(vocabulary: int) -> None:
    moved, base, budget = some_logits(6, vocabulary)
    logits, kl = within(moved, base, budget)
    for row in range(6):
        one = slice(row, row + 1)
        alone, spent = within(moved[one], base[one], budget[one])
        assert torch.equal(alone, logits[one])
        assert torch.equal(spent, kl[one])


# -- steering on a budget ---------------------------------------------------------------------------------------------


def by_hand(wave: Wave, rollouts: Rollouts, row: int, forbidden: Tensor) -> tuple[list[float], list[int]]:
    """What a row spends at each position and says there, from one pass of a model without hooks, in plain steps."""
    model, count, ids = tiny.model(), int(rollouts.lengths[row]), wave.prompt.ids
    text = torch.tensor([[*ids, *rollouts.tokens[row, :count].tolist()]])
    with torch.no_grad():
        hidden = model.model(input_ids=text).last_hidden_state[0, len(ids) - 1 : -1]
        rows, positions = torch.full((count,), row), torch.arange(count)
        offset = wave.steering.offset(rows, positions, wave.keys[row, :count], None)  # type: ignore[union-attr]
        base, moved = (model.lm_head(each) + forbidden for each in (hidden, hidden + offset))
    base[: wave.sampling.min_tokens, 1] = moved[: wave.sampling.min_tokens, 1] = -torch.inf  # the end token
    left, spent, said = float(wave.kl_budget or 0), [], []
    for at in range(count):
        one, other = moved[at : at + 1].double(), base[at : at + 1].double()
        low, high = 0.0, 1.0
        logits = one
        if float(divergence(one, other)) > left:
            for _ in range(40):
                middle = (low + high) / 2
                logits = other + middle * (one - other).nan_to_num()
                low, high = (middle, high) if float(divergence(logits, other)) <= left else (low, middle)
            logits = other + low * (one - other).nan_to_num()
        spent.append(float(divergence(logits, other)))
        left -= spent[-1]
        cdf = logits[0].softmax(dim=-1).cumsum(dim=-1)
        said.append(int((cdf < float(uniform(wave.keys[row, at : at + 1]))).sum()))
    return spent, said


@pytest.mark.parametrize("steering", STEERINGS, ids=["shared", "gaussian"])
def test_what_is_spent_and_said_is_what_a_model_without_hooks_says_by_hand(engine, steering) -> None:
    wave = replace(steered(engine, steering), kl_budget=1.0)
    rollouts = decode(engine, wave)
    for row in range(len(wave)):
        count = int(rollouts.lengths[row])
        spent, said = by_hand(wave, rollouts, row, engine._vocabulary.forbidden)
        assert said == rollouts.tokens[row, :count].tolist()
        assert rollouts.observed["kl"][row, :count].tolist() == pytest.approx(spent, abs=1e-4)
        assert sum(spent) <= 1.0 + 1e-5
        assert not rollouts.observed["kl"][row, count:].any()


@pytest.mark.parametrize("steering", STEERINGS, ids=["shared", "gaussian"])
@pytest.mark.parametrize("budget", [0.05, 0.7, 3.0])
def test_the_sum_over_a_row_never_passes_the_budget(engine, steering, budget) -> None:
    free, bound = (
        decode(engine, replace(steered(engine, steering, 16), kl_budget=nats)).observed["kl"].double().sum(dim=1)
        for nats in (math.inf, budget)
    )
    assert float(free.max()) > budget
    assert float(bound.max()) <= budget
    assert float(bound.max()) > 0.99 * budget


def test_a_budget_of_nothing_is_plain_sampling(engine) -> None:
    wave = steered(engine, STEERINGS[0])
    plain = decode(engine, replace(wave, steering=None))
    assert not torch.equal(decode(engine, wave).tokens, plain.tokens)
    nothing = decode(engine, replace(wave, kl_budget=0.0))
    assert torch.equal(nothing.tokens, plain.tokens)
    assert not nothing.observed["kl"].any()


def test_an_infinite_budget_is_no_budget(engine) -> None:
    wave = steered(engine, STEERINGS[1], top_p=0.9, temperature=0.8)
    free, infinite = decode(engine, wave), decode(engine, replace(wave, kl_budget=math.inf))
    assert torch.equal(free.tokens, infinite.tokens)
    assert free.responses == infinite.responses


def test_a_wave_on_a_budget_is_answered_alike_alone_and_among_others(engine) -> None:
    waves = [replace(steered(engine, STEERINGS[i % 2], 3 + i, seed=i), kl_budget=0.4 * (i + 1)) for i in range(3)]
    waves += [
        steered(engine, STEERINGS[0], 4, seed=7),
        replace(steered(engine, STEERINGS[0], 5, seed=8), steering=None),
    ]
    alone = [decode(engine, wave) for wave in waves]
    barrier = threading.Barrier(len(waves))

    def call(wave: Wave) -> Rollouts:
        barrier.wait()
        return decode(engine, wave)

    with ThreadPoolExecutor(len(waves)) as pool:
        together = list(pool.map(call, waves))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert one.observed.keys() == other.observed.keys()
        assert all(torch.equal(one.observed[name], other.observed[name]) for name in one.observed)


def test_rows_that_a_wave_loses_change_nothing_for_the_others(engine) -> None:
    spent = torch.linspace(0, 1, 8, dtype=torch.float64)
    wave = replace(steered(engine, STEERINGS[0], 8), kl_budget=1.0, kl_spent=spent)
    whole, part = decode(engine, wave), decode(engine, first_rows(wave, 5))
    assert torch.equal(whole.tokens[:5], part.tokens)
    assert torch.equal(whole.observed["kl"][:5], part.observed["kl"])
    assert bool((whole.observed["kl"].double().sum(dim=1) + spent <= 1).all())


def test_steps_by_graphs_keep_the_budget_too(engine) -> None:
    def capture(run):
        run()
        return run

    graphed = TransformersEngine(tiny.model(), tiny.tokenizer())
    graphed._graphs = StepGraphs(graphed.cache, graphed._head, WIDTH, capture)  # type: ignore[arg-type]
    wave = replace(steered(engine, STEERINGS[1]), kl_budget=0.5)
    expected, got = decode(engine, wave), decode(graphed, wave)
    assert graphed._graphs._known
    assert torch.equal(expected.tokens, got.tokens)
    torch.testing.assert_close(expected.observed["kl"], got.observed["kl"], atol=1e-4, rtol=0)


def test_steering_is_bounded_among_what_a_grammar_allows(engine) -> None:
    wave = steered(engine, STEERINGS[0], grammar=Grammar('start: "7" /[0-9]{6}/'))
    kl = decode(engine, replace(wave, kl_budget=0.2)).observed["kl"]
    assert bool((kl[:, 0] == 0).all())  # one token only: nowhere to go
    assert 0.19 < float(kl.double().sum(dim=1).max()) <= 0.2


def test_steering_on_a_budget_is_refused_where_nothing_is_drawn(engine) -> None:
    greedy = steered(engine, STEERINGS[0], temperature=0.0)
    with pytest.raises(ValueError, match="at temperature 0 .argmax. none is drawn: sample"):
        replace(greedy, kl_budget=1.0)
    assert replace(greedy, steering=None, kl_budget=1.0).kl_budget == 1.0


# -- searches on a KL budget ------------------------------------------------------------------------------------------


def value_network(width: int) -> ValueNetwork:
    keys = torch.arange(4)
    return ValueNetwork(
        normal(fold(1, keys), width),
        normal(torch.tensor(2), 4),
        normal(fold(3, keys), 4),
        normal(torch.tensor(4), 4),
        normal(torch.tensor(5), 4),
        torch.tensor(0.5),
    )


STEERING_METHODS: list[Method[Any]] = [
    PublishedAISP(samples_per_iteration=6, iterations=2, sigma=0.6, decode="sample"),
    MISVO(samples_per_iteration=6, iterations=2, learning_rate=1.0),
    REControl(value_network(WIDTH), 0.3, 2, method=BestOfN(samples=8)),
    REControl(value_network(WIDTH), 0.3, 2, method=QAlign(samples=8, chains=4)),
    AISP(samples=12, iterations=2, control_kl=0.5),
]


@pytest.mark.parametrize("method", STEERING_METHODS, ids=lambda method: method.name)
def test_every_method_that_steers_keeps_to_the_budget_with_all_that_its_responses_keep(engine, method) -> None:
    reward, sampling = as_reward(letters_a_to_m), Sampling(LENGTH)
    found = [
        align(engine, reward, method, CHAT, sampling=sampling, budget=Budget(kl_budget=nats)).candidates
        for nats in (0.3, math.inf)
    ]
    bound, free = ([candidate.kl or 0.0 for candidate in candidates] for candidates in found)
    assert 0 < max(bound) <= 0.3
    assert max(free) > 0.3
    unbounded = align(engine, reward, method, CHAT, sampling=sampling).candidates
    assert [replace(candidate, kl=None) for candidate in found[1]] == list(unbounded)


@dataclass(frozen=True)
class Keeping:
    """Four steered rows, then four that keep five of their tokens and a sixth that nobody drew."""

    name: str = "keeping"
    iterations: int = 2

    def init(self, problem: Problem) -> tuple[Problem, tuple[Wave, Rollouts] | None]:
        return problem, None

    def propose(self, state: Any) -> Wave:
        problem, before = state
        keys = wave_keys(problem.prompt.key, int(before is not None), torch.arange(4), LENGTH)
        prefix, cut = torch.zeros_like(keys), torch.zeros(4, dtype=torch.int64)
        if before is not None:
            keys[:, :5], prefix[:, :5], prefix[:, 5] = before[0].keys[:, :5], before[1].tokens[:, :5], 70
            cut += 6
        return Wave(problem.prompt, prefix, cut, keys, problem.sampling, STEERINGS[0])

    def update(self, state: Any, wave: Wave, rollouts: Rollouts, rewards: Tensor) -> tuple[Any, Info]:
        return (state[0], (wave, rollouts)), {"ess": 4.0, "control_kl": 0.0}


def test_children_carry_what_their_kept_tokens_have_spent(engine) -> None:
    recorded: list[tuple[Wave, Rollouts]] = []

    class Recording(Keeping):
        def update(self, state: Any, wave: Wave, rollouts: Rollouts, rewards: Tensor) -> tuple[Any, Info]:
            recorded.append((wave, rollouts))
            return super().update(state, wave, rollouts, rewards)

    sampling = Sampling(LENGTH, min_tokens=LENGTH)
    aligned = align(
        engine, as_reward(letters_a_to_m), Recording(), CHAT, sampling=sampling, budget=Budget(kl_budget=2.0)
    )
    (_, parents), (wave, children) = recorded
    kept = parents.observed["kl"][:, :5].double().sum(dim=1)
    assert bool((kept > 0).all())
    assert torch.equal(wave.kl_spent, kept)
    own = children.observed["kl"].double().sum(dim=1)
    assert not children.observed["kl"][:, :6].any()
    assert bool((kept + own <= 2.0).all())
    told = {candidate.row: candidate.kl for candidate in aligned.candidates if candidate.iteration == 1}
    assert [told[row] for row in range(4)] == pytest.approx((kept + own).tolist())


def test_an_unsteered_search_spends_nothing_of_a_kl_budget_and_stays_what_it_was() -> None:
    method, arguments = AISP(samples=16, iterations=2), {"sampling": Sampling(max_tokens=8, temperature=0.0)}
    plain, bound = (
        align(ToyEngine(), ToyReward(counts("a")), method, CHAT, budget=budget, **arguments)
        for budget in (Budget(), Budget(kl_budget=0.5))
    )
    assert [candidate.kl for candidate in bound.candidates] == [0.0] * 16
    assert [replace(candidate, kl=None) for candidate in bound.candidates] == list(plain.candidates)
    assert bound.trace[-1].numbers["kl"] == 0.0
    assert "kl" not in plain.trace[-1].numbers


def test_argmax_controls_on_a_kl_budget_are_refused_with_a_remedy(engine) -> None:
    budget, reward = Budget(kl_budget=1.0), as_reward(letters_a_to_m)
    for method in (AISP.published(samples_per_iteration=4), REControl(value_network(WIDTH))):
        with pytest.raises(ValueError, match="decode='sample'; or bound the answer itself with min_base_logprob"):
            align(engine, reward, method, CHAT, sampling=Sampling(4), budget=budget)


def test_an_engine_that_cannot_bound_its_steering_is_named() -> None:
    method = PublishedAISP(samples_per_iteration=4, iterations=1, decode="sample")
    with pytest.raises(ValueError, match="this engine cannot bound how far it steers; leave out kl_budget"):
        align(ToyEngine(), ToyReward(counts("a")), method, CHAT, sampling=Sampling(4), budget=Budget(kl_budget=1.0))


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"kl_budget": -0.1}, "kl_budget must not be negative, got -0.1"),
        ({"kl_budget": math.nan}, "kl_budget"),
        ({"min_base_logprob": 0.5}, "min_base_logprob must be at most 0, the logarithm of certainty, got 0.5"),
        ({"min_base_logprob": math.nan}, "min_base_logprob"),
    ],
)
def test_limits_that_nothing_can_keep_are_named(limits: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Budget(**limits)


# -- what may be returned ---------------------------------------------------------------------------------------------

TOY = Sampling(max_tokens=8)
TALKATIVE = partial(ToyEngine, end_bias=-1.0)
METHODS: list[Method[Any]] = [
    Greedy(),
    BestOfN(samples=24, samples_per_wave=8),
    PublishedAISP(samples_per_iteration=8, iterations=3, sigma=1.0),
    PublishedAISP(samples_per_iteration=8, iterations=3, sigma=1.0, decode="sample"),
    AISP(samples=24, iterations=3),
    AISP(samples=24, iterations=3, control_kl=0.5),
    ARGS(candidates=4, temperature=1.0, chains=3),
    QAlign(samples=24, chains=8),
    QAlign(samples=24, chains=8, answer="last"),
    MISVO(samples_per_iteration=8, iterations=3),
    REControl(value_network(ToyEngine.width), 0.05, 3, method=BestOfN(samples=24)),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def toy_search(method: Method[Any], least: float | None, engine: ToyEngine | None = None, **settings: Any) -> Aligned:
    budget = Budget(min_base_logprob=least)
    reward = ToyReward(variety)
    return align(engine or TALKATIVE(), reward, method, CHAT, **{"sampling": TOY, "budget": budget, **settings})


def variety(response: Response) -> float:
    return float(len(set(response.text)))


@cache
def loglikelihood(tokens: tuple[int, ...]) -> float:
    """Log-probability of a text in the toy world, position by position."""
    engine, total = TALKATIVE(), 0.0
    prompt = engine.encode(CHAT)
    for at, token in enumerate(tokens):
        before = torch.tensor([[*tokens[:at], *[-1] * (TOY.max_tokens - at)]])
        hidden = engine.prelogits(prompt, before, torch.tensor([at]))
        total += float(engine.logits(hidden, torch.tensor([at]), TOY).log_softmax(dim=-1)[0, token])
    return total


def whole_and_likely(candidate: Candidate) -> tuple[bool, float]:
    return candidate.response.complete, loglikelihood(candidate.tokens)


@dataclass
class Watched:
    """A method whose last state can be seen."""

    method: Method[Any]
    state: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def update(self, *arguments: Any) -> Any:
        self.state, info = self.method.update(*arguments)
        return self.state, info

    def standing(self, aligned: Aligned) -> list[Candidate]:
        """What may be the answer: for a few methods not all that they have decoded."""
        answers = getattr(self.state, "answers", frozenset())
        found = [candidate for candidate in aligned.candidates if (candidate.iteration, candidate.row) in answers]
        return found or list(aligned.candidates)


@every_method
def test_the_answer_is_the_best_of_those_that_are_likely_enough(method: Method[Any]) -> None:
    watched = Watched(method)
    free = toy_search(watched, None)
    told = [loglikelihood(candidate.tokens) for candidate in watched.standing(free)]
    least = sorted(told)[len(told) // 2] - 1e-3  # the median
    bound = toy_search(watched, least)
    likely = [c for c in watched.standing(bound) if loglikelihood(c.tokens) >= least]
    assert len(likely) == sum(logprob >= least for logprob in told) >= len(told) / 2
    assert bound.stopped == free.stopped
    assert bound.best.rank == min(candidate.rank for candidate in likely)
    assert bound.best.base_logprob == pytest.approx(loglikelihood(bound.best.tokens), abs=1e-4)
    assert bound.best.base_logprob >= least
    assert bound.trace[-1].numbers["base_logprob"] == bound.best.base_logprob


@every_method
def test_where_nothing_is_likely_enough_the_likeliest_is_the_answer_and_the_search_says_so(method: Method[Any]) -> None:
    watched = Watched(method)
    bound = toy_search(watched, -1e-3)
    assert bound.stopped == "infeasible"
    standing = watched.standing(bound)
    assert bound.best.tokens == max(standing, key=whole_and_likely).tokens
    assert bound.feasible == (bound.best,)
    assert [now.feasible for now in bound.trace] == [False] * len(bound.trace)
    assert bound.trace[-1].response == bound.best.response
    assert bound.best.base_logprob == pytest.approx(loglikelihood(bound.best.tokens), abs=1e-4)


@every_method
def test_a_limit_that_bounds_nothing_changes_nothing(method: Method[Any]) -> None:
    free, told = toy_search(method, None), toy_search(method, -math.inf)
    assert told.stopped == free.stopped
    assert [replace(c, base_logprob=None) for c in told.candidates] == list(free.candidates)
    assert told.best.base_logprob == pytest.approx(loglikelihood(told.best.tokens), abs=1e-4)
    assert free.best.base_logprob is None
    assert "feasible" not in free.trace[-1].numbers


def test_the_trace_tells_the_best_likely_response_after_each_wave() -> None:
    method = BestOfN(samples=32, samples_per_wave=4)
    least = max(loglikelihood(candidate.tokens) for candidate in toy_search(method, None).candidates) - 1e-3
    bound = toy_search(method, least, seed=2)  # which finds the likeliest response in its third wave
    for now in bound.trace:
        so_far = [c for c in bound.candidates if c.iteration <= now.iteration]
        likely = [c for c in so_far if loglikelihood(c.tokens) >= least]
        best = min(likely, key=lambda c: c.rank) if likely else max(so_far, key=whole_and_likely)
        assert (now.response, now.best, now.feasible) == (best.response, best.reward, bool(likely))
    assert {now.feasible for now in bound.trace} == {False, True}


def test_an_unlikely_response_is_never_good_enough() -> None:
    method, target = BestOfN(samples=32, samples_per_wave=8), 4.0
    free = toy_search(method, None, budget=Budget(target_reward=target))
    assert free.stopped == "target_reward"
    bound = toy_search(method, None, budget=Budget(target_reward=target, min_base_logprob=-1e-3))
    assert (bound.stopped, len(bound.trace)) == ("infeasible", 4)


def test_only_what_could_be_returned_is_looked_at_and_only_once() -> None:
    def checked(least: float | None) -> list[tuple[int, ...]]:
        engine = TALKATIVE()
        toy_search(BestOfN(samples=32, samples_per_wave=4), least, engine)
        waves = [wave for wave in engine.waves if wave.forced]
        assert all(wave.observe == {"base_logprobs"} for wave in waves)
        texts = [tuple(row[row >= 0].tolist()) for wave in waves for row in wave.prefix]
        return [text for text in texts if text[-1] == END or len(text) == TOY.max_tokens]  # whole, not to a block's end

    loose, tight = checked(-1e6), checked(-1e-3)
    assert checked(None) == []
    assert len(loose) == len(set(loose))
    assert len(tight) == len(set(tight))
    assert len(loose) < len(tight) / 3


def test_time_that_is_up_does_not_keep_the_answer_from_being_checked() -> None:
    engine = TALKATIVE()
    bound = toy_search(
        BestOfN(samples=16, samples_per_wave=8), None, engine, budget=Budget(seconds=1e6, min_base_logprob=-20.0)
    )
    assert {wave.forced: deadline is None for wave, deadline in zip(engine.waves, engine.deadlines, strict=True)} == {
        False: False,
        True: True,
    }
    assert bound.best.base_logprob is not None
    assert bound.samples == 16


def test_as_many_distinct_answers_are_checked_as_are_wanted() -> None:
    method, least = BestOfN(samples=48, samples_per_wave=16), -5.0
    one, several = toy_search(method, least), toy_search(method, least, answers=4)
    assert several.feasible[0] == one.best
    assert len(several.feasible[:4]) == 4
    assert len({candidate.response.text for candidate in several.feasible}) == len(several.feasible)
    ranks = [candidate.rank for candidate in several.candidates if loglikelihood(candidate.tokens) >= least]
    assert [candidate.rank for candidate in several.feasible[:4]] == sorted(ranks)[:4]


async def test_a_bound_search_is_the_same_for_asynchronous_callers() -> None:
    method, settings = AISP(samples=24, iterations=3), {"sampling": TOY, "budget": Budget(min_base_logprob=-11.0)}
    engine, reward = TALKATIVE(threaded=True), ToyReward(variety)
    sync = align(engine, reward, method, CHAT, **settings)
    asynchronous = await aalign(engine, reward, method, CHAT, **settings)
    assert (asynchronous.candidates, asynchronous.stopped) == (sync.candidates, sync.stopped)


def test_likelihoods_are_those_of_a_model_without_hooks(engine) -> None:
    limits = Budget(min_base_logprob=-math.inf, kl_budget=2.0)
    method = AISP(samples=12, iterations=2, control_kl=0.5)
    aligned = align(engine, as_reward(letters_a_to_m), method, CHAT, sampling=Sampling(LENGTH), budget=limits)
    ids, tokens = aligned.prompt.ids, aligned.best.tokens
    with torch.no_grad():
        logits = tiny.model()(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1]
    logits = logits + engine._vocabulary.forbidden
    logits[0, 1] = -torch.inf  # no end before the first token
    expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(tokens)[:, None]).sum()
    assert aligned.best.base_logprob == pytest.approx(float(expected), abs=1e-3)


def test_likelihoods_count_what_a_grammar_allows(engine) -> None:
    sampling = Sampling(LENGTH, grammar=Grammar('start: "7" /[0-9]{4}/'), stop=("x",))
    limits = Budget(min_base_logprob=-math.inf)
    aligned = align(engine, as_reward(letters_a_to_m), Greedy(), CHAT, sampling=sampling, budget=limits)
    assert len(aligned.best.response.text) == 5
    assert aligned.best.base_logprob == pytest.approx(aligned.trace[0].info["base_logprob"], abs=1e-3)


def test_an_engine_that_cannot_say_given_tokens_is_named() -> None:
    class Drawing(ToyEngine):
        def decode(self, wave: Wave, *rest: Any) -> Rollouts:
            return super().decode(replace(wave, forced=False), *rest)

    with pytest.raises(ValueError, match="cannot tell how likely a response is: leave out min_base_logprob"):
        toy_search(BestOfN(samples=8), -5.0, Drawing())


def test_a_wave_that_says_answers_says_each_token_once_and_in_order() -> None:
    prompt, answers = ToyEngine().encode(CHAT), [(1, 2, 3, 4, 5, 6, 7), (8,), (9, 1)]
    wave = Wave.saying(prompt, answers, Sampling(max_tokens=30, min_tokens=5, stop=("a",)), {"base_logprobs"})
    assert wave.prefix[wave.said].tolist() == [token for answer in answers for token in answer]
    assert wave.sampling.max_tokens == wave.prefix.shape[1] == 7
    assert int(wave.said.sum(dim=1).max()) == 3  # three steps for seven tokens
    assert END not in wave.prefix


# -- in LangChain -----------------------------------------------------------------------------------------------------


def chat_model(engine: TransformersEngine, **options: Any) -> AISPChatModel:
    return AISPChatModel(
        **{"engine": engine, "reward": letters_a_to_m, "method": BestOfN(16), "max_tokens": 8, **options}
    )


def test_the_metadata_tell_how_likely_the_answer_is_and_when_none_was_likely_enough(engine) -> None:
    free = chat_model(engine).invoke("Hello").response_metadata
    assert not {"base_logprob", "kl"} & free.keys()
    likely = chat_model(engine, min_base_logprob=-1000.0).invoke("Hello").response_metadata
    assert likely["base_logprob"] < 0
    assert (likely["stopped"], likely["reward"]) == ("iterations", free["reward"])
    assert likely["trace"][-1]["base_logprob"] == likely["base_logprob"]
    none = chat_model(engine).invoke("Hello", min_base_logprob=-0.5).response_metadata
    assert none["stopped"] == "infeasible"
    assert likely["base_logprob"] <= none["base_logprob"] < -0.5
    assert none["trace"][-1]["feasible"] is False


def test_the_metadata_tell_how_far_the_answer_was_steered(engine) -> None:
    method = PublishedAISP(samples_per_iteration=8, iterations=2, sigma=0.6, decode="sample")
    metadata = chat_model(engine, method=method, kl_budget=0.25).invoke("Hello").response_metadata
    assert 0 < metadata["kl"] <= 0.25
    assert metadata["trace"][-1]["kl"] == metadata["kl"]


async def test_a_stream_and_an_asynchronous_call_bring_the_same_limits(engine) -> None:
    chat = chat_model(engine, min_base_logprob=-60.0)
    [*_, last] = list(chat.stream("Hello"))
    answer = await chat.ainvoke("Hello")
    assert last.response_metadata["base_logprob"] == answer.response_metadata["base_logprob"] >= -60


def test_every_generation_is_likely_enough(engine) -> None:
    def generations(least: float) -> list[float]:
        [found] = chat_model(engine, n=16, min_base_logprob=least).generate([[HumanMessage("Hello")]]).generations
        return [generation.message.response_metadata["base_logprob"] for generation in found]

    told = sorted(generations(-math.inf))
    half = told[len(told) // 2 :]
    assert sorted(generations(half[0])) == half


def test_the_tighter_of_field_and_budget_holds_and_both_are_part_of_the_cache_key(engine) -> None:
    budget = Budget(kl_budget=2.0, min_base_logprob=-30.0)
    chat = chat_model(engine, budget=budget, kl_budget=3.0, min_base_logprob=-20.0)
    assert (chat._budget.kl_budget, chat._budget.min_base_logprob) == (2.0, -20.0)
    keys = {
        chat_model(engine, **limits)._get_llm_string()
        for limits in ({}, {"kl_budget": 1.0}, {"kl_budget": 2.0}, {"min_base_logprob": -9.0})
    }
    assert len(keys) == 4
    with pytest.raises(ValueError, match="min_base_logprob must be at most 0"):
        chat_model(engine, min_base_logprob=1.0)


def test_the_news_of_a_bound_search_are_numbers_and_flags(engine) -> None:
    steps = iterate(
        engine,
        as_reward(letters_a_to_m),
        BestOfN(8, samples_per_wave=4),
        CHAT,
        sampling=Sampling(6),
        budget=Budget(min_base_logprob=-0.1),
    )
    numbers = [step.numbers for step in steps if isinstance(step, Iteration)]
    assert [(set(line) >= {"base_logprob", "feasible"}, line["feasible"]) for line in numbers] == [(True, False)] * 2


# -- the frontier -----------------------------------------------------------------------------------------------------


def test_the_frontier_has_a_point_per_budget_and_is_drawn(engine, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(frontier, "WAVE", 2)
    monkeypatch.setattr(frontier, "KL_BUDGETS", (0.1, math.inf))
    monkeypatch.setattr(frontier, "FLOORS", (-12.0, -math.inf))
    gold = as_reward(lambda chat, responses: [float(len(text)) for text in responses])
    opened = Opened("toy", engine, as_reward(letters_a_to_m), gold, (PromptRecord("0", CHAT), PromptRecord("1", CHAT)))
    monkeypatch.setattr(frontier, "open_pair", lambda *_: opened)
    monkeypatch.setitem(PAIRS, "demo", replace(PAIRS["demo"], max_tokens=5))
    monkeypatch.setattr("sys.argv", [str(frontier.__file__), "--samples", "4", "--prompts", "2"])
    frontier.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    points = {(point["family"], point["setting"]): point for point in found["points"]}
    assert len(points) == 3 + 3 * 2 + 2 + 3
    assert all(point["gold"]["mean"] >= 1 for point in points.values())
    plain = points["best of n", 1]
    assert (plain["kl"], plain["surprise"]["mean"]) == (0.0, 0.0)
    assert points["best of n", 4]["kl"] == pytest.approx(math.log(4) - 3 / 4)
    for family in ("published, sampled", "misvo"):
        assert points[family, 0.1]["most_steered"] <= 0.1
        assert points[family, 0.1]["kl"] == pytest.approx(
            points[family, 0.1]["steered"]["mean"] + points["best of n", 4]["kl"]
        )
    assert points["published, sampled", "inf"]["most_steered"] > 0.1
    assert points["aisp, floors", -12.0]["kl"] is None
    assert points["aisp, floors", -12.0]["least_logprob"] >= points["aisp, floors", "-inf"]["least_logprob"]
    pictures = plots.draw(tmp_path)
    assert [text.count("<polyline") for text in pictures.values()] == [3, 6, 6]  # of KL divergence nobody knows half
