"""A byte tokenizer with the control tokens of all families of tool formats, and whether a grammar takes a text."""

from __future__ import annotations

from functools import cache
from random import Random

from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from langchain_aisp.types import Grammar

CONTROL = (
    "<|end|> <|tool_call|> <|/tool_call|> <tool_call> </tool_call> <|python_tag|> [TOOL_CALLS] [ARGS] "
    "<think> </think> [THINK] [/THINK]"
).split()


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*CONTROL, *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": CONTROL[1:]})
    return fast


@cache
def _view() -> LLTokenizer:
    return from_tokenizer(tokenizer(), eos_token=[0])


@cache
def _compiled(source: str) -> LLMatcher:
    matcher = LLMatcher(_view(), LLMatcher.grammar_from_lark(source), log_level=0)
    assert not matcher.is_error(), f"{matcher.get_error()}\n{source}"
    return matcher


def encode(text: str, *, control: bool = True) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False, split_special_tokens=not control)


def accepts(grammar: Grammar, text: str, *, control: bool = True) -> bool:
    """Whether the text is a whole answer; with ``control``, control tokens in it are tokens, else spelled out."""
    matcher = _compiled(grammar.source).deep_copy()
    tokens = encode(text, control=control)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def may_begin(grammar: Grammar, text: str, *, control: bool = True) -> bool:
    """Whether an answer may begin with the text."""
    tokens = encode(text, control=control)
    return _compiled(grammar.source).deep_copy().try_consume_tokens(tokens) == len(tokens)


def wander(grammar: Grammar, seed: int, steps: int = 400) -> str | None:
    """A random answer that the grammar allows, None if it has not ended after so many steps.

    Bytes that end strings, numbers and texts are drawn often, lest a walk never comes home.
    """
    chance = Random(seed)
    matcher = _compiled(grammar.source).deep_copy()
    eager = set(encode('"}],:{') + list(range(len(CONTROL))))
    said: list[int] = []
    for _ in range(steps):
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [token for token in range(len(tokenizer())) if bits >> token & 1]
        token = chance.choice([token for token in allowed if token in eager and chance.random() < 0.7] or allowed)
        if token == 0:
            return tokenizer().decode(said, clean_up_tokenization_spaces=False)
        assert matcher.consume_token(token), matcher.get_error()
        said.append(token)
    return None
