"""Four pairs of a language model and a reward, of different characters, each with a gold reward that no search sees.

`demo`: the package's own pair. The reward model was trained on comparisons of six parts; gold counts the parts exactly.
`conflict`: the same model under a sum of the reward model and of rules against its own leanings: what it likes best is
long, repeats sentences and ends alike. A few answers in a hundred are short enough, and six parts can be as short, so
gold is the exact checker here, too.
`similarity`: a small model of customer service (Schema-Guided Dialogue) and the closeness to the reply that a person
gave there. No pretrained embeddings are needed: they are latent semantics (TF-IDF, truncated singular value
decomposition) of replies of the train split, which know words and no order. Gold is ROUGE-L, which knows order and
hardly meaning. Both count in tenths of their range, so that settings in units of the reward mean something alike.
`preference`: the same model and a reward model that tells people's replies from others, see `benchmarks.preferences`.
Gold was trained alike on other dialogues.

Prompts of dev and test come from unlike dialogues; value networks and reward models learn from train only.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from langchain_aisp.demo import REWARD_MODEL_PATH
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.evaluation.arms import Arm
from langchain_aisp.evaluation.datasets import PromptRecord, demo_gold, read_prompts
from langchain_aisp.evaluation.datasets import demo_prompts as demo_customers
from langchain_aisp.evaluation.run import Evaluation
from langchain_aisp.noise import fold, normal
from langchain_aisp.rewards import (
    ClassifierReward,
    EmbeddingReward,
    RuleReward,
    WeightedSum,
    as_reward,
    length_between,
    must_satisfy,
    no_topic,
)
from langchain_aisp.types import Chat, Reward, require

RUNS = Path(__file__).parent / "runs"  # what the benchmarks keep for themselves: runs, networks, reward models
DEMO_SEED, CONFLICT_SEED = 12, 13  # customers that have met no other benchmark
TENTHS = 10.0
ROUND = 3  # of dialogues in a new order: what a method has been changed after is not asked again

Prompts = tuple[PromptRecord, ...]


@dataclass(frozen=True)
class Sources:
    """Folders that a pair may need; where they lie is said on the command line.

    Attributes:
        model: A language model of customer service.
        data: Dialogues, ``sgd_train.jsonl.gz``, ``sgd_dev.jsonl.gz`` and ``sgd_test.jsonl.gz``.
        judges: Reward models that ``benchmarks.preferences`` has made.
    """

    model: Path | None = None
    data: Path | None = None
    judges: Path = RUNS / "judges"

    def missing(self, names: Sequence[str]) -> str | None:
        """Why a pair that needs these folders cannot be opened; None if it can."""
        lacking = [name for name in names if (found := getattr(self, name)) is None or not found.is_dir()]
        told = "; ".join(f"--{name} FOLDER names {_WHAT[name]}" for name in lacking)
        return f"it needs what is not there: {told}" if told else None

    def path(self, name: str) -> Path:
        """A folder that is there.

        Raises:
            ValueError: It is not.
        """
        reason = self.missing([name])
        require(reason is None, str(reason))
        found: Path = getattr(self, name)
        return found


_WHAT = {
    "model": "a causal language model of customer service dialogues",
    "data": "the dialogues sgd_train.jsonl.gz, sgd_dev.jsonl.gz and sgd_test.jsonl.gz",
    "judges": "the reward models that python -m benchmarks.preferences makes",
}


@dataclass(frozen=True)
class Pair:
    """A language model and a reward, and what they are measured on.

    Attributes:
        engine: Loads the language model.
        prompts: Reads so many prompts of a split.
        reward: What the searches optimise; it may look up what the prompts know.
        gold: What judges without being seen.
        max_tokens: Longest answer.
        temperatures: Sampling temperatures among which every method finds its best, rising.
        needs: Fields of ``Sources``.
    """

    engine: Callable[[Sources], TransformersEngine]
    prompts: Callable[[Sources, str, int], Prompts]
    reward: Callable[[Sources, Prompts], Reward]
    gold: Callable[[Sources, Prompts], Reward]
    max_tokens: int
    temperatures: tuple[float, ...]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Opened:
    """A pair with its models loaded and its prompts read."""

    name: str
    engine: TransformersEngine
    reward: Reward
    gold: Reward
    prompts: Prompts

    def evaluation(self, *arms: Arm) -> Evaluation:
        """What the arms are to be asked."""
        return Evaluation(
            engine=self.engine,
            reward=self.reward,
            arms=arms,
            prompts=self.prompts,
            gold=self.gold,
            base_logprobs=True,
            gold_of="answers",
            dataset=self.name,
        )


@cache
def open_pair(name: str, sources: Sources, split: str, count: int) -> Opened:
    """A pair on the first prompts of a split, once per process.

    Raises:
        ValueError: There is no such pair, or it needs folders that are not there.
    """
    require(name in PAIRS, f"there is no pair {name!r}; choose some of {', '.join(PAIRS)}")
    pair = PAIRS[name]
    prompts = pair.prompts(sources, split, count)
    engine, reward, gold = pair.engine(sources), pair.reward(sources, prompts), pair.gold(sources, prompts)
    return Opened(f"{name}:{split}", engine, reward, gold, prompts)


def add_sources(parser: argparse.ArgumentParser) -> None:
    """The folders as options of a command."""
    parser.add_argument("--model", type=Path, help=_WHAT["model"])
    parser.add_argument("--data", type=Path, help=_WHAT["data"])
    parser.add_argument("--judges", type=Path, default=Sources.judges, help=_WHAT["judges"])


def sources_of(args: argparse.Namespace) -> Sources:
    """The folders that a command was given."""
    return Sources(args.model, args.data, args.judges)


# ---------------------------------------------------------------------------------------------------------------------
# The demo's parts


def demo_engine(sources: Sources) -> TransformersEngine:
    """The package's own language model."""
    return TransformersEngine.shared("demo")


def demo_prompts(sources: Sources, split: str, count: int, *, seed: int = DEMO_SEED) -> Prompts:
    """Customers of the demo; other seeds give others."""
    return tuple(demo_customers(split, count, seed=seed))


def demo_judge(sources: Sources, prompts: Prompts) -> Reward:
    """The package's own reward model."""
    return ClassifierReward.from_pretrained(REWARD_MODEL_PATH, name="demo judge")


def checker(sources: Sources, prompts: Prompts) -> Reward:
    """The number of good parts, 0 to 6."""
    return demo_gold(prompts)


def rules() -> Reward:
    """What goes against the reward model's leanings: some words fewer are worth more than the parts that they hold.

    Its favourites have some 50 words, end by "if you need", and say things twice.
    """
    return RuleReward(
        [
            *(length_between(0, most, weight=4.0, name=f"{most} words at most") for most in (42, 38, 34)),
            no_topic("if you need", "whenever you need", weight=1.0),
            must_satisfy(repeats_nothing, name="nothing twice", weight=1.0),
        ]
    )


def repeats_nothing(text: str) -> bool:
    """Whether no sentence stands twice."""
    sentences = [sentence.strip().lower() for sentence in re.split(r"[.!?]", text) if sentence.strip()]
    return len(sentences) == len(set(sentences))


def conflict(sources: Sources, prompts: Prompts) -> Reward:
    """What the reward model wants, less what rules forbid; a good part is worth about 1."""
    return WeightedSum([(demo_judge(sources, prompts), 0.5), (rules(), 1.0)])


# ---------------------------------------------------------------------------------------------------------------------
# Schema-Guided Dialogue

_LONGEST_PROMPT = 200  # words; with the answer they fit into a context of 512 tokens
_SHORTEST_REPLY = 6  # words; shorter ones are thanks and goodbyes
_REPLIES_OF = 3000  # dialogues whose replies the embeddings are fitted on


def sgd_engine(sources: Sources) -> TransformersEngine:
    """A language model of customer service."""
    return TransformersEngine.shared(str(sources.path("model")))


def sgd_dialogues(sources: Sources, split: str) -> list[tuple[dict[str, str], ...]]:
    """All dialogues of a split, in an order of no meaning, the same every time."""
    records = read_prompts(sources.path("data") / f"sgd_{split}.jsonl.gz")
    whole = [(*map(dict, record.messages), {"role": "assistant", "content": record.reference}) for record in records]
    return Random(f"sgd/{split}/{ROUND}").sample(whole, len(whole))  # type: ignore[arg-type]


def cut(dialogue: Sequence[dict[str, str]], rng: Random) -> tuple[tuple[dict[str, str], ...], str] | None:
    """The dialogue up to one of its longer replies, and that reply; None if it has none within reach."""
    lengths = [len(turn["content"].split()) for turn in dialogue]
    places = [
        place
        for place, turn in enumerate(dialogue)
        if turn["role"] == "assistant" and place > 0
        if lengths[place] >= _SHORTEST_REPLY and sum(lengths[:place]) <= _LONGEST_PROMPT
    ]
    if not places:
        return None
    place = rng.choice(places)
    return tuple(dialogue[:place]), dialogue[place]["content"]


def sgd_prompts(sources: Sources, split: str, count: int) -> Prompts:
    """Conversations of as many dialogues, none twice, with the reply that a person gave; fewer are the first of more.

    Raises:
        ValueError: There are not so many.
    """
    found: dict[tuple[str, ...], PromptRecord] = {}
    for index, dialogue in enumerate(sgd_dialogues(sources, split)):
        if len(found) == count:
            break
        if (parts := cut(dialogue, Random(f"sgd/{split}/{index}"))) is not None:
            messages, reply = parts
            found.setdefault(_said(messages), PromptRecord(f"sgd/{split}/{index}", messages, reference=reply))
    require(len(found) == count, f"the split {split} has {len(found)} prompts, {count} were asked for")
    return tuple(found.values())


def _said(chat: Chat) -> tuple[str, ...]:
    """What tells conversations apart."""
    return tuple(f"{turn['role']}: {turn['content']}" for turn in chat)


def replies_of(prompts: Prompts) -> Callable[[Chat], str]:
    """Finds the reply that a person gave."""
    known = {_said(prompt.messages): str(prompt.reference) for prompt in prompts}
    return lambda chat: known[_said(chat)]


def similarity(sources: Sources, prompts: Prompts) -> Reward:
    """Closeness to a person's reply by latent semantics, −10 to 10; of an unfinished text, too."""
    name = "latent semantics"
    reward = EmbeddingReward(latent_semantics(sources), replies_of(prompts), name=name, fingerprint=name)
    return as_reward(WeightedSum([(reward, TENTHS)]), partial=True)


def overlap(sources: Sources, prompts: Prompts) -> Reward:
    """ROUGE-L with a person's reply, 0 to 10."""
    reply = replies_of(prompts)

    def rouge(chat: Chat, responses: Sequence[str]) -> list[float]:
        """Overlap of each response with the reply."""
        return [TENTHS * rouge_l(words(response), words(reply(chat))) for response in responses]

    return as_reward(rouge, name="ROUGE-L", fingerprint="ROUGE-L")


def preference(which: str) -> Callable[[Sources, Prompts], Reward]:
    """One of the two reward models that tell people's replies from others."""

    def load(sources: Sources, prompts: Prompts) -> Reward:
        """The reward model, from its folder."""
        folder = sources.path("judges") / which
        require(folder.is_dir(), f"there is no reward model at {folder}; python -m benchmarks.preferences makes it")
        return ClassifierReward.from_pretrained(folder, name=f"preference {which}")

    return load


# ---------------------------------------------------------------------------------------------------------------------
# Likeness of texts


_WORD = re.compile(r"\w+(?:[.:'’]\w+)*")


def words(text: str) -> list[str]:
    """Words and numbers in lower case, without punctuation around them."""
    return _WORD.findall(text.lower())


def rouge_l(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Harmonic mean of the shares of both texts that their longest common subsequence makes up, 0 to 1.

    Source: Lin, ROUGE, 2004, section 3.1, with equal weights.
    """
    row = [0] * (len(wanted) + 1)
    for word in found:
        before = row.copy()
        for place, other in enumerate(wanted, start=1):
            row[place] = before[place - 1] + 1 if word == other else max(before[place], row[place - 1])
    return 2 * row[-1] / max(len(found) + len(wanted), 1)


@dataclass(frozen=True, eq=False)
class LatentSemantics:
    """Embeddings of texts by the company that their words keep.

    A text is its words' TF-IDF weights, seen along the directions in which the fitted texts vary most.

    Attributes:
        numbers: A number for each known word.
        rarity: [V], how much a word tells.
        directions: [V, R], orthonormal columns.

    Source: Deerwester et al., Indexing by latent semantic analysis, 1990.
    """

    numbers: dict[str, int]
    rarity: Tensor
    directions: Tensor

    @classmethod
    def fit(cls, texts: Sequence[str], *, rank: int = 128, least: int = 3, rounds: int = 8) -> LatentSemantics:
        """Learn from texts: words that ``least`` of them hold, and ``rank`` directions, by subspace iteration."""
        holding = Counter(word for text in texts for word in set(words(text)))
        known = sorted(word for word, count in holding.items() if count >= least)
        rarity = torch.tensor([len(texts) / holding[word] for word in known]).log() + 1
        found = cls({word: number for number, word in enumerate(known)}, rarity, torch.empty(len(known), 0))
        table = found._table(texts)
        basis = normal(fold(0, torch.arange(len(known))), min(rank, len(known)))
        for _ in range(rounds):
            basis = torch.linalg.qr(table.T @ (table @ basis)).Q
        return cls(found.numbers, rarity, basis)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector per text; zeros for a text without a known word."""
        vectors: list[list[float]] = (self._table(texts) @ self.directions).tolist()
        return vectors

    def _table(self, texts: Sequence[str]) -> Tensor:
        """TF-IDF weights [n, V] of texts, sparse, rows of length one."""
        rows = [self._weights(text) for text in texts]
        places = [[row, number] for row, found in enumerate(rows) for number in found]
        values = [value for found in rows for value in found.values()]
        size = (len(texts), len(self.numbers))
        return torch.sparse_coo_tensor(
            torch.tensor(places).view(-1, 2).T, torch.tensor(values), size, check_invariants=False
        ).coalesce()

    def _weights(self, text: str) -> dict[int, float]:
        counts = Counter(self.numbers[word] for word in words(text) if word in self.numbers)
        weights = {number: count * float(self.rarity[number]) for number, count in counts.items()}
        length = sum(weight**2 for weight in weights.values()) ** 0.5
        return {number: weight / length for number, weight in weights.items()}


@cache
def latent_semantics(sources: Sources) -> LatentSemantics:
    """Embeddings fitted on replies of the train split."""
    return LatentSemantics.fit(list(replies(sgd_dialogues(sources, "train")[:_REPLIES_OF])))


def replies(dialogues: Sequence[Sequence[dict[str, str]]]) -> Iterator[str]:
    """What the assistant says in some dialogues."""
    yield from (turn["content"] for dialogue in dialogues for turn in dialogue if turn["role"] == "assistant")


# ---------------------------------------------------------------------------------------------------------------------
# The table

_DEMO_HEAT, _SGD_HEAT = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7), (0.5, 0.7, 0.85, 1.0, 1.2)
_RULES_HEAT = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5)  # what rules ask for is not what the model would say of itself

PAIRS = {
    "demo": Pair(demo_engine, demo_prompts, demo_judge, checker, 80, _DEMO_HEAT),
    "conflict": Pair(demo_engine, partial(demo_prompts, seed=CONFLICT_SEED), conflict, checker, 80, _RULES_HEAT),
    "similarity": Pair(sgd_engine, sgd_prompts, similarity, overlap, 40, _SGD_HEAT, needs=("model", "data")),
    "preference": Pair(
        sgd_engine,
        sgd_prompts,
        preference("reward"),
        preference("gold"),
        40,
        _SGD_HEAT,
        needs=("model", "data", "judges"),
    ),
}
"""The pairs by name."""
