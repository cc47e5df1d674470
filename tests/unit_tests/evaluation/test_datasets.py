"""Prompts from other people's data: what is taken as prompt, what as reference, and what is refused."""

import gzip
import json
import sys
from types import SimpleNamespace

import pytest

from langchain_aisp.evaluation.datasets import (
    demo_gold,
    demo_prompts,
    fingerprint,
    hh_rlhf,
    load_prompts,
    parse_dialogue,
    read_prompts,
    shp,
    split_dialogue,
)
from langchain_aisp.evaluation.recipes import HUMAN_ASSISTANT
from langchain_aisp.types import Response
from tests.tiny import tokenizer

DIALOGUE = "\n\nHuman: Hi.\n\nAssistant: Hello: how are you?\n\nHuman: Bored.\n\nAssistant:  Read a book.\n\nIt helps."


def write_lines(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def test_a_dialogue_s_prompt_ends_with_its_last_assistant_mark():
    prompt, answer = split_dialogue(DIALOGUE)
    assert prompt == DIALOGUE[: DIALOGUE.rindex("  Read")]
    assert prompt.endswith("\n\nAssistant:")
    assert answer == "Read a book.\n\nIt helps."


def test_a_dialogue_becomes_turns_and_its_template_makes_the_same_prompt_of_them():
    prompt, _ = split_dialogue(DIALOGUE)
    turns = parse_dialogue(prompt)
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[1]["content"] == "Hello: how are you?"
    written = tokenizer().apply_chat_template(
        list(turns), chat_template=HUMAN_ASSISTANT, add_generation_prompt=True, tokenize=False
    )
    assert written == prompt


def test_turns_of_the_same_side_become_one_and_empty_ones_none():
    turns = parse_dialogue("\n\nHuman: a\n\nHuman: b\n\nAssistant:\n\nHuman: c\n\nAssistant:")
    assert turns == ({"role": "user", "content": "a\n\nb\n\nc"},)


def test_a_text_without_marks_is_no_dialogue():
    with pytest.raises(ValueError, match="Assistant"):
        split_dialogue("Human: hi")
    with pytest.raises(ValueError, match="Human"):
        parse_dialogue("hi\n\nAssistant:")


@pytest.mark.parametrize("name", ["hh.jsonl", "hh.jsonl.gz"])
def test_hh_rlhf_is_read_from_a_file_and_repeated_prompts_once(tmp_path, name):
    other = DIALOGUE.replace("Bored", "Tired")
    path = write_lines(tmp_path / name, [{"chosen": DIALOGUE}, {"chosen": DIALOGUE + "!"}, {"chosen": other}])
    prompts = hh_rlhf(source=path)
    assert [prompt.messages[-1]["content"] for prompt in prompts] == ["Bored.", "Tired."]
    assert prompts[0].reference == "Read a book.\n\nIt helps."
    assert [prompt.messages for prompt in read_prompts(path)] == [prompt.messages for prompt in prompts]


def shp_row(post, labels, score, history="How?"):
    return {
        "post_id": post,
        "domain": "askculinary_test",
        "history": history,
        "human_ref_A": f"A of {post}, {score}",
        "human_ref_B": f"B of {post}, {score}",
        "score_A": score,
        "score_B": score + 1,
        "labels": labels,
    }


def test_shp_gives_each_post_once_with_the_answer_that_was_liked_most(tmp_path):
    rows = [shp_row("x", 1, 5), shp_row("y", 0, 2, "Why?"), shp_row("x", 0, 9), shp_row("x", 1, 7)]
    prompts = shp(source=write_lines(tmp_path / "shp.jsonl", rows))
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["How?", "Why?"]
    assert [prompt.reference for prompt in prompts] == ["B of x, 9", "B of y, 2"]
    assert prompts[0].metadata["post_id"] == "x"
    assert len({prompt.id for prompt in prompts}) == 2


def test_the_hub_is_asked_for_the_subset_and_the_split(monkeypatch):
    asked = []

    def load_dataset(source, *, data_dir, split):
        asked.append((source, data_dir, split))
        return [{"chosen": DIALOGUE}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    [prompt] = load_prompts("hh-rlhf/harmless-base:train")
    assert asked == [("Anthropic/hh-rlhf", "harmless-base", "train")]
    assert prompt.id == "hh-rlhf/harmless-base/train/0"
    load_prompts("hh-rlhf")
    assert asked[1] == ("Anthropic/hh-rlhf", None, "test")


def test_without_the_package_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"langchain-aisp\[eval\]"):
        shp()


def test_a_file_of_prompts_may_hold_texts_messages_or_lists(tmp_path):
    said = {"role": "user", "content": "Hi."}
    answered = {"role": "assistant", "content": "Hello."}
    [text] = read_prompts(write_lines(tmp_path / "a.jsonl", [{"prompt": "Hi.", "id": 7, "topic": "greeting"}]))
    assert (text.id, text.messages, text.metadata, text.reference) == ("7", (said,), {"topic": "greeting"}, None)
    [chat] = read_prompts(write_lines(tmp_path / "b.jsonl", [{"messages": [said, answered]}]))
    assert (chat.messages, chat.reference, chat.metadata) == ((said,), "Hello.", {})
    [bare] = read_prompts(write_lines(tmp_path / "c.jsonl", [[said, answered]]))
    assert (bare.messages, bare.reference) == ((said,), "Hello.")
    [judged] = read_prompts(write_lines(tmp_path / "d.jsonl", [{"prompt": [said], "reference": "Good day."}]))
    assert (judged.messages, judged.reference) == ((said,), "Good day.")


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"question": "?"}], "question"),
        ([{"prompt": 3}], "text or a list"),
        ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}], "two prompts with the id '1'"),
        ([{"messages": [{"role": "assistant", "content": "Hi."}]}], "no message to answer"),
        ([], "no prompts"),
        ([3], "int"),
    ],
)
def test_a_file_without_prompts_is_refused_with_the_reason(tmp_path, rows, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_prompts(write_lines(tmp_path / "x.jsonl", rows))


def test_a_line_that_is_no_json_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "a"}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2"):
        read_prompts(tmp_path / "x.jsonl")


def test_an_unknown_name_tells_what_is_possible(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"demo:SPLIT, hh-rlhf"):
        load_prompts(str(tmp_path / "missing.jsonl"))


def test_a_shuffle_takes_other_prompts_and_the_same_ones_again(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"prompt": str(number)} for number in range(20)])
    first, again, plain = (load_prompts(path, limit=5, shuffle=seed) for seed in (1, 1, None))
    assert first == again
    assert first != plain
    assert [prompt.messages[0]["content"] for prompt in plain] == ["0", "1", "2", "3", "4"]
    assert fingerprint(first) == fingerprint(again) != fingerprint(plain)


def test_the_demo_s_reference_is_faultless_and_its_checker_agrees():
    prompts = demo_prompts("dev", 4)
    gold = demo_gold(prompts)
    pairs = [(prompt.messages, Response(prompt.reference)) for prompt in prompts]
    assert gold.submit(pairs).future.result(timeout=60).tolist() == [6.0] * 4
    assert demo_prompts("dev", 2) == prompts[:2]
    assert demo_prompts("test", 2) != prompts[:2]
