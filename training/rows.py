"""Rows for training: one conversation followed by several answers that do not see each other.

The conversation is computed once for all its answers. An answer's tokens attend to the conversation and to their own
predecessors, at the positions they would have alone, so a row trains exactly what separate sequences would train.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from langchain_aisp.demo.checker import Message


@dataclass(frozen=True)
class Row:
    """Token ids of a conversation without generation prompt, and of its answers with `<|assistant|>` and `<|end|>`."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    likings: tuple[float, ...] = ()  # per answer, for the reward model

    @property
    def length(self) -> int:
        """Number of tokens in the row."""
        return len(self.prompt) + sum(map(len, self.answers))


@dataclass(frozen=True)
class Batch:
    """Rows side by side. B rows, L tokens, E answers in all rows together."""

    ids: Tensor  # [B, L] int64
    positions: Tensor  # [B, L] int64
    mask: Tensor  # [B, 1, L, L] bool, true where a token may look
    targets: Tensor  # [B, L] int64, the next token of an answer, -100 elsewhere
    ends: Tensor  # [E, 2] int64, row and column of each answer's last token


class Encoder:
    """Turns conversations and answers into token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Takes the language model's tokenizer; the reward model's has the same tokens."""
        self.tokenizer = tokenizer
        self.start, self.end, self.pad = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>", "<|pad|>"])

    def row(self, messages: Sequence[Message], answers: Sequence[str], likings: Sequence[float] = ()) -> Row:
        """Encodes one conversation with its answers."""
        prompt = self.tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False)
        assert isinstance(prompt, str)
        coded = tuple((self.start, *self._ids(text), self.end) for text in answers)
        return Row(tuple(self._ids(prompt)), coded, tuple(likings))

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
        ends = []
        for index, row in enumerate(rows):
            start = len(row.prompt)
            ids[index, :start], positions[index, :start] = torch.tensor(row.prompt), torch.arange(start)
            segments[index, :start] = 0
            for number, answer in enumerate(row.answers, 1):
                stop = start + len(answer)
                ids[index, start:stop] = torch.tensor(answer)
                positions[index, start:stop] = torch.arange(len(row.prompt), len(row.prompt) + len(answer))
                segments[index, start:stop] = number
                targets[index, start : stop - 1] = torch.tensor(answer[1:])
                ends.append((index, stop - 1))
                start = stop
        return Batch(ids, positions, _mask(segments), targets, torch.tensor(ends))


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
