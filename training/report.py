"""Measures the shipped demo models and writes `training/results/report.json` and the numbers of `docs/demo_models.md`.

Run it from the repository root with `python -m training.report`.
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, combinations, islice
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from langchain_aisp.demo import LANGUAGE_MODEL_PATH, PARTS, REWARD_MODEL_PATH, Scenario, check, compose, draft, redraw
from langchain_aisp.demo.scenarios import scenarios
from training import language_model
from training.build import RESULTS
from training.rows import Encoder
from training.sampling import sample

DOCS = Path(__file__).parent.parent / "docs" / "demo_models.md"
MARKER = "<!-- measured by training/report.py, do not edit below -->"
PROMPTS, SAMPLES, SMALL = 12, 512, 64
PAIRS = 400
SHOWN = ("My parcel is late", "Hello, I am Maya. Order 48213 arrived broken!", "Hello", "What is your name?")


class Models:
    """The shipped pair, loaded as a user loads it."""

    def __init__(self) -> None:
        """Loads both folders in float32."""
        self.writer = AutoModelForCausalLM.from_pretrained(LANGUAGE_MODEL_PATH, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(LANGUAGE_MODEL_PATH)
        self.judge = AutoModelForSequenceClassification.from_pretrained(REWARD_MODEL_PATH, dtype=torch.float32).eval()
        self.judge_tokenizer = AutoTokenizer.from_pretrained(REWARD_MODEL_PATH)

    @torch.inference_mode()
    def rewards(self, pairs: Sequence[tuple[Sequence[Mapping[str, str]], str]], rows: int = 64) -> list[float]:
        """Rewards of (conversation, answer) pairs."""
        chats = [[*map(dict, chat), {"role": "assistant", "content": answer}] for chat, answer in pairs]
        texts = [self.judge_tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        rewards: list[float] = []
        for start in range(0, len(texts), rows):
            inputs = self.judge_tokenizer(texts[start : start + rows], return_tensors="pt", padding=True)
            logits = self.judge(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            rewards += logits[:, 0].tolist()
        return rewards


def main() -> None:
    """Measures everything, prints and writes it."""
    torch.manual_seed(0)
    models = Models()
    courses = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ("first_course", "second_course")}
    plain = Plain(models)
    report = {
        "sizes": sizes(models),
        "losses": losses(models, courses),
        "build": {f"{name}: {key}": made[key] for name, made in courses.items() for key in made if _is_cost(key)},
        "reward_accuracy_test": reward_accuracy(models, "test"),
        "samples": plain.frequencies(training_answers(courses)),
        "best_of_n": plain.best_of_n(),
        "plain_answers": plain_answers(models),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    _write_docs(report)
    print(json.dumps(report, indent=1, ensure_ascii=False))


def sizes(models: Models) -> dict[str, float]:
    """Parameters in millions and megabytes of weights."""
    return {
        "language_model_parameters_m": models.writer.num_parameters() / 1e6,
        "language_model_mb": (LANGUAGE_MODEL_PATH / "model.safetensors").stat().st_size / 1e6,
        "reward_model_parameters_m": models.judge.num_parameters() / 1e6,
        "reward_model_mb": (REWARD_MODEL_PATH / "model.safetensors").stat().st_size / 1e6,
        "vocabulary": len(models.tokenizer),
    }


@torch.inference_mode()
def losses(models: Models, courses: Mapping[str, Mapping[str, list[float]]]) -> dict[str, float]:
    """Losses at the end of each course, and the language model's on all three splits, in nats per answer token."""
    encoder, rng = Encoder(models.tokenizer), Random(0)
    found = {
        f"{course}: {name}": statistics.mean(made[f"{name}_losses"][-20:])
        for course, made in courses.items()
        for name in ("language", "reward")
    }
    for split in ("train", "dev", "test"):
        cases = scenarios(split, 64, seed=77)
        rows = [encoder.written(case.messages, [compose(case, rng)[0] for _ in range(4)]) for case in cases]
        found[f"language_{split}"] = language_model.loss_of(models.writer, encoder.batch(rows)).item()
    return found


def _is_cost(key: str) -> bool:
    return key.endswith(("_steps", "_minutes"))


def reward_accuracy(models: Models, split: str) -> dict[str, float]:
    """Share of pairs in which the better answer gets the higher reward: independent pairs, and pairs one part apart."""
    rng = Random(f"accuracy/{split}")
    accuracy = {"independent": _accuracy(models, _independent_pairs(split, rng))}
    for part in PARTS:
        accuracy[part] = _accuracy(models, _neighbour_pairs(split, part, rng))
    return accuracy


def _independent_pairs(split: str, rng: Random) -> Iterator[tuple[Scenario, str, str]]:
    for case in scenarios(split, 2 * PAIRS, seed=11):
        (one, one_labels), (two, two_labels) = compose(case, rng), compose(case, rng)
        if one_labels.score != two_labels.score:
            yield (case, one, two) if one_labels.score > two_labels.score else (case, two, one)


def _neighbour_pairs(split: str, part: str, rng: Random) -> Iterator[tuple[Scenario, str, str]]:
    for case in scenarios(split, PAIRS, seed=13):
        answer = draft(case, rng)
        yield case, redraw(case, answer, part, True, rng).text, redraw(case, answer, part, False, rng).text


def _accuracy(models: Models, pairs: Iterator[tuple[Scenario, str, str]]) -> float:
    pairs_list = list(pairs)
    better = models.rewards([(case.messages, text) for case, text, _ in pairs_list])
    worse = models.rewards([(case.messages, text) for case, _, text in pairs_list])
    return statistics.mean(float(a > b) for a, b in zip(better, worse, strict=True))


class Plain:
    """Plain samples at temperature 1 on dev prompts, with their rewards and checks."""

    def __init__(self, models: Models) -> None:
        """Draws and scores `SAMPLES` answers to each of `PROMPTS` scenarios."""
        self.cases = scenarios("dev", PROMPTS, seed=3)
        self.answers: list[list[str]] = []
        self.rewards: list[list[float]] = []
        self.ended = 0
        for case in self.cases:
            answers = sample(models.writer, models.tokenizer, [case.messages], SAMPLES)[0]
            self.answers.append(answers)
            self.rewards.append(models.rewards([(case.messages, answer) for answer in answers]))
            self.ended += sum(len(models.tokenizer(answer)["input_ids"]) < 64 for answer in answers)
        self.checks = [[check(c, text) for text in texts] for c, texts in zip(self.cases, self.answers, strict=True)]

    def frequencies(self, trained: set[str]) -> dict[str, object]:
        """How often parts are good, answers perfect, complete, or verbatim those of the training."""
        checks = [found for row in self.checks for found in row]
        texts = [text for row in self.answers for text in row]
        columns = [[float(getattr(found, part)) for found in checks] for part in PARTS]
        pairs = list(combinations(columns, 2))
        return {
            "count": len(checks),
            "good_parts": {part: statistics.mean(column) for part, column in zip(PARTS, columns, strict=True)},
            "perfect": statistics.mean(found.score == len(PARTS) for found in checks),
            "gold_mean": statistics.mean(found.score for found in checks),
            "largest_correlation_of_two_parts": max(abs(statistics.correlation(*pair)) for pair in pairs),
            "ended_within_64_tokens": self.ended / len(checks),
            "verbatim_training_answers": statistics.mean(text in trained for text in texts),
            "training_answers": len(trained),
        }

    def best_of_n(self) -> dict[str, float]:
        """Best-of-64 and Best-of-512 by the reward model: its reward, and the gold score of what it picks."""
        spread = statistics.mean(statistics.stdev(row) for row in self.rewards)
        gold_spread = statistics.mean(statistics.stdev(found.score for found in row) for row in self.checks)
        best = {size: [self._picked(row, size) for row in range(PROMPTS)] for size in (1, SMALL, SAMPLES)}
        found: dict[str, float] = {"reward_spread": spread, "gold_spread": gold_spread}
        for size, picks in best.items():
            found[f"reward_{size}"] = statistics.mean(reward for reward, _ in picks)
            found[f"gold_{size}"] = statistics.mean(gold for _, gold in picks)
        found["reward_rise_in_spreads"] = (found[f"reward_{SAMPLES}"] - found[f"reward_{SMALL}"]) / spread
        found["gold_rise_in_spreads"] = (found[f"gold_{SAMPLES}"] - found[f"gold_{SMALL}"]) / gold_spread
        return found

    def _picked(self, row: int, size: int) -> tuple[float, float]:
        """Mean reward and gold of the best of each disjoint group of `size` samples."""
        scored = [(reward, found.score) for reward, found in zip(self.rewards[row], self.checks[row], strict=True)]
        picks = [max(scored[start : start + size]) for start in range(0, SAMPLES, size)]
        return statistics.mean(pick[0] for pick in picks), statistics.mean(pick[1] for pick in picks)


def training_answers(courses: Mapping[str, Mapping[str, int]]) -> set[str]:
    """All answers to conversations without tools that the language model was trained on."""
    streams = {"first_course": language_model.dialogues, "second_course": language_model.further_dialogues}
    dialogues = chain.from_iterable(
        islice(stream(courses[name]["seed"]), courses[name]["language_rows"]) for name, stream in streams.items()
    )
    return {answer for _, answers in dialogues for answer in answers}


def plain_answers(models: Models) -> list[dict[str, object]]:
    """Ten first samples as they come: four fixed messages and six dev scenarios."""
    chats: list[list[Mapping[str, str]]] = [[{"role": "user", "content": text}] for text in SHOWN]
    cases = scenarios("dev", 6, seed=5)
    chats += [list(case.messages) for case in cases]
    texts = [row[0] for row in sample(models.writer, models.tokenizer, chats, 1)]
    rewards = models.rewards(list(zip(chats, texts, strict=True)))
    judged = zip(cases, texts[len(SHOWN) :], strict=True)
    scores = [None] * len(SHOWN) + [check(case, text).score for case, text in judged]
    shown = zip(chats, texts, rewards, scores, strict=True)
    return [{"chat": chat, "answer": text, "reward": reward, "gold": gold} for chat, text, reward, gold in shown]


def _write_docs(report: Mapping[str, object]) -> None:
    head = DOCS.read_text().split(MARKER)[0] if DOCS.exists() else ""
    DOCS.write_text(head + MARKER + "\n\n" + "\n".join(_markdown(report)) + "\n")


def _markdown(report: Mapping[str, object]) -> Iterator[str]:
    for name, values in report.items():
        yield f"## {_title(name)}\n"
        if isinstance(values, Mapping):
            yield "| measure | value |\n|---|---|"
            yield from (f"| {_title(key)} | {_number(value)} |" for key, value in _flat(values))
        elif isinstance(values, list):
            yield from map(_answer, values)
        yield ""


def _flat(values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}: {inner}", number) for inner, number in value.items())
        else:
            yield key, value


def _answer(shown: Mapping[str, object]) -> str:
    chat = shown["chat"]
    assert isinstance(chat, list)
    turns = "\n".join(f"> **{message['role']}** {message['content']}  " for message in chat)
    gold = "" if shown["gold"] is None else f", gold {shown['gold']}"
    return f"{turns}\n> **answer** {shown['answer']} (reward {shown['reward']:.2f}{gold})\n"


def _title(name: str) -> str:
    return name.replace("_", " ")


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
