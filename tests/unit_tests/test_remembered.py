"""Prompts that stay in memory: what is read again, what leaves, and that no answer depends on it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from langchain_aisp.engine import TransformersEngine, transformers
from langchain_aisp.engine.cache import ExpandedCache
from langchain_aisp.engine.remembered import RememberedPrompts, common_beginning
from langchain_aisp.types import Chat, Prompt, Rollouts
from tests import tiny

FIRST = [
    {"role": "user", "content": "My parcel has not come, though it was promised for Tuesday, and nobody tells me why."}
]
SECOND = [
    *FIRST,
    {"role": "assistant", "content": "I am sorry. It will be there tomorrow."},
    {"role": "user", "content": "Who pays for it?"},
]


class Pages:
    """A cache whose prompts are their ids; notes what was read, and takes ten bytes per token."""

    def __init__(self, *, divisible: bool = True) -> None:
        self.divisible = divisible
        self.readings: list[int] = []

    def prefill(self, ids: Sequence[int], begun: Sequence[int] | None = None, common: int = 0) -> tuple[int, ...]:
        assert common == 0 if begun is None else tuple(begun[:common]) == tuple(ids[:common])
        assert begun is None or self.divisible or common == len(begun)
        self.readings.append(len(ids) - common)
        return tuple(ids)

    def size(self, prompt: Sequence[int]) -> int:
        return 10 * len(prompt)


def text(length: int, *, same: int = 0, seed: int = 0) -> tuple[int, ...]:
    """A text of ones for so long, then of the seed."""
    return (1,) * same + (seed,) * (length - same)


def test_a_prompt_that_comes_again_is_not_read_again() -> None:
    pages, prompts = Pages(), RememberedPrompts(10_000)
    for _ in range(3):
        assert prompts.read(pages, text(100)) == text(100)
    assert pages.readings == [100]


def test_a_longer_prompt_reads_what_is_new_and_takes_the_place_of_its_beginning() -> None:
    pages, prompts = Pages(), RememberedPrompts(10_000)
    for length in (100, 130, 100):
        prompts.read(pages, text(length))
    assert pages.readings == [100, 30, 0]
    assert len(prompts) == 1
    assert prompts.bytes == 1300


def test_prompts_that_only_begin_alike_share_their_beginning() -> None:
    pages, prompts = Pages(), RememberedPrompts(10_000)
    for seed, same in ((2, 70), (3, 90), (4, 80), (5, 63)):
        prompts.read(pages, text(100, same=same, seed=seed))
    assert pages.readings == [100, 30, 20, 100]  # the longest beginning counts; 63 tokens are too few
    assert len(prompts) == 4


def test_a_cache_that_cannot_divide_serves_whole_prompts_only() -> None:
    pages, prompts = Pages(divisible=False), RememberedPrompts(10_000)
    for ids in (text(100), text(130), text(100, same=0), text(120), text(140, same=70, seed=2)):
        prompts.read(pages, ids)
    assert pages.readings == [100, 30, 20, 140]
    assert len(prompts) == 4


def test_the_least_recently_used_prompts_leave_when_bytes_run_out() -> None:
    pages, prompts = Pages(), RememberedPrompts(2000)
    for seed in (2, 3, 2, 4):  # each of 800 bytes
        prompts.read(pages, text(80, seed=seed))
    assert set(prompts._known) == {text(80, seed=2), text(80, seed=4)}
    prompts.read(pages, text(90, same=0, seed=2))  # its beginning makes room for it
    assert prompts.bytes == 1700
    prompts.read(pages, text(500, seed=9))
    assert list(prompts._known) == [text(500, seed=9)]  # the newest stays, however large
    prompts.clear()
    assert prompts.bytes == len(prompts) == 0


def test_the_common_beginning_of_two_texts() -> None:
    assert common_beginning((1, 2, 3), (1, 2, 4, 5)) == 2
    assert common_beginning((1, 2), (1, 2, 3)) == 2
    assert common_beginning((), (1,)) == 0


@pytest.fixture
def engine() -> TransformersEngine:
    return TransformersEngine(tiny.model(), tiny.tokenizer())


def answer(engine: TransformersEngine, prompt: Prompt) -> Rollouts:
    return engine.submit(tiny.wave(prompt, 8, 12)).future.result(timeout=60)


def tokens_read(engine: TransformersEngine, chat: Chat) -> tuple[int, Rollouts]:
    """Tokens of all passes that read prompts, and the answers."""
    widths: list[int] = []
    handle = engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    rollouts = answer(engine, engine.encode(chat))
    handle.remove()
    return sum(width for width in widths if width > 1), rollouts


def test_the_next_turn_of_a_conversation_reads_only_its_new_tokens(engine) -> None:
    first, second = len(engine.encode(FIRST).ids) - 1, len(engine.encode(SECOND).ids) - 1
    whole_piece = first // 64 * 64
    assert tokens_read(engine, FIRST)[0] == -(-first // 4) * 4
    assert tokens_read(engine, SECOND)[0] == -(-second // 4) * 4 - whole_piece
    assert tokens_read(engine, SECOND)[0] == 0
    rest = -(-first // 4) * 4 - whole_piece
    assert tokens_read(engine, FIRST)[0] == rest  # the longer prompt serves its whole pieces


def test_answers_are_the_same_bits_whatever_is_remembered(engine) -> None:
    prompts = [engine.encode(chat) for chat in (FIRST, SECOND, [*FIRST, {"role": "assistant", "content": "No."}])]
    alone = []
    for prompt in prompts:
        engine._prompts.clear()
        alone.append(answer(engine, prompt))
    for prompt, expected in [*zip(prompts, alone, strict=True)][::-1] * 2:
        rollouts = answer(engine, prompt)
        assert torch.equal(rollouts.tokens, expected.tokens)
        assert rollouts.responses == expected.responses


def test_models_on_the_copied_cache_say_the_same_after_a_remembered_prompt() -> None:
    """Their logits differ by rounding, which no token of this test is close to."""
    engine = TransformersEngine(tiny.model(), tiny.tokenizer())
    engine.cache = ExpandedCache(engine.model)
    alone = answer(engine, engine.encode(SECOND))
    engine._prompts.clear()
    answer(engine, engine.encode(FIRST))
    read, again = tokens_read(engine, SECOND)
    assert read == len(engine.encode(SECOND).ids) - len(engine.encode(FIRST).ids)
    assert torch.equal(again.tokens, alone.tokens)


def test_a_share_of_the_free_memory_is_for_prompts_unless_told_otherwise(monkeypatch) -> None:
    for free, expected in ((800 << 20, 100 << 20), (1 << 50, 2 << 30), (None, 2 << 30)):
        monkeypatch.setattr(transformers, "free_bytes", lambda device, free=free: free)
        assert TransformersEngine(tiny.model(), tiny.tokenizer())._prompts._most_bytes == expected
    assert TransformersEngine(tiny.model(), tiny.tokenizer(), remembered_bytes=0)._prompts._most_bytes == 0
    with pytest.raises(ValueError, match="remembered_bytes must not be negative, got -1"):
        TransformersEngine(tiny.model(), tiny.tokenizer(), remembered_bytes=-1)
