"""The generated world: deterministic, split cleanly, and judged by a checker that agrees with the generator."""

import ast
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from langchain_aisp import demo
from langchain_aisp.demo import PARTS, Checks, Facts, Scenario, check, compose, draft, gold_reward, redraw, scenarios
from langchain_aisp.demo.checker import action_grammar
from langchain_aisp.demo.grammar import SPLITS, Grammar, Pattern, split_of
from langchain_aisp.demo.phrases import INTENTS, POLICIES

PERFECT = (
    "I am so sorry for the trouble. I see order 48213 here, and I will ask the courier today. "
    "Delivery takes up to 5 days. Never tell anyone your password. Is there anything else I can do for you?"
)
LATE = Scenario(
    intent="late_parcel",
    facts=Facts(policy_number=5, order="48213", name="Maya"),
    messages=({"role": "user", "content": "I am Maya. Order 48213 is late."},),
    split="train",
)


def _answers(split: str, count: int, seed: int = 0) -> Iterator[tuple[Scenario, str, Checks]]:
    rng = Random(seed)
    for case in scenarios(split, count, seed):
        text, labels = compose(case, rng)
        yield case, text, labels


def test_the_same_arguments_give_the_same_scenarios() -> None:
    assert scenarios("dev", 20, seed=4) == scenarios("dev", 20, seed=4)
    assert scenarios("dev", 20, seed=4) != scenarios("dev", 20, seed=5)


def test_an_unknown_split_names_the_possible_ones() -> None:
    with pytest.raises(ValueError, match="train, dev, test"):
        scenarios("validation", 1)


def test_a_scenario_ends_with_a_user_turn_and_states_its_facts() -> None:
    for case in scenarios("test", 300):
        assert case.messages[-1]["role"] == "user"
        said = " ".join(message["content"] for message in case.messages if message["role"] == "user").lower()
        assert all(value.lower() in said for value in case.facts.stated.values()), case


def test_a_shop_policy_is_stated_in_the_system_prompt_and_else_is_the_default() -> None:
    for case in scenarios("test", 300):
        system = " ".join(message["content"] for message in case.messages if message["role"] == "system")
        number = case.facts.policy_number
        assert f" {number} " in system or number == POLICIES[case.policy].default, case


def test_there_are_at_least_25_intents_and_all_occur() -> None:
    assert len(INTENTS) >= 25
    assert {case.intent for case in scenarios("train", 1500)} == set(INTENTS)


@pytest.mark.parametrize("split", SPLITS)
def test_the_checker_agrees_with_the_generator_on_every_answer(split: str) -> None:
    wrong = [(text, labels) for case, text, labels in _answers(split, 600) if check(case, text) != labels]
    assert wrong == []


@pytest.mark.parametrize("part", PARTS)
def test_redrawing_one_part_changes_that_part_only(part: str) -> None:
    rng = Random(1)
    for case in scenarios("dev", 60, seed=2):
        before = draft(case, rng)
        after = redraw(case, before, part, not getattr(before.labels, part), rng)
        changed = [name for name in PARTS if getattr(check(case, after.text), name) != getattr(before.labels, name)]
        assert changed == [part]


def test_parts_are_good_in_two_of_five_answers_independently() -> None:
    """2000 answers: a share is off by more than 0.06 with a probability below one in a million."""
    checks = [labels for _, _, labels in _answers("train", 2000)]
    columns = {part: [float(getattr(labels, part)) for labels in checks] for part in PARTS}
    assert all(abs(statistics.mean(column) - 0.4) < 0.06 for column in columns.values())
    others = [(a, b) for a in PARTS for b in PARTS if a < b]
    assert all(abs(statistics.correlation(columns[a], columns[b])) < 5 / math.sqrt(2000) for a, b in others)


def test_splits_share_no_phrasing_no_customer_and_no_order_number() -> None:
    seen = {split: scenarios(split, 400) for split in SPLITS}
    for slot in ("name", "order", "item"):
        values = [{getattr(case.facts, slot) for case in seen[split]} - {None} for split in SPLITS]
        assert len(set.union(*values)) == sum(map(len, values))
    sentences = [{s for case in seen[split] for s in draft(case, Random(0), 1.0).sentences} for split in SPLITS]
    assert len(set.union(*sentences)) == sum(map(len, sentences))


def test_every_intent_has_phrasings_and_actions_in_every_split() -> None:
    for name, intent in INTENTS.items():
        for grammar in (intent.says, action_grammar(name)):
            found = {split_of(text) for pattern in grammar.patterns for text in pattern.realisations()}
            assert found == set(SPLITS), name


def test_a_perfect_answer_scores_six_and_its_wrapper_agrees() -> None:
    assert check(LATE, PERFECT) == Checks(*[True] * 6)
    assert gold_reward(LATE)(LATE.messages, [PERFECT, ""]) == [6.0, 0.0]


@pytest.mark.parametrize(
    ("part", "old", "new"),
    [
        ("tone", "I am so sorry for the trouble", "Oh great, you again"),
        ("acknowledgement", "48213", "48214"),
        ("action", "ask the courier today", "send you a reset link"),
        ("policy", "5 days", "6 days"),
        ("policy", "Never tell", "I can offer you 50 percent off everything. Never tell"),
        ("privacy", "Never tell anyone your password", "Please send me your password"),
        ("closing", "Is there anything else I can do for you?", "That is all, bye."),
        ("closing", "for you?", "for you? order order order"),
    ],
)
def test_one_bad_marker_spoils_its_part_alone(part: str, old: str, new: str) -> None:
    checks = check(LATE, PERFECT.replace(old, new))
    assert [name for name in PARTS if not getattr(checks, name)] == [part]


@pytest.mark.parametrize("text", ["", " ", "?!", "\n\n", "48213", "naïve 世界 🙂", "the " * 500, PERFECT[:20]])
def test_the_checker_accepts_any_text(text: str) -> None:
    assert 0 <= check(LATE, text).score <= 1


def test_an_answer_cut_before_its_closing_has_no_good_closing() -> None:
    for length in range(PERFECT.index("I can do for you?")):
        assert not check(LATE, PERFECT[:length]).closing


def test_a_grammar_recognises_all_it_writes() -> None:
    grammar = Grammar.of("I (see|have|see it in) order {order}(| here| here now)?", "(well|right), {name}(!|)")
    finders = grammar.finders({"order": r"(?P<order>\d+)", "name": r"(?P<name>\w+)"})
    for pattern, finder in zip(grammar.patterns, finders, strict=True):
        for text in pattern.realisations():
            filled = text.replace("{order}", "123").replace("{name}", "Maya").lower()
            match = finder.search(f"so {filled}")
            assert match is not None
            assert match.end() >= len(f"so {filled.rstrip('?!')}")


def test_a_grammar_without_the_wanted_split_says_so() -> None:
    only = Grammar((Pattern("Hello"),))
    missing = next(split for split in SPLITS if split != split_of("Hello"))
    with pytest.raises(ValueError, match="Add choices"):
        only.draw(Random(0), missing)


def test_the_generator_needs_the_standard_library_only() -> None:
    for path in Path(demo.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.startswith("langchain_aisp.demo") or name.split(".")[0] in sys.stdlib_module_names, path
