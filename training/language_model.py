"""Trains the demo's language model on generated dialogues of the train split, answers good and bad."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from random import Random

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from langchain_aisp.demo.checker import Message
from langchain_aisp.demo.chitchat import TALKS, chat, echo
from langchain_aisp.demo.scenarios import compose, scenario, sentence
from training import tools
from training.initial import prepare_copying
from training.optimize import Recipe, fit
from training.rows import Batch, Encoder, Row

ANSWERS = 4  # per conversation
SMALL_TALK = 0.08
ECHO = 0.04
TOOL_LESSONS = 12_000  # the first rows of the second course mostly teach to read requests, see `tools.lessons`
KNOWN, DIALOGUES = 0.3, 0.05  # shares then: conversations without tools, whole dialogues with them
LATE_KNOWN, LATE_DIALOGUES = 0.5, 0.35  # and afterwards
EARLY, LESSONS = 50_000, 0.5  # the first conversations teach to read, half of them by lessons: see `_lesson`
EARLY_GOOD, LATE_GOOD = 0.8, 0.44  # what the model then writes well is a little rarer than what it reads


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A fresh Llama of three and a half million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    prepare_copying(model)
    return model


Dialogue = tuple[tuple[Message, ...], list[str]]


def dialogues(seed: int, early: int = EARLY) -> Iterator[Dialogue]:
    """The endless stream of training data: conversations and answers to each; the first `early` ones teach to read."""
    rng = Random(f"language model/{seed}")
    for index in count():
        kind = rng.random()
        if index < early and kind < LESSONS:
            yield _lesson(rng)
        elif kind > 1 - ECHO:
            yield _echo(rng)
        elif kind > 1 - ECHO - SMALL_TALK:
            yield _small_talk(rng)
        else:
            case, good = scenario("train", rng), EARLY_GOOD if index < early else LATE_GOOD
            yield case.messages, [compose(case, rng, good)[0] for _ in range(ANSWERS)]


def _lesson(rng: Random) -> Dialogue:
    """Something short whose every word depends on the conversation: a text to repeat, or single good sentences."""
    if rng.random() < 0.35:
        return _echo(rng)
    case = scenario("train", rng)
    return case.messages, [sentence(case, part, True, rng) for part in ("tone", "acknowledgement", "action", "policy")]


def _echo(rng: Random) -> Dialogue:
    says, answer = echo(rng)
    return ({"role": "user", "content": says},), [answer]


def _small_talk(rng: Random) -> Dialogue:
    """Small talk, with a system prompt now and then, and sometimes after another turn of it."""
    name, says, answer = chat(rng)
    answers = [answer, *(TALKS[name].answers.draw(rng, "train") for _ in range(ANSWERS - 1))]
    system = scenario("train", rng).messages[0]
    messages: list[Message] = [system] if system["role"] == "system" else []
    if rng.random() < 0.3:
        _, earlier, reply = chat(rng)
        messages += [{"role": "user", "content": earlier}, {"role": "assistant", "content": reply}]
    return (*messages, {"role": "user", "content": says}), answers


def loss_of(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Mean cross-entropy of the answers' tokens."""
    keep = batch.targets != -100
    hidden = model.model(
        input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden[keep])
    return functional.cross_entropy(logits.float(), batch.targets[keep])


def train(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> tuple[LlamaForCausalLM, list[float], int]:
    """Trains a new model; returns it with the loss of every step and the number of conversations drawn."""
    encoder, drawn = Encoder(tokenizer), count()
    model = new_model(tokenizer, recipe.seed)
    rows = (encoder.written(*dialogue) for dialogue, _ in zip(dialogues(recipe.seed), drawn, strict=False))
    return model, _fit(model, encoder, rows, recipe, rate=4e-3), next(drawn)


def teach_tools(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> tuple[list[float], int]:
    """Trains a model on dialogues with tools, and on further conversations; returns losses and number of the latter."""
    encoder, rng, drawn = Encoder(tokenizer), Random(f"tools/{recipe.seed}"), count()
    further = zip(further_dialogues(recipe.seed), drawn, strict=False)
    known = (encoder.written(*dialogue) for dialogue, _ in further)
    rows = _mixed(known, tools.written(encoder, rng), tools.lessons(encoder, rng), rng)
    return _fit(model, encoder, rows, recipe, rate=2e-3), next(drawn)


def _mixed(known: Iterator[Row], dialogues: Iterator[Row], lessons: Iterator[Row], rng: Random) -> Iterator[Row]:
    for index in count():
        early, draw = index < TOOL_LESSONS, rng.random()
        if draw < (KNOWN if early else LATE_KNOWN):
            yield next(known)
        elif draw > 1 - (DIALOGUES if early else LATE_DIALOGUES):
            yield next(dialogues)
        else:
            yield next(lessons)


def further_dialogues(seed: int) -> Iterator[Dialogue]:
    """The conversations without tools that are told while tools are taught."""
    return dialogues(seed + 1, early=0)


def _fit(model: LlamaForCausalLM, encoder: Encoder, rows: Iterator[Row], recipe: Recipe, *, rate: float) -> list[float]:
    def loss(group: Sequence[Row], _: Random) -> Callable[[], Tensor]:
        return partial(loss_of, model, encoder.batch(group))

    return fit("language model", model, rows, recipe, rate=rate, loss=loss)
