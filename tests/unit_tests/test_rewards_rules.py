"""Rules: what breaks them, what is told of it, what counts as personal data, and what does not."""

import copy
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_aisp.rewards import (
    Rule,
    RuleReward,
    Violation,
    length_between,
    must_match,
    must_not_match,
    must_satisfy,
    no_personal_data,
    no_topic,
)
from langchain_aisp.rewards.rules import PERSONAL_DATA
from langchain_aisp.types import Response

CHAT = [{"role": "user", "content": "Hello."}]


def scores(reward, *texts):
    return reward.submit([(CHAT, Response(text)) for text in texts]).future.result(timeout=20).tolist()


def polite(text):
    return "please" in text.lower()


def broken(rule, text):
    return rule.check(text) is not None


def passages(rule, text):
    violation = rule.check(text)
    return () if violation is None else violation.passages


def test_a_score_is_minus_the_weights_of_the_broken_rules():
    reward = RuleReward([must_match("order", weight=2.0), must_not_match("!", weight=0.5), length_between(1, 3)])
    assert scores(reward, "Your order.", "Your order!", "No!", "a b c d") == [0.0, -0.5, -2.5, -3.0]


def test_an_explanation_names_the_broken_rules_and_what_broke_them():
    rules = [no_topic("weather", "rain"), must_match("order", name="order number"), must_satisfy(polite)]
    violations = RuleReward(rules).explain("Rain, and rain again.")
    assert violations == (Violation(rules[0], ("rain", "rain")), Violation(rules[1]), Violation(rules[2]))
    assert [str(violation) for violation in violations] == [
        "no weather, rain: the answer speaks of what it must not ('rain')",
        "order number: the answer has no match of 'order'",
        "polite: the answer does not satisfy polite",
    ]
    assert RuleReward(rules).explain("Please give the order number.") == ()


def test_a_rule_can_be_used_alone_and_is_a_value():
    rule = must_not_match(r"\bguarantee\w*", name="no promises")
    assert rule == must_not_match(r"\bguarantee\w*", name="no promises")
    assert hash(rule) == hash(must_not_match(r"\bguarantee\w*", name="no promises"))
    assert rule.check("We are Guaranteed to win") == Violation(rule, ("Guaranteed",))
    assert rule.check("We hope") is None
    with pytest.raises(AttributeError):
        rule.weight = 2.0


def test_a_finder_of_ones_own_makes_a_rule():
    class Digits:
        identity = "digits"

        def find(self, text):
            return tuple(filter(str.isdigit, text))

    rule = Rule("no digits", Digits(), wanted=False, weight=3.0, reason="has digits")
    assert scores(RuleReward([rule]), "a1", "a") == [-3.0, 0.0]
    assert str(rule.check("a12")) == "no digits: the answer has digits ('1')"


def test_patterns_ignore_case_unless_told():
    assert not broken(must_match("order"), "ORDER")
    assert broken(must_match("order", ignore_case=False), "ORDER")


@pytest.mark.parametrize(
    ("rule", "kept", "broken_by"),
    [
        (length_between(2, 3), ["a b", " a  b c "], ["a", "a b c d", ""]),
        (length_between(2), ["a b", "a " * 99], ["a"]),
        (length_between(0, 3, unit="characters"), ["", "abc"], ["abcd"]),
    ],
)
def test_a_length_has_inclusive_limits(rule, kept, broken_by):
    assert not any(broken(rule, text) for text in kept)
    assert all(broken(rule, text) for text in broken_by)


@pytest.mark.parametrize(
    "text",
    [
        "Refund!",
        "a REFUND now",
        "re\u200bfund",
        "\uff52\uff45\uff46\uff55\uff4e\uff44",
        "your  money\n back",
        "MONEY\u00a0BACK",
    ],
)
def test_a_topic_is_found_in_disguise(text):
    assert broken(no_topic("refund", "money back"), text)


@pytest.mark.parametrize("text", ["refunding", "prefund", "money, back", "moneyback", ""])
def test_a_topic_is_a_whole_word(text):
    assert not broken(no_topic("refund", "money back"), text)


PERSONAL = {
    "email": [
        "bob@example.com",
        "Mail <bob.m-1+x@mail.example.co.uk>.",
        "b\u00fccher@b\u00fccher.example",
        "bob\uff20example.com",
    ],
    "phone": [
        "+49 170 1234567",
        "+1 (555) 010-9999",
        "0044 20 7946 0018",
        "Call 030/1234567 now",
        "(030) 123 45 67",
        "555-010-9999",
        "(555) 010-9999",
    ],
    "card": [
        "4111111111111111",
        "4111 1111 1111 1111",
        "pay 12 4111-1111-1111-1111 99",
        "378282246310005",
        "5555 5555 5555 4444,",
        "4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1",
        "\uff14\uff11\uff11\uff11111111111111",
        "4111\u200b1111\u200b1111\u200b1111",
    ],
    "iban": [
        "DE89370400440532013000",
        "DE89 3704 0044 0532 0130 00 please",
        "gb29 nwbk 6016 1331 9268 19",
        "To FR14 2004 1010 0505 0001 3M02 606.",
        "NO93 8601 1117 947",
    ],
}
HARMLESS = [
    "",
    "Your order 1234567890123 has been sent.",
    "On 01.02.2024 and 2024-02-01 and 1/2/24",
    "4111 1111 1111 1112 fails its check digit",
    "DE88 3704 0044 0532 0130 00",
    "He said @bob, see example.com",
    "It costs 1,000.00 or 0.50, 100% sure",
    "Version 10.0.1, room 2024, 3 x 4",
    "a b c d e f",
]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in PERSONAL.items() for text in texts])
def test_personal_data_is_found(kind, text):
    assert len(passages(no_personal_data(kind), text)) == 1
    assert broken(no_personal_data(), text)


@pytest.mark.parametrize("text", HARMLESS)
def test_other_texts_hold_no_personal_data(text):
    assert passages(no_personal_data(), text) == ()


def test_passages_say_what_was_found():
    text = "Bob (bob@example.com) pays with 4111 1111 1111 1111 or 5555555555554444."
    assert passages(no_personal_data(), text) == ("bob@example.com", "4111 1111 1111 1111", "5555555555554444")
    assert passages(no_personal_data("card"), text) == ("4111 1111 1111 1111", "5555555555554444")


def luhn_digit(digits):
    """The digit that makes the doubled-every-second sum a multiple of ten, by the textbook table."""
    table = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    total = sum(table[int(each)] if place % 2 == 0 else int(each) for place, each in enumerate(reversed(digits)))
    return str(-total % 10)


@given(st.from_regex(r"[3-6][0-9]{14}", fullmatch=True), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_of_the_ten_last_digits_exactly_the_check_digit_makes_a_card(body, last):
    found = passages(no_personal_data("card"), f"{body}{last}")
    assert bool(found) == (str(last) == luhn_digit(body))


@pytest.mark.parametrize(
    "text", ["a" * 20000 + "@", "1 " * 10000, "+1" * 10000, "(0" * 10000, "DE89 " * 4000, "a." * 10000]
)
def test_long_texts_do_not_stall_the_search_for_personal_data(text):
    assert not broken(no_personal_data("email", "card", "iban"), text)  # a search that backtracks would never end


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: RuleReward([]), "at least one rule"),
        (lambda: RuleReward([no_topic("a"), no_topic("a")]), "a name of its own"),
        (lambda: must_match("("), "no regular expression"),
        (lambda: must_match("a", weight=-1.0), "weight must be positive"),
        (lambda: must_match("a", weight=float("inf")), "weight must be positive"),
        (lambda: must_match("a", name=" "), "needs a name"),
        (lambda: length_between(3, 2), "longest must be at least"),
        (lambda: length_between(-1), "must not be negative"),
        (lambda: length_between(1, 2, unit="lines"), "'characters' or 'words'"),
        (lambda: no_topic(), "topics must be words"),
        (lambda: no_topic(" "), "topics must be words"),
        (lambda: no_personal_data("name"), "is not known; known are"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_at_once(build, told):
    with pytest.raises(ValueError, match=told):
        build()


def test_the_fingerprint_covers_the_rules():
    def fingerprint(*rules):
        return RuleReward(rules).fingerprint

    kinds = [no_personal_data(kind) for kind in PERSONAL_DATA]
    rules = [must_match("a"), must_not_match("a"), must_match("a", ignore_case=False), must_match("a", weight=2.0)]
    rules += [no_topic("a"), length_between(1), length_between(1, unit="characters"), must_satisfy(polite), *kinds]
    assert len({fingerprint(rule) for rule in rules}) == len(rules)
    assert [fingerprint(rule) for rule in rules] == [fingerprint(rule) for rule in rules]
    unknown = must_satisfy([].append, name="unknown")
    assert fingerprint(unknown) != fingerprint(unknown)


def test_a_pickled_reward_scores_and_explains_the_same():
    reward = RuleReward([must_match("a"), no_topic("b c"), no_personal_data(), must_satisfy(polite)], name="n")
    copied = pickle.loads(pickle.dumps(reward))
    texts = ["a", "B  C", "bob@example.com"]
    assert scores(copied, *texts) == scores(reward, *texts)
    assert (copied.name, copied.fingerprint) == (reward.name, reward.fingerprint)
    assert copied.explain("B c") == reward.explain("B c")
    assert copy.deepcopy(reward) is reward
