"""What every method promises, whatever it does."""

import asyncio
import copy
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from langchain_aisp import methods
from langchain_aisp.align import Aligned, Budget, Iteration, aalign, align
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.methods import AISP, ARGS, MISVO, BestOfN, Greedy, PublishedAISP, QAlign, REControl, ValueNetwork
from langchain_aisp.noise import fold, normal
from langchain_aisp.rewards import as_reward
from langchain_aisp.types import Grammar, Method, Response, Sampling, Wave
from tests import tiny
from tests.toy import CHAT, ToyEngine, ToyReward, counts, outcome, play, problem, spells, waves_of

SAMPLING = Sampling(max_tokens=10)


def value_network(width: int, hidden: int = 6) -> ValueNetwork:
    """Some value of pre-logits of a width."""
    return ValueNetwork(
        normal(fold(1, torch.arange(hidden)), width),
        normal(torch.tensor(2), hidden),
        normal(fold(3, torch.arange(hidden)), hidden),
        normal(torch.tensor(4), hidden),
        normal(torch.tensor(5), hidden),
        torch.tensor(0.5),
    )


VALUE = value_network(ToyEngine.width)
STEPS = {"step_size": 0.05, "steps": 3}

METHODS: list[Method[Any]] = [
    Greedy(),
    BestOfN(samples=24, samples_per_wave=8),
    PublishedAISP(samples_per_iteration=8, iterations=3, sigma=1.0),
    PublishedAISP(samples_per_iteration=8, iterations=3, sigma=0.5, horizon=4, decode="sample"),
    AISP(samples=24, iterations=3),
    AISP(samples=24, iterations=3, control_kl=0.5),
    ARGS(candidates=4),
    ARGS(candidates=3, temperature=1.0, chains=3),
    QAlign(samples=24, chains=8),
    QAlign(samples=24, chains=5, reward_temperature=0.5, answer="last"),
    MISVO(samples_per_iteration=8, iterations=3),
    MISVO(samples_per_iteration=8, iterations=3, learning_rate=0.5, horizon=4),
    REControl(VALUE, **STEPS),
    REControl(VALUE, **STEPS, method=BestOfN(samples=24, samples_per_wave=8)),
    REControl(VALUE, **STEPS, method=AISP(samples=24, iterations=3, control_kl=0.5)),
]
ROWS = {"greedy": 1, "re_control": 1, "args": None}
"""How many responses they decode; None where their lengths decide, 24 where nothing is said."""


def names(method: Method[Any]) -> str:
    return method.name


every_method = pytest.mark.parametrize("method", METHODS, ids=names)
methods_that_draw = pytest.mark.parametrize("method", [m for m in METHODS if ROWS.get(m.name, 24) == 24], ids=names)
methods_never_worse_than_their_first_wave = pytest.mark.parametrize(
    "method", [m for m in METHODS if m.name in ("best_of_n", "aisp", "qalign", "misvo")], ids=names
)


def same(left: Any, right: Any) -> bool:
    """Equality that looks into records, containers and tensors."""
    if isinstance(left, Tensor):
        alike = isinstance(right, Tensor) and left.shape == right.shape
        return alike and torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)
    if dataclasses.is_dataclass(left):
        names = [entry.name for entry in dataclasses.fields(left)]
        return type(left) is type(right) and all(same(getattr(left, name), getattr(right, name)) for name in names)
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


@dataclass
class Recorder:
    """A method that keeps copies of what passed through it."""

    method: Method[Any]
    seen: list[tuple[Any, Any]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def propose(self, state: Any) -> Wave:
        first = self.method.propose(state)
        assert same(first, self.method.propose(state)), "the same state proposed two different waves"
        return first

    def update(self, state: Any, *arguments: Any) -> Any:
        self.seen.append((state, copy.deepcopy(state)))
        before = copy.deepcopy(arguments)
        result = self.method.update(state, *arguments)
        assert same(result, self.method.update(state, *arguments)), "the same update gave two different states"
        assert same(arguments, before), "an update changed what it was given"
        return result


def test_every_method_is_tested_here() -> None:
    tested = {type(method).__name__ for method in METHODS}
    assert tested == set(methods.__all__) - {"ValueNetwork"}


@every_method
def test_hyper_parameters_and_states_are_frozen(method: Method[Any]) -> None:
    for record in (method, method.init(problem(ToyEngine(), SAMPLING))):
        assert dataclasses.is_dataclass(record)
        name = next((entry.name for entry in dataclasses.fields(record)), "anything")
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, None)


@every_method
def test_its_text_tells_all_hyper_parameters(method: Method[Any]) -> None:
    def known_value(width: int, hidden: int, fingerprint: str) -> ValueNetwork:
        assert (width, hidden, fingerprint) == (8, 6, VALUE.fingerprint)
        return VALUE

    scope = {name: getattr(methods, name) for name in methods.__all__}
    assert eval(repr(method), {**scope, "ValueNetwork": known_value}) == method


@every_method
def test_verbs_are_pure(method: Method[Any]) -> None:
    recorder = Recorder(method)
    aligned = outcome(play(recorder, ToyEngine(), spells("badge"), SAMPLING))
    assert len(recorder.seen) >= len(aligned.trace)  # more where rows take the places of others
    assert all(same(state, earlier) for state, earlier in recorder.seen), "an update changed an old state in place"


@every_method
def test_waves_are_well_formed(method: Method[Any]) -> None:
    engine = ToyEngine()
    for wave, _ in waves_of(method):
        rows, length = len(wave), wave.sampling.max_tokens
        assert rows > 0
        assert length <= SAMPLING.max_tokens
        assert wave.prefix.shape == wave.keys.shape == (rows, length)
        assert {wave.prefix.dtype, wave.cut.dtype, wave.keys.dtype} == {torch.int64}
        assert ((wave.cut >= 0) & (wave.cut <= length)).all()
        kept = torch.arange(length) < wave.cut.unsqueeze(1)
        assert ((wave.prefix >= 0) & (wave.prefix <= engine.letters))[kept].all()


@methods_that_draw
def test_first_wave_rows_differ_from_the_very_first_token_on(method: Method[Any]) -> None:
    wave, rollouts = waves_of(method)[0]
    assert (wave.cut == 0).all()
    assert len(set(wave.keys[:, 0].tolist())) == len(wave)
    assert len(set(rollouts.tokens[:, 0].tolist())) > 1


@every_method
def test_a_child_keeps_its_parents_tokens_and_keys(method: Method[Any]) -> None:
    known_tokens, known_keys = torch.empty(0, 10, dtype=torch.int64), torch.empty(0, 10, dtype=torch.int64)
    for wave, rollouts in waves_of(method):
        for row, cut in enumerate(wave.cut.tolist()):
            if rollouts.lengths[row] == cut:  # a whole text may be put together from several; nothing of it is drawn
                continue
            before = max(cut - 1, 0)  # the last kept token, with its key, may be another than the parent's
            parents = (known_tokens[:, :before] == wave.prefix[row, :before]).all(dim=1)
            parents &= (known_keys[:, :before] == wave.keys[row, :before]).all(dim=1)
            assert cut == 0 or parents.any()
        missing = 10 - wave.keys.shape[1]
        known_tokens = torch.cat([known_tokens, pad(rollouts.tokens, (0, missing), value=-1)])
        known_keys = torch.cat([known_keys, pad(wave.keys, (0, missing))])


@every_method
def test_the_same_seed_gives_the_same_search(method: Method[Any]) -> None:
    first, again = (waves_of(method, seed=1) for _ in range(2))
    assert same([rollouts.tokens for _, rollouts in first], [rollouts.tokens for _, rollouts in again])


@methods_that_draw
def test_another_seed_gives_another_search(method: Method[Any]) -> None:
    first, other = (waves_of(method, seed=seed) for seed in (1, 2))
    assert not same([rollouts.tokens for _, rollouts in first], [rollouts.tokens for _, rollouts in other])


@every_method
def test_a_constant_added_to_the_rewards_changes_nothing(method: Method[Any]) -> None:
    plain, shifted = (
        outcome(play(method, ToyEngine(), lambda response: spells("badge")(response) + shift, SAMPLING))  # noqa: B023
        for shift in (0.0, -64.0)
    )
    assert [c.tokens for c in plain.candidates] == [c.tokens for c in shifted.candidates]
    assert plain.best.reward == shifted.best.reward + 64


@every_method
@pytest.mark.parametrize("samples", [1, 3, 11, 20])
def test_a_shortened_wave_is_learned_from_like_any_other(method: Method[Any], samples: int) -> None:
    whole, short = (
        outcome(play(method, ToyEngine(), spells("badge"), SAMPLING, budget=Budget(samples=limit)))
        for limit in (None, samples)
    )
    assert len(short.candidates) == min(samples, len(whole.candidates))
    assert all(math.isfinite(number) for step in short.trace for number in step.info.values())


@every_method
def test_what_is_reported_is_in_range(method: Method[Any]) -> None:
    played = list(play(method, ToyEngine(), spells("badge"), SAMPLING))
    ended = [len(answer.responses) for request, answer in played if isinstance(request, Wave)]
    steps = [request for request, _ in played if isinstance(request, Iteration)]
    aligned = played[-1][0]
    assert len(ended) >= len(steps)
    assert len(steps) <= method.iterations
    if len(ended) == len(steps):  # whole waves
        assert len(steps) == method.iterations or aligned.stopped == "finished"
        assert all(step.ess <= count * (1 + 1e-6) for step, count in zip(steps, ended, strict=True))
    for step in steps:
        assert 1 <= step.ess <= step.samples
        assert 0 <= step.control_kl < math.inf
    assert sum(ended) == aligned.samples == (ROWS.get(method.name, 24) or aligned.samples)


@every_method
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=1),
        Sampling(max_tokens=4, min_tokens=4),
        Sampling(max_tokens=6, min_tokens=0),
        Sampling(max_tokens=10, temperature=0.0),
        Sampling(max_tokens=10, top_p=0.5, top_k=3, stop=("a", "bc")),
    ],
    ids=["one token", "all cut off", "may be empty", "argmax", "narrow"],
)
def test_any_sampling_is_served(method: Method[Any], sampling: Sampling) -> None:
    aligned = outcome(play(method, ToyEngine(), counts("d"), sampling))
    assert isinstance(aligned, Aligned)
    assert all(len(candidate.tokens) <= sampling.max_tokens for candidate in aligned.candidates)
    assert not any(stop in candidate.response.text for stop in sampling.stop for candidate in aligned.candidates)


@every_method
def test_equal_rewards_are_no_trouble(method: Method[Any]) -> None:
    aligned = outcome(play(method, ToyEngine(), lambda response: 0.25, SAMPLING))
    assert aligned.best.reward == 0.25


@every_method
def test_a_deadline_in_the_middle_of_a_wave_leaves_an_answer(method: Method[Any]) -> None:
    steps = iter([0.0] * 4 + [1e300] * 1000)
    engine = ToyEngine(clock=lambda: next(steps))
    reward = ToyReward(counts("a"))
    aligned = align(engine, reward, method, CHAT, sampling=SAMPLING, budget=Budget(seconds=1e6, samples=60))
    assert all(math.isfinite(candidate.reward) for candidate in aligned.candidates)
    assert len(aligned.best.tokens) >= 1


@every_method
async def test_two_prompts_of_a_batch_do_not_touch_each_other(method: Method[Any]) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("Say something.", "And now?")]
    engine, reward = ToyEngine(threaded=True), ToyReward(spells("badge"))
    together = await asyncio.gather(*(aalign(engine, reward, method, chat, sampling=SAMPLING) for chat in chats))
    alone = [align(ToyEngine(), reward, method, chat, sampling=SAMPLING) for chat in chats]
    assert [found.candidates for found in together] == [found.candidates for found in alone]


@methods_never_worse_than_their_first_wave
def test_the_first_wave_is_plain_samples_and_the_answer_never_worse(method: Method[Any]) -> None:
    first_wave, rollouts = waves_of(method)[0]
    assert first_wave.steering is None
    [(_, plain)] = waves_of(BestOfN(samples=len(first_wave)))
    assert torch.equal(rollouts.tokens[rollouts.ended], plain.tokens[rollouts.ended])  # the others go on
    if getattr(method, "answer", "best") == "best":
        for seed in range(4):
            found, least = (
                outcome(play(each, ToyEngine(), counts("d"), SAMPLING, seed=seed)).best
                for each in (method, BestOfN(samples=len(first_wave)))
            )
            assert (found.response.complete, found.reward) >= (least.response.complete, least.reward)


# On a real model


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    with TransformersEngine(tiny.model(), tiny.tokenizer(), name="tiny") as engine:
        yield engine


@every_method
def test_candidates_obey_a_grammar(method: Method[Any], engine: TransformersEngine) -> None:
    if isinstance(method, REControl):
        method = dataclasses.replace(method, value=value_network(engine.head.width))
    letters = as_reward(lambda chat, responses: [float(text.count("b")) for text in responses], name="letters")
    sampling = Sampling(max_tokens=6, grammar=Grammar("start: /[ab]{2,4}/"))
    aligned = align(engine, letters, method, CHAT, sampling=sampling)
    assert re.fullmatch("[ab]{2,4}", aligned.best.response.text)
    assert aligned.best.response.complete
    assert all(re.fullmatch("[ab]{0,4}", candidate.response.text) for candidate in aligned.candidates)


def test_a_response_that_says_nothing_is_the_reward_s_to_judge() -> None:
    aligned = outcome(play(ARGS(candidates=4), ToyEngine(end_bias=9.0), flat, Sampling(max_tokens=6, min_tokens=0)))
    assert aligned.best.response == Response("", "stop")


def flat(response: Response) -> float:
    return 1.0
