"""Fingerprints: equal functions share one, unlike ones never do, and the doubtful ones get their own."""

import functools
import math
import subprocess
import sys
from collections import Counter

import pytest

from langchain_aisp.rewards import Minimum, WeightedSum, as_reward

BONUS = 2.0
TABLE = {"a": 1}


def fingerprint(fn, **options):
    return as_reward(fn, **options).fingerprint


def is_stable(fn):
    return not fingerprint(fn).startswith("process-")


def helper(text):
    return len(text)


def uses_helper(chat, responses):
    return [helper(text) for text in responses]


def uses_bonus(chat, responses):
    return [BONUS for _ in responses]


def uses_table(chat, responses):
    return [TABLE["a"] for _ in responses]


def uses_library(chat, responses):
    return [math.sqrt(sum(Counter(text).values())) for text in responses]


def imports_library(chat, responses):
    import string

    return [text.count(string.digits) for text in responses]


def imports_user_code(chat, responses):
    import conftest

    return [float(bool(conftest)) for _ in responses]


def counts_down(chat, responses):
    return [0.0] if not responses else [0.0, *counts_down(chat, responses[1:])]


def plus(bonus, chat, responses=()):
    return [len(text) + bonus for text in responses]


def writes_global(chat, responses):
    global BONUS
    BONUS = 3.0
    return [BONUS for _ in responses]


def weighted(weight):
    return lambda chat, responses: [weight * len(text) for text in responses]


def test_unlike_functions_never_share():
    functions = [
        lambda chat, responses: [1 for _ in responses],
        lambda chat, responses: [1.0 for _ in responses],
        lambda chat, responses: [True for _ in responses],
        lambda chat, responses: [2 for _ in responses],
        lambda chat, responses: ["1" for _ in responses],
        lambda chat, responses: [len(text) for text in responses],
        lambda chat, responses: [max(text) for text in responses],
        lambda chat, responses: [text.count("a") for text in responses],
        lambda chat, responses: [text.find("a") for text in responses],
        lambda chat, responses, scale=1: [scale for _ in responses],
        lambda chat, responses, scale=2: [scale for _ in responses],
        lambda chat, responses, *, scale=2: [scale for _ in responses],
        lambda chat, responses: [len(text) in {1, 2} for text in responses],
        lambda chat, responses: [len(text) in {1, 3} for text in responses],
        weighted(1),
        weighted(2),
        weighted(1.0),
        weighted("1"),
        weighted(b"1"),
        weighted((1, 2)),
        weighted((1, (2,))),
        uses_bonus,
        uses_helper,
        uses_library,
        functools.partial(plus, 1),
        functools.partial(plus, 2),
        functools.partial(uses_bonus),
    ]
    prints = [fingerprint(fn) for fn in functions]
    assert len(set(prints)) == len(functions)


def test_the_same_source_evaluated_again_shares():
    assert fingerprint(weighted(0.5)) == fingerprint(weighted(0.5))
    source = "lambda chat, responses: [len(text) for text in responses]"
    assert fingerprint(eval(source)) == fingerprint(eval(source))
    assert is_stable(weighted(0.5))
    assert is_stable(functools.partial(uses_helper))


@pytest.mark.parametrize(
    "fn", [uses_helper, uses_bonus, uses_library, imports_library, counts_down, weighted(frozenset({"a", "b"}))]
)
def test_plain_functions_have_a_stable_fingerprint(fn):
    assert is_stable(fn)
    assert fingerprint(fn) == fingerprint(fn)


def test_the_fingerprint_follows_globals_and_helpers(monkeypatch):
    before = fingerprint(uses_bonus), fingerprint(uses_helper)
    monkeypatch.setitem(globals(), "BONUS", 5.0)
    monkeypatch.setitem(globals(), "helper", lambda text: -len(text))
    after = fingerprint(uses_bonus), fingerprint(uses_helper)
    assert before[0] != after[0]
    assert before[1] != after[1]


class Judge:
    def __call__(self, chat, responses):
        return [0.0 for _ in responses]

    def method(self, chat, responses):
        return [0.0 for _ in responses]


class NamedJudge(Judge):
    fingerprint = "judge-v2"


@pytest.mark.parametrize(
    "fn", [uses_table, imports_user_code, writes_global, weighted([1]), weighted(object()), Judge(), Judge().method]
)
def test_what_may_change_unseen_has_a_fingerprint_of_its_own(fn):
    first, second = as_reward(fn), as_reward(fn)
    assert not is_stable(fn)
    assert first.fingerprint == first.fingerprint
    assert first.fingerprint != second.fingerprint


def test_an_explicit_fingerprint_wins():
    assert fingerprint(Judge(), fingerprint="v1") == "v1"
    assert fingerprint(uses_bonus, fingerprint="v1") == "v1"
    assert fingerprint(NamedJudge()) == "judge-v2"


def test_the_name_is_no_identity():
    assert fingerprint(weighted(1), name="same") != fingerprint(weighted(2), name="same")


def test_fingerprints_are_the_same_in_another_process():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_rewards_fingerprint as t;"
        "print(t.fingerprint(t.uses_helper), t.fingerprint(t.weighted(frozenset({'a', 'b', 'c'}))))"
    )
    folder = __file__.rpartition("/")[0]
    run = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [fingerprint(uses_helper), fingerprint(weighted(frozenset({"a", "b", "c"})))]


def test_combinations_have_the_fingerprint_of_their_parts():
    one, two = weighted(1), weighted(2)
    combined = [
        WeightedSum([(one, 1.0), (two, 1.0)]),
        WeightedSum([(one, 1.0), (two, 2.0)]),
        WeightedSum([(two, 1.0), (one, 2.0)]),
        Minimum([one, two]),
    ]
    assert len({reward.fingerprint for reward in combined}) == 4
    assert combined[0].fingerprint == WeightedSum({weighted(1): 1.0, weighted(2): 1.0}).fingerprint
