"""Rebuilds the demo's tokenizer, language model and reward model from nothing: `python -m training.build`.

Two courses: the first teaches both models the shop's conversations; the second teaches the language model to call
tools, and shows the reward model what a search against it finds and how answers follow tools. The second starts from
the first one's saved pair, so either can be run alone.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from copy import deepcopy
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from langchain_aisp.demo import LANGUAGE_MODEL_PATH, REWARD_MODEL_PATH
from langchain_aisp.demo.scenarios import scenarios
from langchain_aisp.rewards import ClassifierReward
from training import language_model, reward_model
from training.optimize import Recipe
from training.sampling import sample, searched
from training.tokenizer import CHAT_TEMPLATE, REWARD_TEMPLATE, train_tokenizer, wrap

RESULTS = Path(__file__).parent / "results"
FIRST = Path(__file__).parent / "first_course"  # where its pair is kept
SAMPLED_SCENARIOS, SAMPLES = 384, 8
SEARCHED_SCENARIOS = 320


def main() -> None:
    """Builds everything and replaces the shipped folders."""
    options = _options()
    torch.set_num_threads(1)  # the cores are shared out by the optimiser, one half of each batch per core
    RESULTS.mkdir(exist_ok=True)
    for number, course in enumerate((first_course, second_course), 1):
        if options.course in (None, number):
            torch.manual_seed(options.seed)
            started, cpu = time.monotonic(), time.process_time()
            record = course(options)
            wall, busy = (time.monotonic() - started) / 60, (time.process_time() - cpu) / 60
            record |= {"wall_minutes": round(wall, 1), "cpu_minutes": round(busy, 1), "seed": options.seed}
            (RESULTS / f"{course.__name__}.json").write_text(json.dumps(record) + "\n")
            print(f"{course.__name__}: {wall:.1f} minutes, {busy:.1f} of the processor", flush=True)


def first_course(options: argparse.Namespace) -> dict[str, object]:
    """The shop's conversations: a new tokenizer, a new language model, a new reward model."""
    tokenizer = train_tokenizer(options.seed)
    recipe = Recipe(steps=options.language_steps, seed=options.seed)
    writer, writer_losses, rows = language_model.train(tokenizer, recipe)
    save(writer, tokenizer, FIRST / "language_model")
    cases = scenarios("train", SAMPLED_SCENARIOS, seed=options.seed + 1)
    answers = sample(writer.eval(), tokenizer, [case.messages for case in cases], SAMPLES)
    judge_recipe = Recipe(steps=options.reward_steps, seed=options.seed)
    judge, judge_losses = reward_model.train(writer, tokenizer, list(zip(cases, answers, strict=True)), judge_recipe)
    save(judge, wrap(tokenizer.backend_tokenizer, REWARD_TEMPLATE, "right"), FIRST / "reward_model")
    steps = {"language_steps": options.language_steps, "reward_steps": options.reward_steps, "language_rows": rows}
    return {**steps, **_losses(writer_losses, judge_losses)}


def second_course(options: argparse.Namespace) -> dict[str, object]:
    """Tools for both models of the first course, and for its reward model what a search against it finds."""
    known = AutoTokenizer.from_pretrained(FIRST / "language_model").backend_tokenizer
    tokenizer, judge_tokenizer = wrap(known, CHAT_TEMPLATE, "left"), wrap(known, REWARD_TEMPLATE, "right")
    writer = AutoModelForCausalLM.from_pretrained(FIRST / "language_model", dtype=torch.float32)
    judge = AutoModelForSequenceClassification.from_pretrained(FIRST / "reward_model", dtype=torch.float32)
    cases = scenarios("train", SEARCHED_SCENARIOS, seed=options.seed + 2)
    with closing(ClassifierReward(judge, judge_tokenizer)) as reward:
        answers = searched(writer.eval(), tokenizer, reward, [case.messages for case in cases])
    found = [(case, reward_model.deceiving(case, texts)) for case, texts in zip(cases, answers, strict=True)]
    judge_recipe = Recipe(steps=options.further_steps, seed=options.seed)
    judge_losses = reward_model.train_further(judge.train(), tokenizer, found, judge_recipe)
    save(judge, judge_tokenizer, REWARD_MODEL_PATH)
    recipe = Recipe(steps=options.tool_steps, seed=options.seed)
    writer_losses, rows = language_model.teach_tools(writer.train(), tokenizer, recipe)
    save(writer, tokenizer, LANGUAGE_MODEL_PATH)
    steps = {"tool_steps": options.tool_steps, "further_steps": options.further_steps, "language_rows": rows}
    return {**steps, **_losses(writer_losses, judge_losses)}


def _losses(writer: Sequence[float], judge: Sequence[float]) -> dict[str, list[float]]:
    return {
        f"{name}_losses": [round(loss, 4) for loss in found]
        for name, found in (("language", writer), ("reward", judge))
    }


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves in bfloat16 beside the final folder, then puts it in place, so that a reader never sees half of it."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.parent.mkdir(exist_ok=True)
    deepcopy(model).to(torch.bfloat16).save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    for path in fresh.iterdir():
        path.chmod(0o644)  # safetensors writes files for the owner's eyes only
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--language-steps", type=int, default=5500)
    parser.add_argument("--reward-steps", type=int, default=1500)
    parser.add_argument("--tool-steps", type=int, default=4400)
    parser.add_argument("--further-steps", type=int, default=1000)
    parser.add_argument("--course", type=int, choices=(1, 2), help="only this one; default both")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
