"""What the model by itself thinks of an answer's tokens: one wave that says the answer again, and what it observed.

The search pays nothing for it. An answer of T tokens is cut into blocks of about √T: the model reads all of it in one
pass, as a kept prefix, and then every block a token at a time, all blocks at once. Where a cache holds rows of one
length only (recurrent models), the blocks take turns: about T steps of one row.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

from langchain_aisp.align import Candidate
from langchain_aisp.types import Engine, Observable, Prompt, Rollouts, Sampling, Wave, require

MOST_ALTERNATIVES = 20  # as in the OpenAI API

Entry = dict[str, Any]
"""``token`` (its text), ``bytes`` (its UTF-8, which may be part of a character), ``logprob``, ``top_logprobs``."""


@dataclass(frozen=True)
class Logprobs:
    """Makes log-probabilities of answers, in the form of the OpenAI API.

    They are the model's own, in nats, at temperature 1, without perturbation, among all tokens that an answer without a
    grammar may hold: what a grammar, ``top_p`` or ``top_k`` leave out counts. So the tokens that a grammar forces may
    be unlikely, and a model that writes JSON by itself shows that it does.

    Attributes:
        spelling: The bytes of each token.
        top: How many of the likeliest tokens are told beside each token.
    """

    spelling: LLTokenizer
    top: int

    @classmethod
    def of(cls, engine: Engine, top: int) -> Logprobs:
        """Log-probabilities by an engine's model; reads its tokenizer at the first call.

        Raises:
            ValueError: The engine has no tokenizer, or one whose tokens cannot be spelled.
        """
        tokenizer = getattr(engine, "tokenizer", None)
        require(
            tokenizer is not None,
            f"logprobs need an engine with a tokenizer, and {type(engine).__name__} has none; leave out logprobs",
        )
        if tokenizer not in _SPELLINGS:
            try:
                _SPELLINGS[tokenizer] = from_tokenizer(tokenizer)  # type: ignore[arg-type]
            except ValueError as error:
                name = type(tokenizer).__name__
                message = f"logprobs need a fast tokenizer (tokenizer.json), this one is a {name}: {error}"
                raise ValueError(message) from error
        return cls(_SPELLINGS[tokenizer], top)

    def tell(
        self, prompt: Prompt, answers: Sequence[Candidate], stop: Sequence[str]
    ) -> Generator[Wave, Rollouts, tuple[list[Entry], ...]]:
        """Log-probabilities of some answers to one prompt.

        Args:
            prompt: What was answered.
            answers: The answers.
            stop: Strings that ended them.

        Yields:
            A wave, to be sent its rollouts; none if nothing was said.

        Returns:
            For each answer the entries of what it says: thoughts, text, calls and their marks, up to the stop string or
            the end token. A token that runs into the stop string is the last one, and whole.

        Raises:
            ValueError: The engine draws tokens where it was given some.
        """
        said = [self._said(answer, stop) for answer in answers]
        entries: Iterator[Entry] = iter(())
        if any(said):
            observe: set[Observable] = {"base_logprobs", "alternatives"} if self.top else {"base_logprobs"}
            wave = Wave.saying(prompt, said, Sampling(min_tokens=0), observe)
            entries = self._entries(wave, (yield wave))
        return tuple(list(islice(entries, len(tokens))) for tokens in said)

    def _said(self, answer: Candidate, stop: Sequence[str]) -> tuple[int, ...]:
        """An answer's tokens up to where it was trimmed."""
        spelled = [self.spelling.decode_bytes([token]) for token in answer.tokens]
        text = b"".join(spelled)
        if found := [at for each in stop if (at := text.find(each.encode())) >= 0]:
            starts = accumulate(map(len, spelled), initial=0)
            return answer.tokens[: sum(start < min(found) for start in starts)]
        return answer.tokens[:-1] if answer.response.complete else answer.tokens  # the last one is the end token

    def _entries(self, wave: Wave, rollouts: Rollouts) -> Iterator[Entry]:
        """Entries of all tokens that the wave was to say, in order."""
        asked = wave.said
        require(
            torch.equal(rollouts.tokens[asked], wave.prefix[asked]),
            "this engine draws tokens where it was given some (Wave.forced), so it cannot tell the log-probabilities "
            "of an answer; leave out logprobs",
        )
        observed = rollouts.observed["base_logprobs"][asked].tolist()
        told = zip(wave.prefix[asked].tolist(), observed, self._likeliest(rollouts, asked), strict=True)
        return ({**self._entry(token, logprob), "top_logprobs": top} for token, logprob, top in told)

    def _likeliest(self, rollouts: Rollouts, asked: Tensor) -> Iterator[list[Entry]]:
        """For each token that was asked for, the likeliest ones at its position."""
        if self.top == 0:
            return ([] for _ in range(int(asked.sum())))
        tokens, logprobs = (
            rollouts.observed[name][asked][:, : self.top].tolist() for name in ("alternatives", "alternative_logprobs")
        )
        return (
            [self._entry(*each) for each in zip(*row, strict=True) if each[1] > -math.inf]
            for row in zip(tokens, logprobs, strict=True)
        )

    def _entry(self, token: int, logprob: float) -> Entry:
        spelled = self.spelling.decode_bytes([token])
        return {"token": spelled.decode("utf-8", errors="replace"), "bytes": list(spelled), "logprob": logprob}


_SPELLINGS: WeakKeyDictionary[Any, LLTokenizer] = WeakKeyDictionary()
