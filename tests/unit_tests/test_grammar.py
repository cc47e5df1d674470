"""Grammars: every candidate obeys, whatever the noise, the method and the neighbours."""

import re
from dataclasses import dataclass, replace

import pytest
import torch

from langchain_aisp import AISP, BestOfN, align, as_reward
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.engine.grammar import Grammars
from langchain_aisp.types import Grammar, Response, Sampling, Wave
from tests import tiny

CHAT = [{"role": "user", "content": "Pick a few digits."}]
DIGITS = Grammar(r"start: /[0-9]{3,6}/")
EVERY_TOKEN = torch.ones(272, dtype=torch.bool)
ITEM = Grammar(
    'start: %json {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}'
)


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(tiny.model(), tiny.tokenizer())


def decode(engine: TransformersEngine, wave: Wave):
    return engine.submit(wave).future.result(timeout=60)


def wave_of(engine: TransformersEngine, grammar: Grammar | None, rows: int = 8, length: int = 16, **options) -> Wave:
    return tiny.wave(engine.encode(CHAT, seed=2), rows, length, grammar=grammar, **options)


def test_every_response_obeys_the_grammar_and_ends_by_itself(engine):
    rollouts = decode(engine, wave_of(engine, DIGITS, rows=32, temperature=5.0))
    assert all(re.fullmatch("[0-9]{3,6}", response.text) for response in rollouts.responses)
    assert bool(rollouts.complete.all())
    assert len({response.text for response in rollouts.responses}) > 8
    assert len({len(response.text) for response in rollouts.responses}) > 1


def test_without_it_the_model_says_nothing_of_the_kind(engine):
    rollouts = decode(engine, wave_of(engine, None, rows=16))
    assert not any(re.fullmatch("[0-9]{3,6}", response.text) for response in rollouts.responses)


def test_the_mask_lets_exactly_those_tokens_through_that_the_grammar_accepts_one_by_one():
    tokenizer = tiny.tokenizer()
    grammars = Grammars(tokenizer, EVERY_TOKEN, [1])
    said = tokenizer('{"n": 4', add_special_tokens=False)["input_ids"]
    for kept in range(len(said) + 1):
        matchers = grammars.open(ITEM, [said[:kept]])
        [allowed] = ~matchers.forbidden()
        plain = [token for token in range(272) if matchers._matchers[0].deep_copy().consume_token(token)]
        assert allowed.nonzero().flatten().tolist() == plain
        assert plain


def test_a_child_goes_on_where_its_kept_tokens_have_left_the_grammar(engine):
    wave = wave_of(engine, ITEM, length=24)
    parents = decode(engine, wave)
    child = replace(wave, prefix=parents.tokens, cut=parents.lengths // 2)
    assert decode(engine, child).responses == parents.responses


def test_kept_tokens_that_break_the_grammar_are_an_error(engine):
    wave = wave_of(engine, DIGITS)
    letters = torch.full_like(wave.prefix, engine.token_ids("x")[0])
    with pytest.raises(ValueError, match="breaks the grammar at its token 0 of 2"):
        decode(engine, replace(wave, prefix=letters, cut=torch.full_like(wave.cut, 2)))


def test_neighbours_with_and_without_a_grammar_do_not_disturb_each_other(engine):
    waves = [wave_of(engine, grammar, rows) for grammar, rows in ((DIGITS, 5), (None, 4), (ITEM, 3))]
    alone = [decode(engine, wave) for wave in waves]
    tickets = [engine.submit(wave) for wave in waves]
    together = [ticket.future.result(timeout=60) for ticket in tickets]
    assert [rollouts.responses for rollouts in together] == [rollouts.responses for rollouts in alone]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("start: foo", "cannot be compiled.*foo"),
        ('start: %json {"type": "object", "not": {}}', "cannot be compiled.*not"),
        ("start: <|user|>", "allows nothing here"),
    ],
)
def test_a_grammar_that_cannot_be_followed_fails_its_own_request_alone(engine, source, told):
    good = engine.submit(wave_of(engine, DIGITS))
    bad = engine.submit(wave_of(engine, Grammar(source)))
    with pytest.raises(ValueError, match=re.compile(told, re.DOTALL)):
        bad.future.result(timeout=60)
    assert all(response.text.isdigit() for response in good.future.result(timeout=60).responses)


@pytest.mark.parametrize(
    "method", [BestOfN(16), AISP(32, iterations=4), AISP.published(samples_per_iteration=8, iterations=3)]
)
def test_every_method_searches_within_the_grammar(engine, method):
    reward = as_reward(lambda chat, texts: [float(text.count("7")) for text in texts])
    found = align(engine, reward, method, CHAT, sampling=Sampling(max_tokens=16, grammar=DIGITS))
    assert all(re.fullmatch("[0-9]{3,6}", candidate.response.text) for candidate in found.candidates)
    assert found.best.reward > found.candidates[-1].reward


def test_what_is_observed_is_observed_among_the_allowed_tokens(engine):
    wave = replace(wave_of(engine, Grammar('start: "7" /[0-9]/')), observe=frozenset({"base_logprobs", "alternatives"}))
    observed = decode(engine, wave).observed
    assert torch.equal(observed["base_logprobs"][:, 0], torch.zeros(8))  # the first token has no choice
    assert bool((observed["base_logprobs"][:, 1] < 0).all())
    offered = observed["alternative_logprobs"][:, 1].isfinite().sum(dim=1)
    assert offered.tolist() == [10] * 8


@dataclass(frozen=True)
class Marked:
    """Shows a reader's input."""

    def read(self, text, finish_reason):
        return Response(text.upper(), finish_reason, reasoning=f"{len(text)} letters")


def test_a_reader_sees_control_tokens_and_no_end(engine):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<tool_call>"], special_tokens=True)
    marked = TransformersEngine(tiny.model(), tokenizer)
    grammar = Grammar('start: <tool_call> "ab"')
    plain = decode(marked, wave_of(marked, grammar))
    assert {response.text for response in plain.responses} == {"ab"}
    read = decode(marked, wave_of(marked, grammar, reader=Marked()))
    assert set(read.responses) == {Response("<TOOL_CALL>AB", "stop", "13 letters")}
    marked.close()


def test_a_grammar_is_compiled_once():
    grammars = Grammars(tiny.tokenizer(), EVERY_TOKEN, [1])
    for _ in range(3):
        grammars.open(DIGITS, [[]] * 4)
    grammars.open(ITEM, [[]])
    assert grammars._known.cache_info().misses == 2
