"""The code that trains the demo's models: rows hold what they promise, and a step of each course teaches something."""

from itertools import islice
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from langchain_aisp.demo import LANGUAGE_MODEL_PATH, REWARD_MODEL_PATH, check, draft, redraw, scenarios
from langchain_aisp.demo.tool_dialogues import lessons, tool_dialogues
from training import language_model, reward_model, tools
from training.optimize import Muon, Recipe
from training.rows import Encoder, Judged

CASE = scenarios("train", 1, seed=4)[0]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(LANGUAGE_MODEL_PATH)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer)


@pytest.fixture
def writer():
    return AutoModelForCausalLM.from_pretrained(LANGUAGE_MODEL_PATH, dtype=torch.float32)


@pytest.fixture
def judge():
    return AutoModelForSequenceClassification.from_pretrained(REWARD_MODEL_PATH, dtype=torch.float32)


def answers(count: int) -> list[str]:
    rng = Random(3)
    return [draft(CASE, rng).text for _ in range(count)]


def test_several_answers_in_one_row_are_learnt_like_separate_ones(writer, encoder):
    texts = answers(3)
    together = encoder.batch([encoder.written(CASE.messages, texts)])
    apart = [encoder.batch([encoder.written(CASE.messages, [text])]) for text in texts]
    sizes = [int((batch.targets != -100).sum()) for batch in apart]
    with torch.inference_mode():
        separate = sum(language_model.loss_of(writer, b) * n for b, n in zip(apart, sizes, strict=True)) / sum(sizes)
        torch.testing.assert_close(language_model.loss_of(writer, together), separate, atol=1e-4, rtol=1e-4)


def test_a_judge_reads_in_a_row_what_it_reads_through_its_template(judge, encoder):
    texts = answers(3)
    batch = encoder.batch([encoder.judged(CASE.messages, [Judged.whole(text, 0.0) for text in texts])])
    reader = AutoTokenizer.from_pretrained(REWARD_MODEL_PATH)
    chats = [[*map(dict, CASE.messages), {"role": "assistant", "content": text}] for text in texts]
    with torch.inference_mode():
        packed = reward_model.rewards_of(judge, batch)
        plain = [
            judge(**reader(reader.apply_chat_template(chat, tokenize=False), return_tensors="pt")).logits[0, 0]
            for chat in chats
        ]
    torch.testing.assert_close(packed, torch.stack(plain), atol=1e-3, rtol=1e-3)


def test_a_row_with_tools_is_the_prompt_that_the_engine_makes(encoder, tokenizer):
    made = next(made for made in tool_dialogues("dev", 20) if made.calls)
    row = encoder.written(made.answered, ["Done."], made.schemas)
    turns = [dict(turn) for turn in made.answered]
    prompt = tokenizer.apply_chat_template(turns, tools=made.schemas, add_generation_prompt=True)
    assert [*row.prompt, encoder.start] == list(prompt["input_ids"])


def test_dialogues_that_share_their_tools_are_learnt_like_separate_ones(writer, encoder):
    made = lessons("dev", Random(5), 3)
    schemas = made[0].schemas
    together = encoder.batch([encoder.dialogues(made, schemas)])
    calls = [encoder.written(each.messages, [tools.calls_text(each.calls)], schemas) for each in made]
    finals = [encoder.written(each.answered, [each.answers[0]], schemas) for each in made]
    apart = [encoder.batch([row]) for row in calls + finals]
    sizes = [int((batch.targets != -100).sum()) for batch in apart]
    assert int((together.targets != -100).sum()) == sum(sizes)
    with torch.inference_mode():
        separate = sum(language_model.loss_of(writer, b) * n for b, n in zip(apart, sizes, strict=True)) / sum(sizes)
        torch.testing.assert_close(language_model.loss_of(writer, together), separate, atol=1e-4, rtol=1e-4)


def test_of_answers_with_equal_parts_only_the_best_liked_is_shown_again():
    rng = Random(0)
    good = draft(CASE, rng, good=1.0)
    again, worse = draft(CASE, rng, good=1.0), redraw(CASE, good, "action", False, rng)
    assert check(CASE, good.text) == check(CASE, again.text) != check(CASE, worse.text)
    assert reward_model.deceiving(CASE, [worse.text, good.text, again.text]) == [worse.text, good.text]


def test_the_labeller_errs_seldom_and_more_often_where_it_is_hard(encoder):
    row = encoder.judged(CASE.messages, [Judged.whole(text, liking) for text, liking in (("a", 0.0), ("b", 1.0))])
    easy = encoder.judged(CASE.messages, [Judged.whole(text, liking) for text, liking in (("a", 0.0), ("b", 4.0))])
    rng = Random(0)

    def errors(row):
        return sum(chosen == 0 for _ in range(400) for chosen, _ in reward_model._judge([row], rng))

    assert 5 <= errors(row) <= 40  # about one in twenty
    assert errors(easy) == 0


def test_a_new_language_model_starts_like_chance_and_learns(tokenizer):
    model, losses, rows = language_model.train(tokenizer, Recipe(steps=2, tokens=400))
    assert losses[0] == pytest.approx(torch.tensor(float(len(tokenizer))).log().item(), rel=0.2)
    assert len(losses) == 2
    assert rows >= 512  # as many as the first batches are sorted out of
    assert not torch.equal(model.lm_head.weight, language_model.new_model(tokenizer, seed=0).lm_head.weight)


def test_a_few_steps_on_tools_lower_their_loss(writer, tokenizer, encoder):
    fresh = language_model.new_model(tokenizer, seed=0)
    fresh.load_state_dict(writer.state_dict())
    rng = Random(9)
    rows = list(islice(tools.written(encoder, rng), 4))
    batch = encoder.batch(rows)
    torch.nn.init.zeros_(fresh.model.layers[-1].mlp.down_proj.weight)  # something to learn again
    before = language_model.loss_of(fresh, batch).item()
    losses, _ = language_model.teach_tools(fresh, tokenizer, Recipe(steps=6, tokens=600))
    assert len(losses) == 6
    assert language_model.loss_of(fresh, batch).item() < before


def test_a_judge_starts_from_the_language_model_and_learns_in_both_courses(writer, tokenizer):
    recipe = Recipe(steps=2, tokens=400)
    own = [(CASE, answers(4))]
    judge, losses = reward_model.train(writer, tokenizer, own, recipe)
    first = judge.model.layers[0].self_attn.q_proj.weight
    assert not torch.equal(first, writer.model.layers[0].self_attn.q_proj.weight)
    torch.testing.assert_close(first, writer.model.layers[0].self_attn.q_proj.weight, atol=0.05, rtol=0)
    assert losses[0] == pytest.approx(0.693, abs=1e-3)  # the head starts at zero, so nothing is preferred yet
    before = judge.score.weight.clone()
    assert len(reward_model.train_further(judge, tokenizer, own, recipe)) == 2
    assert not torch.equal(before, judge.score.weight)


def test_muon_is_torchs_own_in_bfloat16():
    rng = torch.Generator().manual_seed(0)
    for shape in ((32, 16), (16, 32)):
        ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
        one = Muon([ours], 1e-2, dtype=torch.bfloat16)
        other = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            ours.grad = torch.randn(shape, generator=rng)
            theirs.grad = ours.grad.clone()
            one.step()
            other.step()
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, torch.ones(shape))
