"""Grammars: every candidate obeys, whatever the noise, the method and the neighbours."""

import json
import re
from dataclasses import dataclass, replace

import pytest
import torch

from langchain_aisp import AISP, BestOfN, align, as_reward
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.engine.decode import Rows
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
        [allowed] = ~matchers.forbidden([0])
        plain = [token for token in range(272) if matchers.matchers[0].deep_copy().consume_token(token)]
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


# -- tokens are tried first -------------------------------------------------------------------------------------------

NAMED = Grammar(
    'start: %json {"type": "object", "properties": {"customer_name": {"type": "string", "maxLength": 4}, '
    '"delivery_city": {"enum": ["Rome", "Oslo"]}}, "required": ["customer_name", "delivery_city"], '
    '"additionalProperties": false, "x-guidance": {"whitespace_flexible": false}}'
)


def test_a_refused_token_is_drawn_again_from_the_same_distribution_that_a_mask_gives(engine):
    grammar = Grammar("start: /[0-9x-z]/")
    wave = replace(wave_of(engine, grammar, rows=4000, length=1), observe=frozenset({"alternatives"}))
    rollouts = decode(engine, wave)
    ids, logprobs = (rollouts.observed[name][0, 0] for name in ("alternatives", "alternative_logprobs"))
    expected = {int(token): float(logprob.exp()) for token, logprob in zip(ids, logprobs, strict=True)}
    allowed = [engine.token_ids(letter)[0] for letter in "0123456789xyz"]
    assert sum(expected[token] for token in allowed) == pytest.approx(1, abs=1e-5)
    counts = rollouts.tokens[:, 0].bincount(minlength=272)
    assert int(counts.sum()) == int(counts[allowed].sum()) == 4000
    squares = [(int(counts[token]) - 4000 * expected[token]) ** 2 / (4000 * expected[token]) for token in allowed]
    assert sum(squares) < 36.5  # chi-square of 12 degrees: one false alarm in 4,000


def test_what_the_grammar_allows_anyway_is_said_as_without_it(engine):
    anything = Grammar(r"start: /(?s:.)*/")
    free = decode(engine, wave_of(engine, None, rows=16, length=8))
    within = decode(engine, wave_of(engine, anything, rows=16, length=8))
    same = free.tokens == within.tokens
    assert float(same[:, 0].float().mean()) > 0.3  # of random bytes many are no text


@pytest.mark.parametrize("grammar", [DIGITS, ITEM, NAMED])
def test_what_may_stand_in_place_of_a_token_is_what_a_mask_lets_through_there(engine, grammar):
    wave = replace(wave_of(engine, grammar, length=64), observe=frozenset({"alternatives"}))
    rollouts = decode(engine, wave)
    alternatives, logprobs = (rollouts.observed[name] for name in ("alternatives", "alternative_logprobs"))
    found = engine.allowed(grammar, rollouts.tokens, alternatives)
    written = torch.arange(64) < rollouts.lengths[:, None]
    assert torch.equal(found[written], logprobs[written].isfinite())
    assert not found[~written].any()
    own = engine.allowed(grammar, rollouts.tokens, rollouts.tokens.clamp(min=0)[..., None])
    assert own[written].all()


def test_unchecked_alternatives_are_the_models_own_but_where_its_token_was_refused(engine):
    asked = wave_of(engine, Grammar("start: /[0-9x-z]{1,16}/"), rows=64, temperature=3.0)
    checked = decode(engine, replace(asked, observe=frozenset({"alternatives"})))
    unchecked = decode(engine, replace(asked, observe=frozenset({"unchecked_alternatives"})))
    assert torch.equal(unchecked.tokens, checked.tokens)
    free = decode(engine, replace(wave_of(engine, None, length=1), observe=frozenset({"alternatives"})))
    models_own = free.observed["alternatives"][0, 0]
    found, masked = unchecked.observed["alternatives"][:, 0], checked.observed["alternatives"][0, 0]
    own = (found == models_own).all(dim=1)
    assert 0 < int(own.sum()) < 64
    assert bool((found[~own][:, :13] == masked[:13]).all())  # of 13 letters that may begin


@pytest.mark.parametrize("grammar", [NAMED, Grammar("start: /[a-z ,.]*[.]/")])
@pytest.mark.parametrize("control", [0.0, 0.1])
def test_a_search_looks_at_the_grammar_for_parents_alone_and_never_breaks_it(engine, monkeypatch, grammar, control):
    looks = []
    forbidden = Rows._forbidden
    monkeypatch.setattr(Rows, "_forbidden", lambda *a, **k: looks.append(1) or forbidden(*a, **k))
    reward = as_reward(lambda chat, texts: [float(text.count("a") - text.count("e")) for text in texts])
    method = AISP(samples=48, iterations=6, control_kl=control)
    found = align(engine, reward, method, CHAT, sampling=Sampling(max_tokens=40, grammar=grammar), seed=3)
    assert bool(looks) == (control > 0)  # gradients want all of the distribution
    assert len(found.candidates) == 48
    plain = Grammars(tiny.tokenizer(), EVERY_TOKEN, [1])
    for candidate in found.candidates:
        ids = engine.token_ids(candidate.response.text)
        plain.open(grammar, [ids])  # raises where one breaks it
    assert len({candidate.response.text for candidate in found.candidates}) > 24


@pytest.mark.parametrize("observe", [frozenset(), frozenset({"base_logprobs", "alternatives"})])
def test_forced_tokens_are_read_in_one_pass_and_are_the_same_as_step_by_step(engine, monkeypatch, observe):
    passes = []
    step = type(engine.cache).step
    monkeypatch.setattr(type(engine.cache), "step", lambda *a, **k: passes.append(1) or step(*a, **k))
    wave = replace(wave_of(engine, NAMED, rows=8, length=64), observe=observe)
    fast, steps = decode(engine, wave), len(passes)
    monkeypatch.setattr(Rows, "_skip", lambda *_: None)
    passes.clear()
    plain = decode(engine, wave)
    assert fast.responses == plain.responses
    assert torch.equal(fast.tokens, plain.tokens)
    seen, expected = fast.observed, plain.observed
    for name in observe & {"base_logprobs"}:
        torch.testing.assert_close(seen[name], expected[name], atol=1e-4, rtol=1e-4)
    for name in observe & {"alternatives"}:
        logprobs = expected["alternative_logprobs"]
        torch.testing.assert_close(seen["alternative_logprobs"], logprobs, atol=1e-4, rtol=1e-4)
        assert torch.equal(seen[name][logprobs.isfinite()], expected[name][logprobs.isfinite()])
    assert steps < 0.6 * len(passes)
    parsed = [json.loads(response.text) for response in fast.responses]
    assert all(list(each) == ["customer_name", "delivery_city"] for each in parsed)


def test_what_is_forced_is_sure(engine):
    wave = replace(wave_of(engine, NAMED, length=64), observe=frozenset({"base_logprobs", "alternatives"}))
    rollouts = decode(engine, wave)
    key = engine.token_ids("customer_name")
    for row in range(len(wave)):
        tokens = rollouts.tokens[row].tolist()
        first = next(at for at in range(len(tokens)) if tokens[at : at + len(key)] == key)
        assert rollouts.observed["base_logprobs"][row, first : first + len(key)].tolist() == [0.0] * len(key)
        assert int(rollouts.observed["alternative_logprobs"][row, first].isfinite().sum()) == 1


def test_a_script_may_cut_a_forced_text_into_other_tokens():
    engine = TransformersEngine.from_pretrained("demo")
    prompt, text = engine.encode(CHAT, seed=2), '{"customer_name":'
    letters = [token for letter in text for token in engine.token_ids(letter)]
    found = {}
    for name, said in (("letters", letters), ("usual", engine.token_ids(text))):
        wave = Wave.saying(prompt, [said], Sampling(max_tokens=64, grammar=NAMED), observe={"base_logprobs"})
        rollouts = decode(engine, wave)
        assert rollouts.tokens[wave.said].tolist() == said
        found[name] = rollouts.observed["base_logprobs"][wave.said].sum()
    assert found["letters"] < found["usual"] == 0  # all of it is forced
    engine.close()


@pytest.mark.parametrize("limit", range(8, 30))
def test_forced_tokens_end_at_the_limit(engine, limit):
    rollouts = decode(engine, wave_of(engine, NAMED, length=limit))
    assert int(rollouts.lengths.max()) <= limit
