"""Rows for training: one conversation followed by several answers that do not see each other.

The conversation is computed once for all its answers. An answer's tokens attend to the conversation and to their own
predecessors, at the positions they would have alone, so a row trains exactly what separate sequences would train.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from langchain_aisp.demo.tool_dialogues import ToolDialogue

Turn = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]  # in the form of the OpenAI API


class Read(NamedTuple):
    """A place where the reward model is read: the last token of an answer or of one of its first sentences."""

    answer: int  # its number in the row
    token: int  # its number in the answer
    liking: float


class Judged(NamedTuple):
    """An answer and what the labeller thinks of it, and of its beginnings, by number of characters."""

    text: str
    likings: tuple[tuple[int, float], ...]

    @classmethod
    def whole(cls, text: str, liking: float) -> "Judged":
        """An answer that is judged at its end only."""
        return cls(text, ((len(text), liking),))


@dataclass(frozen=True)
class Row:
    """Token ids of a conversation without generation prompt, and of its answers, which begin with `<|assistant|>`.

    Of an answer that holds questions too, `said` tells which tokens are the model's own to learn.
    """

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    reads: tuple[Read, ...] = ()
    said: tuple[tuple[bool, ...], ...] = ()

    @property
    def length(self) -> int:
        """Number of tokens in the row."""
        return len(self.prompt) + sum(map(len, self.answers))


@dataclass(frozen=True)
class Batch:
    """Rows side by side. B rows, L tokens, E reads in all rows together."""

    ids: Tensor  # [B, L] int64
    positions: Tensor  # [B, L] int64
    mask: Tensor  # [B, 1, L, L] bool, true where a token may look
    targets: Tensor  # [B, L] int64, the next token of an answer, -100 elsewhere
    reads: Tensor  # [E, 2] int64, row and column of each read


class Encoder:
    """Turns conversations and answers into token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Takes the language model's tokenizer; the reward model's has the same tokens."""
        self.tokenizer = tokenizer
        marks = ["<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"]
        self.user, self.start, self.end, self.pad = tokenizer.convert_tokens_to_ids(marks)

    def written(self, messages: Sequence[Turn], answers: Sequence[str], tools: Tools = ()) -> Row:
        """Encodes one conversation with answers to write; each closes with `<|end|>`."""
        return Row(self._prompt(messages, tools), tuple((self.start, *self._ids(text), self.end) for text in answers))

    def dialogues(self, dialogues: Sequence[ToolDialogue], tools: Tools) -> Row:
        """Encodes dialogues that do not see each other, each with calls and final answer; the tools are read once."""
        texts = [self._whole(made, tools) for made in dialogues]
        start = texts[0].index(self.user)
        answers = tuple(text[start:] for text in texts)
        return Row(texts[0][:start], answers, said=tuple(map(self._said, answers)))

    def _whole(self, made: ToolDialogue, tools: Tools) -> tuple[int, ...]:
        return (*self._prompt(made.answered, tools), self.start, *self._ids(made.answers[0]), self.end)

    def _said(self, ids: Sequence[int]) -> tuple[bool, ...]:
        """Which tokens the assistant says, its ends included."""
        said, speaking = [], False
        for token in ids:
            said.append(speaking)
            speaking = token == self.start or (speaking and token != self.end)
        return tuple(said)

    def judged(self, messages: Sequence[Turn], answers: Sequence[Judged]) -> Row:
        """Encodes one conversation with answers to judge; their last token is where the reward model is read."""
        coded = [self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for text, _ in answers]
        reads = []
        for number, (answer, code) in enumerate(zip(answers, coded, strict=True)):
            tokens = {0: 0, **{stop: token for token, (_, stop) in enumerate(code["offset_mapping"], 1)}}
            reads += [Read(number, tokens[stop], liking) for stop, liking in answer.likings if stop in tokens]
        return Row(self._prompt(messages), tuple((self.start, *code["input_ids"]) for code in coded), tuple(reads))

    def _prompt(self, messages: Sequence[Turn], tools: Tools = ()) -> tuple[int, ...]:
        turns = [dict(turn) for turn in messages]
        prompt = self.tokenizer.apply_chat_template(turns, tools=list(tools) or None, tokenize=False)
        assert isinstance(prompt, str)
        return tuple(self._ids(prompt))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Pads rows on the right and builds what the model needs."""
        length = max(row.length for row in rows)
        ids = torch.full((len(rows), length), self.pad)
        positions = torch.zeros_like(ids)
        segments = torch.full_like(ids, -1)
        targets = torch.full_like(ids, -100)
        reads = []
        for index, row in enumerate(rows):
            start, starts = len(row.prompt), []
            ids[index, :start], positions[index, :start] = torch.tensor(row.prompt), torch.arange(start)
            segments[index, :start] = 0
            for number, answer in enumerate(row.answers, 1):
                stop = start + len(answer)
                ids[index, start:stop] = torch.tensor(answer)
                positions[index, start:stop] = torch.arange(len(row.prompt), len(row.prompt) + len(answer))
                segments[index, start:stop] = number
                targets[index, start : stop - 1] = torch.tensor(answer[1:])
                if row.said:
                    targets[index, start : stop - 1][~torch.tensor(row.said[number - 1][1:])] = -100
                starts.append(start)
                start = stop
            reads += [(index, starts[read.answer] + read.token) for read in row.reads]
        return Batch(ids, positions, _mask(segments), targets, torch.tensor(reads).view(-1, 2))


def _mask(segments: Tensor) -> Tensor:
    """Who sees whom: predecessors of the own segment, and the conversation; padding sees itself."""
    same = segments[:, :, None] == segments[:, None, :]
    conversation = segments[:, None, :] == 0
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
    return ((same | conversation) & causal)[:, None]


def batches(rows: Iterator[Row], tokens: int, rng: Random, pool: int = 512) -> Iterator[list[Row]]:
    """Groups a stream of rows into batches of similar length with about `tokens` tokens each, in random order."""
    while True:
        ready = sorted((next(rows) for _ in range(pool)), key=lambda row: row.length)
        groups: list[list[Row]] = [[]]
        for row in ready:
            if (len(groups[-1]) + 1) * row.length > tokens and groups[-1]:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        yield from groups
