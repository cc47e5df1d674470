"""Grammars over tokens: one matcher per row, by llguidance. They try tokens, and tell which ones may follow.

To try a token costs a fraction of a mask over the vocabulary, so masks are for rows whose token was refused, for those
that want to know the whole distribution, and for responses that others branch off from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from itertools import takewhile

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from langchain_aisp.types import Grammar, require

_FILLED_ALONE = 1 << 14  # words of masks that this thread fills sooner than it wakes others
_COMPILED = 64  # grammars kept; tools and schemas of a conversation come back turn after turn


class Grammars:
    """Compiles grammars for one tokenizer, each once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sayable: Tensor, ends: Iterable[int]) -> None:
        """Take what decides which tokens there are; nothing is built before the first grammar comes.

        Args:
            tokenizer: A fast tokenizer of transformers.
            sayable: [V] bool, the tokens that a response may hold at all.
            ends: Tokens that end a response: what is drawn once a grammar is fulfilled.
        """
        self._tokenizer = tokenizer
        self._sayable = sayable.numpy(force=True)
        self._vocabulary = len(sayable)
        self._ends = sorted(ends)
        self._executor = LLExecutor()
        self._known = lru_cache(_COMPILED)(self._compile)
        self._view = lru_cache(1)(self._read_tokenizer)

    def open(self, grammar: Grammar, rows: Sequence[list[int] | LLMatcher]) -> Matchers:
        """Matchers for rows: of each the tokens that it has said already, or a matcher that knows them.

        Raises:
            ValueError: The grammar cannot be compiled, or what is kept breaks it.
        """
        start = self._known(grammar.source)
        matchers = [row if isinstance(row, LLMatcher) else _advanced(start, row) for row in rows]
        return Matchers(matchers, self._sayable, self._ends, self._executor)

    def allowed(self, grammar: Grammar, tokens: Tensor, choices: Tensor) -> Tensor:
        """Which choices [r, L, K] the grammar lets stand in place of each token [r, L]; see ``Engine.allowed``."""
        found = np.zeros(choices.shape, np.bool_)
        start, offered = self._known(grammar.source), choices.numpy(force=True)
        for row, said in enumerate(tokens.tolist()):
            matchers = Matchers([start.deep_copy()], self._sayable, self._ends, self._executor)
            for position, token in enumerate(takewhile(lambda token: token >= 0, said)):
                found[row, position] = matchers.allows(0, offered[row, position])
                if matchers.consume([0], [[token]]):
                    break
        return torch.from_numpy(found)

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
    """Where some rows stand in their grammar.

    One text can be cut into tokens in many ways, and a mask allows them all. Where the text has to go on in one way
    only, such as a key of an object, ``forced`` gives the usual tokens of it, and nothing is left to choose.

    Attributes:
        matchers: One per row.
    """

    def __init__(
        self, matchers: list[LLMatcher], sayable: np.ndarray, ends: Collection[int], executor: LLExecutor
    ) -> None:
        """Take one matcher per row, the sayable tokens [V], the ends, and what fills large masks."""
        self.matchers = matchers
        self._ends = ends
        self._vocabulary = len(sayable)
        self._sayable = _words(sayable)
        self._is_sayable = sayable.item  # of a token
        self._masks = allocate_token_bitmask(len(matchers), len(sayable))
        self._executor = executor

    def forbidden(self, rows: Sequence[int], *, check: bool = True) -> Tensor:
        """Which tokens may not follow in these rows, [r, V] bool on the CPU; all but the ends in a fulfilled grammar.

        Forced tokens are not looked at.

        Args:
            rows: The rows.
            check: Look for rows that can say nothing.

        Raises:
            ValueError: A row can say nothing.
        """
        allowed = self._fill(rows)
        if check and not bool((allowed & self._sayable).view(np.uint32).max(axis=1).min()):
            message = (
                "the grammar allows nothing here that the model has a token for; control tokens other than ends and "
                "markers of tools and thoughts are never said"
            )
            raise ValueError(message)
        bits = np.unpackbits((~allowed).view(np.uint8), axis=1, count=self._vocabulary, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))

    def allows(self, row: int, tokens: np.ndarray) -> np.ndarray:
        """Which of these tokens [K] may follow in a row, [K] bool; a forced token alone may."""
        words = (self._fill([row]) & self._sayable)[0]
        forced = np.array(self._forced_by(self.matchers[row])[:1], np.int64)
        return tokens == forced if _bits(words, forced).any() else _bits(words, tokens)

    def _fill(self, rows: Sequence[int]) -> np.ndarray:
        """Masks [r, V / 32] of these rows, good until they are filled again."""
        matchers = [self.matchers[row] for row in rows]
        masks = self._masks[: len(matchers)]
        if masks.size > _FILLED_ALONE:
            fill_next_token_bitmask_par(self._executor, [(m, i) for i, m in enumerate(matchers)], masks)
        else:
            first, size = masks.ctypes.data, masks.strides[0]
            for row, matcher in enumerate(matchers):
                matcher.unsafe_compute_mask_ptr(first + row * size, size)
        return masks

    def forced(self, rows: Sequence[int]) -> list[list[int]]:
        """For each of these rows, the tokens that have to come next, as the tokenizer itself would cut their text."""
        return [self._forced_by(self.matchers[row]) for row in rows]

    def _forced_by(self, matcher: LLMatcher) -> list[int]:
        run = [] if matcher.is_accepting() else matcher.compute_ff_tokens()  # where a text may end nothing has to come
        return list(takewhile(self._is_sayable, run)) if run else run

    def consume(self, rows: Sequence[int], said: Sequence[list[int]]) -> list[int]:
        """Go on by some tokens in each of these rows.

        Returns:
            Where in ``rows`` those are whose grammar refuses a token; they stay where they are.
        """
        pairs = zip(rows, said, strict=True)
        return [at for at, (row, tokens) in enumerate(pairs) if not self._accepts(self.matchers[row], tokens)]

    def _accepts(self, matcher: LLMatcher, tokens: list[int]) -> bool:
        if matcher.try_consume_tokens(tokens) == len(tokens):
            return True
        return matcher.is_stopped() and tokens[0] in self._ends  # who can say no more takes not even an end

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.matchers = [self.matchers[row] for row in rows]


def _advanced(start: LLMatcher, tokens: list[int]) -> LLMatcher:
    matcher = start.deep_copy()
    count = matcher.try_consume_tokens(tokens)
    require(count == len(tokens), f"a kept prefix breaks the grammar at its token {count} of {len(tokens)}")
    return matcher


def _bits(words: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[K] bool, whether a mask [V / 32] has the bits of these tokens [K]."""
    bits: np.ndarray = (words[tokens >> 5] >> (tokens & 31) & 1).astype(np.bool_)
    return bits


def _words(bits: np.ndarray) -> np.ndarray:
    """Bits [V] in words of 32, as llguidance lays out its masks."""
    words = np.zeros(-(-len(bits) // 32), np.int32)
    packed = np.packbits(bits, bitorder="little")
    words.view(np.uint8)[: len(packed)] = packed
    return words
