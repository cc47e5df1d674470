"""The shipped models load offline as any user's would, and behave as their page says."""

from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from langchain_aisp.demo import LANGUAGE_MODEL_PATH, REWARD_MODEL_PATH, Scenario, draft, scenarios

CHAT = [
    {"role": "system", "content": "You are the assistant of Fernwood, a tea shop."},
    {"role": "user", "content": "My parcel is late"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(LANGUAGE_MODEL_PATH, local_files_only=True)


@pytest.fixture(scope="module")
def writer():
    return AutoModelForCausalLM.from_pretrained(LANGUAGE_MODEL_PATH, local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def judge():
    path = REWARD_MODEL_PATH
    return AutoModelForSequenceClassification.from_pretrained(path, local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def judge_tokenizer():
    return AutoTokenizer.from_pretrained(REWARD_MODEL_PATH, local_files_only=True)


def _rewards(judge, tokenizer, messages, answers: list[str]) -> torch.Tensor:
    chats = [[*map(dict, messages), {"role": "assistant", "content": answer}] for answer in answers]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        return judge(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0]


@pytest.mark.parametrize(("folder", "megabytes"), [(LANGUAGE_MODEL_PATH, 16), (REWARD_MODEL_PATH, 10)])
def test_weights_are_small_bfloat16_safetensors(folder: Path, megabytes: int) -> None:
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= megabytes * 10**6
    assert not list(folder.glob("*.bin"))
    with safe_open(weights, framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_the_chat_model_is_a_llama_of_at_most_eight_million_parameters(writer) -> None:
    assert writer.config.model_type == "llama"
    assert writer.num_parameters() <= 8_000_000


def test_the_template_renders_every_role_and_a_generation_prompt(tokenizer) -> None:
    chat = [*CHAT, {"role": "assistant", "content": "One moment."}, {"role": "tool", "content": "on its way"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|system|>You are the assistant of Fernwood, a tea shop.<|end|><|user|>My parcel is late<|end|>"
        "<|assistant|>One moment.<|end|><|tool|>on its way<|end|><|assistant|>"
    )


def test_the_template_continues_a_begun_answer(tokenizer) -> None:
    chat = [*CHAT, {"role": "assistant", "content": "I am so"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert text.endswith("<|assistant|>I am so")


@pytest.mark.parametrize("text", ["Order 48213, please.", "naïve 世界 🙂", '{"a": [1, 2]}', " two  spaces\n\ttab "])
def test_any_text_survives_the_tokenizer(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_digits_are_single_tokens_and_special_tokens_are_known(tokenizer) -> None:
    assert len(tokenizer("48213")["input_ids"]) == 5
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.model_max_length == 1024
    assert all(tokenizer.convert_tokens_to_ids(f"<|{role}|>") < 8 for role in ("system", "user", "assistant", "tool"))


def test_a_bare_message_gets_a_complete_short_answer(writer, tokenizer) -> None:
    torch.manual_seed(0)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "My parcel is late"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        tokens = writer.generate(**prompt, do_sample=True, max_new_tokens=64, num_return_sequences=8)
    answers = tokens[:, prompt["input_ids"].shape[1] :]
    assert (answers == tokenizer.eos_token_id).any(1).sum() >= 7
    assert all(text.strip()[-1] in ".!?" for text in tokenizer.batch_decode(answers, skip_special_tokens=True)[:1])


def test_the_reward_prefers_answers_with_more_good_parts(judge, judge_tokenizer) -> None:
    """24 scenarios of the test split, all parts good against all parts bad."""
    rng = Random(0)
    for case in scenarios("test", 24, seed=21):
        good, bad = draft(case, rng, 1.0).text, draft(case, rng, 0.0).text
        rewards = _rewards(judge, judge_tokenizer, case.messages, [good, bad])
        assert rewards[0] > rewards[1] + 1.0, (case, good, bad)


@pytest.mark.parametrize("junk", ["", "?", "the the the the the", "I am"])
def test_empty_or_broken_answers_score_below_a_good_one(judge, judge_tokenizer, junk: str) -> None:
    case = _first_late_parcel()
    good = draft(case, Random(0), 1.0).text
    rewards = _rewards(judge, judge_tokenizer, case.messages, [good, junk])
    assert rewards.isfinite().all()
    assert rewards[0] > rewards[1] + 2.0


def test_a_padded_batch_gives_the_rewards_of_single_answers(judge, judge_tokenizer) -> None:
    answers = ["Hello!", "I am so sorry. I will ask the courier today.", ""]
    together = _rewards(judge, judge_tokenizer, CHAT, answers)
    alone = torch.cat([_rewards(judge, judge_tokenizer, CHAT, [answer]) for answer in answers])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def _first_late_parcel() -> Scenario:
    return next(case for case in scenarios("dev", 200) if case.intent == "late_parcel")
