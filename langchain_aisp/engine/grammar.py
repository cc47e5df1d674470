"""Grammars as masks over the vocabulary: one matcher per row, by llguidance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from langchain_aisp.types import Grammar, require

_COMPILED = 64  # grammars kept; tools and schemas of a conversation come back turn after turn


class Grammars:
    """Compiles grammars for one tokenizer, each once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Iterable[int]) -> None:
        """Take what decides which tokens there are; nothing is built before the first grammar comes.

        Args:
            tokenizer: A fast tokenizer of transformers.
            vocabulary: V, the number of logits.
            ends: Tokens that end a response: what is drawn once a grammar is fulfilled.
        """
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._ends = sorted(ends)
        self._executor = LLExecutor()
        self._known = lru_cache(_COMPILED)(self._compile)
        self._view = lru_cache(1)(self._read_tokenizer)

    def open(self, grammar: Grammar, kept: Sequence[Sequence[int]]) -> Matchers:
        """Matchers for rows that have said the tokens ``kept`` [r] already.

        Raises:
            ValueError: The grammar cannot be compiled, or what is kept breaks it.
        """
        start = self._known(grammar.source)
        matchers = [start.deep_copy() for _ in kept]
        for matcher, tokens in zip(matchers, kept, strict=True):
            count = matcher.try_consume_tokens(list(tokens))
            require(count == len(tokens), f"a kept prefix breaks the grammar at its token {count} of {len(tokens)}")
        return Matchers(matchers, self._vocabulary, self._executor)

    def _compile(self, source: str) -> LLMatcher:
        matcher = LLMatcher(self._view(), LLMatcher.grammar_from_lark(source), log_level=0)
        require(not matcher.is_error(), f"the grammar cannot be compiled: {matcher.get_error().strip()}")
        return matcher

    def _read_tokenizer(self) -> LLTokenizer:
        try:
            return from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._ends)  # type: ignore[arg-type]
        except ValueError as error:
            name = type(self._tokenizer).__name__
            message = f"grammars need a fast tokenizer (tokenizer.json), this one is a {name}: {error}"
            raise ValueError(message) from error


class Matchers:
    """Where some rows stand in their grammar."""

    def __init__(self, matchers: list[LLMatcher], vocabulary: int, executor: LLExecutor) -> None:
        """Take one matcher per row."""
        self._matchers = matchers
        self._vocabulary = vocabulary
        self._executor = executor

    def allowed(self) -> Tensor:
        """Which tokens may follow, [r, V] bool on the CPU; the end tokens where the grammar is fulfilled."""
        masks = allocate_token_bitmask(len(self._matchers), self._vocabulary)
        fill_next_token_bitmask_par(self._executor, [(m, i) for i, m in enumerate(self._matchers)], masks)
        bits = np.unpackbits(masks.view(np.uint8), axis=1, count=self._vocabulary, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))

    def consume(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Go on by one token in each of these rows."""
        for row, token in zip(rows, tokens, strict=True):
            matcher = self._matchers[row]
            if not matcher.consume_token(token):
                raise RuntimeError(f"a token that the grammar had allowed broke it: {matcher.get_error().strip()}")

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self._matchers = [self._matchers[row] for row in rows]
