"""Trains the demo's reward model on noisy comparisons (Bradley-Terry); it never sees the checker at work.

A labeller prefers one answer over another with a probability that grows with the weighted difference of their good
parts. The weights are the labeller's taste; neither the model nor its user knows them. A second course shows the model
what a search against it finds: where it liked what the labeller does not, it learns to know better.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import combinations, count
from random import Random

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from langchain_aisp.demo.checker import PARTS, Checks, Scenario, check
from langchain_aisp.demo.chitchat import chat
from langchain_aisp.demo.scenarios import Draft, draft, redraw, scenario, sentence
from training import tools
from training.optimize import Recipe, fit
from training.rows import Batch, Encoder, Judged, Row

LAYERS = 6  # the language model's four, which foretell a good answer, one to compare with it and one to add up
TASTE = {"tone": 1.0, "acknowledgement": 1.3, "action": 1.2, "policy": 1.1, "privacy": 1.2, "closing": 0.9}
SHARPNESS = 3.0  # of the labeller: a difference of one part is judged rightly in about nineteen of twenty cases
SMALL_TALK = 0.04
EARLY, EARLY_LESSONS, LESSONS = 6_500, 0.85, 0.3  # the first rows mostly teach to judge single sentences
SAMPLED = 0.15  # share of rows with the language model's own answers
TOOLS, FOUND = 0.2, 0.3  # shares of the second course: answers after tools' results, and what a search finds
HARD = ("acknowledgement", "action", "policy")  # parts that need the conversation
VERDICTS = 96  # most comparisons of one row that are judged: about one part apart, where it can be
JUNK = ("", ".", "???", "asdf asdf asdf", "the the the the the the", "I", "order order order", "lol", "0 0 0 0 0 0")


def liking(checks: Checks) -> float:
    """The labeller's hidden utility of a whole answer."""
    return sum(TASTE[part] * value for part, value in asdict(checks).items())


def new_model(language_model: LlamaForCausalLM) -> LlamaForSequenceClassification:
    """A classifier that starts from the language model; further layers and the head start at zero."""
    config = LlamaConfig(**{**language_model.config.to_dict(), "num_hidden_layers": LAYERS, "num_labels": 1})
    config.architectures = ["LlamaForSequenceClassification"]
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(language_model.model.state_dict(), strict=False)
    for layer in model.model.layers[language_model.config.num_hidden_layers :]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    torch.nn.init.zeros_(model.score.weight)
    return model


def judged(answer: Draft) -> Judged:
    """A draft with the liking of every beginning that ends with a sentence, since parts are liked one by one."""
    text, likings = answer.text, []
    for sentences in range(1, len(answer.layout) + 1):
        said = answer.layout[:sentences]
        beginning = replace(answer, layout=said).text
        if text.startswith(beginning):
            likings.append((len(beginning), sum(TASTE[part] * getattr(answer.labels, part) for part in said)))
    return Judged(text, tuple(likings))


def candidates(case: Scenario, rng: Random) -> list[Judged]:
    """Answers to one scenario: good, mixed, differing in one part, broken, and junk."""
    first, second = draft(case, rng, rng.choice((0.4, 0.6, 0.8))), draft(case, rng)
    drafts = [first, second, _neighbour(case, first, rng), _neighbour(case, first, rng)]
    return [*map(judged, drafts), _broken(case, first, rng)]


def _neighbour(case: Scenario, answer: Draft, rng: Random) -> Draft:
    """The same answer with one part turned from good to bad or back."""
    part = rng.choice((*PARTS, *HARD))
    return redraw(case, answer, part, not getattr(answer.labels, part), rng)


def _broken(case: Scenario, answer: Draft, rng: Random) -> Judged:
    """A cut, repeated, shuffled, foreign or meaningless text."""
    words = answer.text.split()
    kind = rng.choice(("cut", "cut", "repeated", "shuffled", "junk", "foreign"))
    if kind == "cut":
        text = " ".join(words[: rng.randrange(len(words))])
    elif kind == "repeated":
        again = rng.choice(answer.sentences)
        text = rng.choice((" ".join([again] * rng.randint(2, 6)), f"{answer.text} {again} {again}"))
    elif kind == "shuffled":
        text = " ".join(rng.sample(words, len(words)))
    elif kind == "junk":
        text = rng.choice(JUNK)
    else:
        return _foreign(case, rng)
    return Judged.whole(text, liking(check(case, text)) - 1.5)


def _foreign(case: Scenario, rng: Random) -> Judged:
    """An answer to somebody else's question, or small talk."""
    text = draft(scenario(case.split, rng), rng, 0.8).text if rng.random() < 0.7 else chat(rng, case.split)[2]
    return Judged.whole(text, liking(check(case, text)))


def _small_talk(encoder: Encoder, rng: Random) -> Row:
    """The right answer to small talk, answers to other small talk, and a rude service answer."""
    name, says, right = chat(rng)
    others = [other for other in (chat(rng) for _ in range(3)) if other[0] != name]
    rude = draft(scenario("train", rng), rng, 0.2).text
    answers = [Judged.whole(right, 5.0), *(Judged.whole(other[2], 2.0) for other in others)]
    answers += [Judged.whole(rude, 0.0), Judged.whole(rng.choice(JUNK), -1.5)]
    return encoder.judged([{"role": "user", "content": says}], answers)


def _lesson(encoder: Encoder, rng: Random) -> Row:
    """Single sentences of one part, good and bad: many comparisons of what needs the conversation, in few tokens."""
    case, part = scenario("train", rng), rng.choice(("action", *HARD))  # an action has the most ways to be wrong
    labels = [True] * 5 + [False] * 9
    answers = [Judged.whole(sentence(case, part, good, rng), TASTE[part] * good) for good in labels]
    return encoder.judged(case.messages, answers)


Answered = Sequence[tuple[Scenario, Sequence[str]]]  # train scenarios with the language model's own answers


def comparisons(encoder: Encoder, sampled: Answered, seed: int, early: int = EARLY) -> Iterator[Row]:
    """The endless first course; its first `early` rows mostly teach to judge single sentences."""
    rng = Random(f"reward model/{seed}")
    for index in count():
        draw, lessons = rng.random(), EARLY_LESSONS if index < early else LESSONS
        if draw < SMALL_TALK:
            yield _small_talk(encoder, rng)
        elif draw < SMALL_TALK + lessons:
            yield _lesson(encoder, rng)
        elif sampled and draw > 1 - SAMPLED and index >= early:
            yield _own(encoder, sampled, rng)
        else:
            case = scenario("train", rng)
            yield encoder.judged(case.messages, candidates(case, rng))


def _own(encoder: Encoder, answered: Answered, rng: Random) -> Row:
    """Some of the language model's own answers to one scenario, and two of the generator's."""
    case, texts = rng.choice(answered)
    own = [Judged.whole(text, liking(check(case, text))) for text in rng.sample(texts, min(4, len(texts)))]
    return encoder.judged(case.messages, own + candidates(case, rng)[:2])


def further(encoder: Encoder, found: Answered, seed: int) -> Iterator[Row]:
    """The endless second course: answers after tools' results, answers that a search found, and what is known."""
    rng = Random(f"reward model, further/{seed}")
    with_tools, known = tools.judged(encoder, rng), comparisons(encoder, (), seed + 1, early=0)
    while True:
        draw = rng.random()
        if draw < TOOLS:
            yield next(with_tools)
        else:
            yield _own(encoder, found, rng) if draw < TOOLS + FOUND else next(known)


def deceiving(case: Scenario, texts: Sequence[str], most: int = 8) -> list[str]:
    """Of answers in the order of their rewards, the first of each set of good parts: equals are no lesson."""
    first: dict[Checks, str] = {}
    for text in texts:
        first.setdefault(check(case, text), text)
    return list(first.values())[:most]


def loss_of(model: LlamaForSequenceClassification, batch: Batch, verdicts: Sequence[tuple[int, int]]) -> Tensor:
    """Bradley-Terry loss of the verdicts, plus a light pull of the rewards towards zero."""
    rewards = rewards_of(model, batch)
    chosen, rejected = (list(column) for column in zip(*verdicts, strict=True))
    return -functional.logsigmoid(rewards[chosen] - rewards[rejected]).mean() + 1e-3 * rewards.square().mean()


def _judge(rows: Sequence[Row], rng: Random) -> list[tuple[int, int]]:
    """The labeller's noisy verdicts on pairs of reads of each row: (chosen, rejected), counted over the batch.

    Of two that are equally good in the labeller's eyes none is chosen.
    """
    verdicts, start = [], 0
    for row in rows:
        likings = [read.liking for read in row.reads]
        pairs = [(a, b) for a, b in combinations(range(len(likings)), 2) if likings[a] != likings[b]]
        drawn = rng.sample(pairs, min(3 * VERDICTS, len(pairs)))
        for a, b in sorted(drawn, key=lambda pair: abs(abs(likings[pair[0]] - likings[pair[1]]) - 1))[:VERDICTS]:
            prefers_a = rng.random() < _sigmoid(SHARPNESS * (likings[a] - likings[b]))
            verdicts.append((start + a, start + b) if prefers_a else (start + b, start + a))
        start += len(likings)
    return verdicts


def rewards_of(model: LlamaForSequenceClassification, batch: Batch) -> Tensor:
    """Rewards of all reads in a batch, [E] float32."""
    hidden = model.model(
        input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    rewards: Tensor = model.score(hidden[batch.reads[:, 0], batch.reads[:, 1]])
    return rewards.float()[:, 0]


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def train(
    language_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sampled: Answered, recipe: Recipe
) -> tuple[LlamaForSequenceClassification, list[float]]:
    """Trains a new reward model; returns it with the loss of every step."""
    encoder, model = Encoder(tokenizer), new_model(language_model)
    return model, _fit(model, encoder, comparisons(encoder, sampled, recipe.seed), recipe)


def train_further(
    model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, found: Answered, recipe: Recipe
) -> list[float]:
    """Gives a reward model its second course; returns the loss of every step."""
    encoder = Encoder(tokenizer)
    return _fit(model, encoder, further(encoder, found, recipe.seed), recipe)


def _fit(model: LlamaForSequenceClassification, encoder: Encoder, rows: Iterator[Row], recipe: Recipe) -> list[float]:
    def loss(group: Sequence[Row], rng: Random) -> Callable[[], Tensor]:
        return partial(loss_of, model, encoder.batch(group), _judge(group, rng))

    return fit("reward model", model, rows, recipe, rate=2e-3, loss=loss)
