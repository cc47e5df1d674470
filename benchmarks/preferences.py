"""Trains two preference models for the pair `preference`, reward and gold: `python -m benchmarks.preferences`.

A comparison is of a reply that a person gave in a dialogue (Schema-Guided Dialogue, CC BY-SA 4.0) with one that is out
of place there: the language model's own, drawn at temperature 1, or what was said elsewhere in the same dialogue. The
person's is preferred. So the models learn what the language model gets wrong and whether an answer fits, from no
reference, and are as noisy as that; a search finds their mistakes, which is what gold is for. Reward and gold see
unlike halves of the train dialogues, in unlike orders, and both start from the language model's body.

People's own verdicts on pairs of answers (HH-RLHF) would be the better comparisons, but they are about a world that the
language model has never heard of, so neither it nor a search could tell good from bad there.

Neither the dialogues nor models trained on them belong into a package: the folder is not to be committed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from random import Random

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification
from transformers import PreTrainedTokenizerFast as Tokenizer

from benchmarks.pairs import Sources, add_sources, cut, sgd_dialogues, sources_of
from training.build import save
from training.optimize import Recipe, fit
from training.reward_model import loss_of, new_model, rewards_of
from training.rows import Encoder, Judged, Row
from training.sampling import sample
from training.tokenizer import REWARD_TEMPLATE

HALVES = {"reward": 0, "gold": 1}
OWN = 2  # replies of the language model's own in each comparison
RATE = 1e-3
LONGEST_REPLY = 40  # tokens, as the pair's


@dataclass(frozen=True)
class Comparison:
    """A conversation, the reply that is preferred, and others.

    Attributes:
        messages: What is answered.
        reply: What a person said.
        own: What the language model says.
        elsewhere: What was said elsewhere in the dialogue.
    """

    messages: tuple[dict[str, str], ...]
    reply: str
    own: tuple[str, ...]
    elsewhere: tuple[str, ...]

    def row(self, encoder: Encoder) -> Row:
        """Reads of the reply, which is the first, and of all others."""
        texts = [(self.reply, 1.0), *((text, 0.0) for text in (*self.own, *self.elsewhere))]
        return encoder.judged(self.messages, [Judged.whole(text, liking) for text, liking in texts])


def comparisons(
    model: LlamaForCausalLM, tokenizer: Tokenizer, dialogues: Sequence[Sequence[dict[str, str]]], seed: int
) -> list[Comparison]:
    """One of each dialogue that can be cut; the language model answers all of them."""
    found = [(dialogue, cut(dialogue, Random(f"{seed}/{index}"))) for index, dialogue in enumerate(dialogues)]
    asked = [(dialogue, *parts) for dialogue, parts in found if parts is not None]
    chats = [messages for _, messages, _ in asked]
    drawn = sample(model, tokenizer, chats, OWN, max_tokens=LONGEST_REPLY, seed=seed)
    return [
        Comparison(
            messages,
            reply,
            tuple(text for text in own if text not in ("", reply)),
            _elsewhere(dialogue, reply, Random(f"{seed}/{index}")),
        )
        for index, ((dialogue, messages, reply), own) in enumerate(zip(asked, drawn, strict=True))
    ]


def _elsewhere(dialogue: Sequence[dict[str, str]], reply: str, rng: Random) -> tuple[str, ...]:
    """Another of the dialogue's replies, if it has one."""
    others = sorted({turn["content"] for turn in dialogue if turn["role"] == "assistant"} - {reply})
    return tuple(rng.sample(others, min(1, len(others))))


def half(dialogues: Sequence[Sequence[dict[str, str]]], which: str, most: int) -> list[Sequence[dict[str, str]]]:
    """The dialogues that one of the two models learns from."""
    return list(dialogues[HALVES[which] :: len(HALVES)][:most])


def train(
    model: LlamaForCausalLM, tokenizer: Tokenizer, known: Sequence[Comparison], recipe: Recipe
) -> LlamaForSequenceClassification:
    """A new preference model that has learnt from comparisons."""
    encoder, judge = Encoder(tokenizer), new_model(model)
    rows = [each.row(encoder) for each in known if each.own or each.elsewhere]

    def loss(group: Sequence[Row], rng: Random) -> Callable[[], Tensor]:
        return partial(loss_of, judge, encoder.batch(group), verdicts(group))

    fit("preference model", judge, _again_and_again(rows, recipe.seed), recipe, rate=RATE, loss=loss)
    return judge.eval()


def verdicts(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Reads of a batch that were preferred, each with one that was not."""
    found, start = [], 0
    for row in rows:
        found += [(start, start + other) for other in range(1, len(row.reads))]
        start += len(row.reads)
    return found


def _again_and_again(rows: Sequence[Row], seed: int) -> Iterator[Row]:
    """The rows without end, each time in another order."""
    for number in count():
        yield from Random(f"{seed}/{number}").sample(rows, len(rows))


@torch.inference_mode()
def accuracy(judge: LlamaForSequenceClassification, tokenizer: Tokenizer, held_out: Sequence[Comparison]) -> float:
    """How often a person's reply is preferred to another, over all comparisons."""
    encoder, right = Encoder(tokenizer), list[bool]()
    for each in held_out:
        rewards = rewards_of(judge, encoder.batch([each.row(encoder)])).tolist()
        right += [rewards[0] > other for other in rewards[1:]]
    return sum(right) / max(len(right), 1)


def make(which: str, sources: Sources, *, dialogues: int, held_out: int, steps: int) -> dict[str, float]:
    """Trains and saves one of the two models.

    Args:
        which: ``reward`` or ``gold``.
        sources: Where model and dialogues lie, and where the new model goes.
        dialogues: How many are learnt from.
        held_out: How many of the dev split's are judged afterwards.
        steps: Of the optimiser.

    Returns:
        Shares of held-out comparisons that are judged rightly: against the language model's own replies, against those
        from elsewhere; and the minutes of the processor.
    """
    started, seed = time.process_time(), HALVES[which] + 1
    torch.manual_seed(seed)
    folder = sources.path("model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    learnt = half(sgd_dialogues(sources, "train"), which, dialogues)
    known = comparisons(model, tokenizer, learnt, seed)
    judge = train(model, tokenizer, known, Recipe(steps=steps, seed=seed))
    unseen = comparisons(model, tokenizer, sgd_dialogues(sources, "dev")[-held_out:], seed)
    told = {
        "own": accuracy(judge, tokenizer, [Comparison(each.messages, each.reply, each.own, ()) for each in unseen]),
        "elsewhere": accuracy(
            judge, tokenizer, [Comparison(each.messages, each.reply, (), each.elsewhere) for each in unseen]
        ),
    }
    tokenizer.chat_template = REWARD_TEMPLATE
    sources.judges.mkdir(parents=True, exist_ok=True)
    save(judge, tokenizer, sources.judges / which)
    return {**told, "cpu_minutes": (time.process_time() - started) / 60}


def main() -> None:
    """Make both models, but for those that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser)
    parser.add_argument("--dialogues", type=int, default=3000, help="learnt from by each model")
    parser.add_argument("--held-out", type=int, default=200, help="dialogues that are judged afterwards")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the optimiser shares the cores out
    sources = sources_of(args)
    for which in HALVES:
        if (sources.judges / which).is_dir():
            print(f"{which}: is there", flush=True)
            continue
        told = make(which, sources, dialogues=args.dialogues, held_out=args.held_out, steps=args.steps)
        print(f"{which}: " + ", ".join(f"{name} {value:.3f}" for name, value in told.items()), flush=True)


if __name__ == "__main__":
    main()
