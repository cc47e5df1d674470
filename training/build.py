"""Rebuilds the demo's tokenizer, language model and reward model from nothing: `python -m training.build`."""

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from langchain_aisp.demo import LANGUAGE_MODEL_PATH, REWARD_MODEL_PATH
from langchain_aisp.demo.scenarios import scenarios
from training import language_model, reward_model
from training.sampling import sample
from training.tokenizer import REWARD_TEMPLATE, train_tokenizer, wrap

RESULTS = Path(__file__).parent / "results"
SAMPLED_SCENARIOS, SAMPLES = 384, 8


def main() -> None:
    """Builds everything and replaces the shipped folders."""
    options = _options()
    torch.set_num_threads(1)  # the cores are shared out by the optimiser, one half of each batch per core
    torch.manual_seed(options.seed)
    started, cpu = time.monotonic(), time.process_time()
    tokenizer = train_tokenizer(options.seed)
    print(f"tokenizer: {len(tokenizer)} tokens, {time.monotonic() - started:.0f} s", flush=True)
    recipe = language_model.Recipe(steps=options.language_steps, seed=options.seed)
    writer, writer_losses, rows = language_model.train(tokenizer, recipe)
    save(writer, tokenizer, LANGUAGE_MODEL_PATH)
    cases = scenarios("train", SAMPLED_SCENARIOS, seed=options.seed + 1)
    answers = sample(writer.eval(), tokenizer, [case.messages for case in cases], SAMPLES)
    print(f"samples: {SAMPLES * len(cases)}, {time.monotonic() - started:.0f} s", flush=True)
    judge_recipe = reward_model.Recipe(steps=options.reward_steps, seed=options.seed)
    judge, judge_losses = reward_model.train(writer, tokenizer, list(zip(cases, answers, strict=True)), judge_recipe)
    save(judge, wrap(tokenizer.backend_tokenizer, REWARD_TEMPLATE, "right"), REWARD_MODEL_PATH)
    wall, busy = (time.monotonic() - started) / 60, (time.process_time() - cpu) / 60
    minutes = {"wall_minutes": round(wall, 1), "cpu_minutes": round(busy, 1)}
    losses = {"language_losses": _rounded(writer_losses), "reward_losses": _rounded(judge_losses)}
    _write_log({**vars(options), **minutes, **losses, "language_rows": rows})
    print(f"done: {minutes}", flush=True)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves in bfloat16 beside the final folder, then puts it in place, so that a reader never sees half of it."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    deepcopy(model).to(torch.bfloat16).save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    for path in fresh.iterdir():
        path.chmod(0o644)  # safetensors writes files for the owner's eyes only
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_log(record: dict[str, object]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "build.json").write_text(json.dumps(record) + "\n")


def _rounded(losses: Sequence[float]) -> list[float]:
    return [round(loss, 4) for loss in losses]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--language-steps", type=int, default=5500)
    parser.add_argument("--reward-steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
