"""Passes past a model's modules against their plain twin, the modules themselves."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from langchain_aisp.engine import TransformersEngine, fused, packed
from langchain_aisp.engine.cache import Unsuited
from langchain_aisp.engine.choice import choose_cache
from langchain_aisp.engine.fused import FusedDecoder
from langchain_aisp.engine.remembered import RememberedPrompts
from langchain_aisp.engine.slots import SlotCache
from tests import tiny
from tests.architectures import BY_TITLE, build

pytestmark = pytest.mark.skipif(not packed.can_pack(), reason="this torch has no packed products")

FAMILIES = ["Llama", "Mistral", "Ministral", "Qwen2", "Qwen3"]  # grouped heads, windows, biases, norms of heads
every_family = pytest.mark.parametrize("title", FAMILIES)
PROMPT = [7, 31, 12, 90, 44, 7, 65, 23]
CHAINS = [[11, 80, 35, 52, 99], [11, 80, 4]]


def model_of(title: str) -> PreTrainedModel:
    """A model whose norms and biases are not those of a fresh one, which do nothing."""
    model = build(BY_TITLE[title])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


@torch.inference_mode()
def decode(cache: SlotCache, steps: int = 3, padding: int = 3) -> tuple[Tensor, list[Tensor]]:
    """Logits of steps of two stores, one with chains of several lengths, and all keys and values at the end."""
    stores = [
        cache.open(cache.prefill(PROMPT), CHAINS, torch.tensor([0, 1, 0, 1]), torch.tensor([5, 3, 1, 0])),
        cache.open(cache.prefill(PROMPT[:3]), [()], torch.tensor([0]), torch.tensor([0])),
    ]
    lengths = [torch.tensor([13, 11, 9, 8]), torch.tensor([3])]
    logits = []
    for step in range(steps):
        batch = [
            (store, torch.arange(len(store)) * 7 + step + 3, length + step)
            for store, length in zip(stores, lengths, strict=True)
        ]
        logits.append(cache.step(batch, padding))
    held = [
        part for store in stores for pair in (*store.prompt.layers.values(), *store.buffers.values()) for part in pair
    ]
    return torch.stack(logits), held


def has_same_bits(one, other) -> bool:
    """Whether two readings of a prompt hold the same keys and values."""
    pairs = [(one.layers[layer], other.layers[layer]) for layer in one.layers]
    equal = [torch.equal(part, expected) for mine, theirs in pairs for part, expected in zip(mine, theirs, strict=True)]
    return one.length == other.length and one.layers.keys() == other.layers.keys() and len(equal) > 0 and all(equal)


@every_family
def test_logits_and_keys_are_those_of_the_modules(title: str) -> None:
    model = model_of(title)
    cache = choose_cache(model)
    assert isinstance(cache, SlotCache)
    assert isinstance(cache.decoder, FusedDecoder)
    logits, held = decode(cache)
    plain_logits, plain_held = decode(SlotCache(model))
    torch.testing.assert_close(logits, plain_logits, atol=1e-4, rtol=1e-4)
    assert len(held) == len(plain_held) > 0
    for ours, theirs in zip(held, plain_held, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@every_family
@torch.inference_mode()
def test_a_row_has_the_same_bits_however_many_others_there_are(title: str) -> None:
    """Others are rows of other stores: what happens within a store does not depend on company."""
    cache = choose_cache(model_of(title))
    prompt = cache.prefill(PROMPT)

    def steps(*sizes: int) -> Tensor:
        """Logits of the first store, of 4 rows, after three steps beside others of so many rows."""
        counts = (4, *sizes)
        nothing = [torch.zeros(rows, dtype=torch.int64) for rows in counts]
        stores = [cache.open(prompt, [()], none, none) for none in nothing]
        for position in range(3):
            batch = [
                (store, torch.arange(rows) + 3 + position, torch.full((rows,), 8 + position))
                for store, rows in zip(stores, counts, strict=True)
            ]
            logits = cache.step(batch, 0)
        return logits[:4]

    alone = steps()
    for sizes in ((4,), (8, 8), (36,), (4, 20, 12)):
        assert torch.equal(steps(*sizes), alone)


@every_family
def test_keys_of_a_prompt_have_the_same_bits_whatever_was_read_before(title: str) -> None:
    cache = choose_cache(model_of(title))
    text = torch.randint(3, 100, (150,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.inference_mode():
        for known, length in ((70, 150), (130, 100), (130, 128), (10, 66)):
            begun = cache.prefill(text[:known])
            prompt, whole = cache.prefill(text[:length], begun, min(known, length)), cache.prefill(text[:length])
            assert has_same_bits(prompt, whole), (known, length)


@every_family
def test_prompts_read_side_by_side_get_the_keys_that_each_gets_alone(title: str) -> None:
    cache = choose_cache(model_of(title))
    generator = torch.Generator().manual_seed(4)
    lengths = (150, 3, 64, 65, 67, 130, 1, 128, 90, 20)  # more than are read at once
    prompts = [torch.randint(3, 100, (length,), generator=generator).tolist() for length in lengths]
    with torch.inference_mode():
        together, alone = cache.prefill_together(prompts), [cache.prefill(ids) for ids in prompts]
    assert len(together) == len(prompts)
    for one, other in zip(together, alone, strict=True):
        assert has_same_bits(one, other)


def test_waiting_prompts_are_read_side_by_side_unless_they_begin_alike() -> None:
    model = tiny.model()
    cache = SlotCache(model, FusedDecoder(model))
    common = tuple(range(3, 80))
    prompts = [(*common, 90), (4, 5, 6), (*common, 91), (7, 8, 9, 10), (4, 5, 6)]
    read: list[int] = []
    passes = cache.decoder.read
    cache.decoder.read = lambda ids, *rest: (read.append(ids.shape[1]), passes(ids, *rest))
    remembered = RememberedPrompts(1 << 30)
    with torch.inference_mode():
        remembered.read_together(cache, prompts)
        assert read == [64 + 4 + 4, 16]
        assert len(remembered) == 3
        for ids in prompts:
            assert remembered.read(cache, ids).length == len(ids)
    assert read == [64 + 4 + 4, 16, 16]  # what begins like another one is read from the last whole piece on
    remembered = RememberedPrompts(2 * cache.row_bytes(0, 4))  # half of which has room for one
    with torch.inference_mode():
        remembered.read_together(cache, [(3, 4, 5, 6), (7, 8, 9, 10)])
    assert len(remembered) == 0


def test_a_pass_for_keys_alone_computes_no_logits_and_no_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    cache = SlotCache(model, FusedDecoder(model))
    asked: list[str] = []
    monkeypatch.setattr(model.lm_head, "forward", lambda rows: asked.append("head") or rows)
    attended = cache.decoder._layers[-1]._out
    monkeypatch.setattr(cache.decoder._layers[-1], "_out", lambda rows: asked.append("last layer") or attended(rows))
    with torch.inference_mode():
        prompt = cache.prefill(PROMPT)
        store = cache.open(prompt, CHAINS, torch.tensor([0, 1]), torch.tensor([5, 3]))
        assert asked == []
        cache.step([(store, torch.tensor([3, 4]), torch.tensor([13, 11]))], 0)
    assert asked == ["last layer", "head"]


def hook(model: LlamaForCausalLM) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 0)


def pre_hook(model: LlamaForCausalLM) -> None:
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1, *inputs[1:]))


def wrap(model: LlamaForCausalLM) -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, rows: Tensor) -> Tensor:
            return 2 * self.inner(rows)

    model.model.layers[1].self_attn.v_proj = Doubled(model.model.layers[1].self_attn.v_proj)


def own_forward(model: LlamaForCausalLM) -> None:
    norm = model.model.norm
    vars(norm)["forward"] = lambda rows: type(norm).forward(norm, rows) + 1


def other_weights(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "k_proj" in name or "up_proj" in name or "layernorm" in name:
                parameter.mul_(1.5)


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [(hook, 1e-5), (pre_hook, 1e-5), (wrap, 1e-5), (own_forward, 1e-5), (other_weights, 1e-4)],
)
def test_whoever_changes_the_model_later_is_heard(change, tolerance: float) -> None:
    model = tiny.model()
    cache = SlotCache(model, FusedDecoder(model))
    before, _ = decode(cache)
    change(model)
    after, _ = decode(cache)
    torch.testing.assert_close(after, decode(SlotCache(model))[0], atol=tolerance, rtol=tolerance)
    assert not torch.allclose(after, before, atol=1e-2)


def test_with_gradients_the_modules_are_asked() -> None:
    model = tiny.model()
    cache = SlotCache(model, FusedDecoder(model))
    assert not cache.decoder.applies
    store = cache.open(cache.prefill(PROMPT), [()], torch.tensor([0]), torch.tensor([0]))
    cache.step([(store, torch.tensor([3]), torch.tensor([8]))], 0).sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def subclass() -> PreTrainedModel:
    class LlamaForCausalLM_(LlamaForCausalLM):
        pass

    LlamaForCausalLM_.__name__ = "LlamaForCausalLM"  # as remote code might
    return LlamaForCausalLM_(tiny.model().config)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: build(BY_TITLE["Gemma"]), "not those of Llama"),
        (lambda: build(BY_TITLE["Granite"]), "not those of Llama"),
        (subclass, "not those of Llama"),
        (lambda: tiny.model().bfloat16(), "plain float32"),
        (lambda: (model := tiny.model(), hook(model))[0], "looks at"),
    ],
)
def test_other_models_are_refused_with_a_reason(make, reason: str) -> None:
    with pytest.raises(Unsuited, match=reason):
        FusedDecoder(make())


def test_the_documentation_names_all_families() -> None:
    text = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert tuple(FAMILIES) == fused._FAMILIES
    assert f"{', '.join(FAMILIES[:-1])} and {FAMILIES[-1]} decode past their modules" in " ".join(text.split())


def test_where_memory_is_short_the_modules_serve(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed, "free_bytes", lambda _: 1000)
    with caplog.at_level(logging.INFO, logger="langchain_aisp"):
        cache = choose_cache(tiny.model())
    assert isinstance(cache, SlotCache)
    assert cache.decoder is None
    assert "too much memory" in caplog.text


def test_a_decoder_that_says_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fused._normed
    monkeypatch.setattr(fused, "_normed", lambda hidden, norm: real(hidden, norm) * 1.01)
    cache = choose_cache(tiny.model())
    assert isinstance(cache, SlotCache)
    assert cache.decoder is None


def test_the_engine_says_the_same_and_packs_every_weight_once() -> None:
    model = tiny.model()
    engine = TransformersEngine(model, tiny.tokenizer())
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert engine.packed.size == sum(module.weight.nbytes for module in layers)
    wave = tiny.wave(engine.encode([{"role": "user", "content": "Hello"}], seed=3), 12, 24)
    found = engine.submit(wave).future.result(timeout=60)
    engine.cache.decoder = None
    assert engine.submit(replace(wave)).future.result(timeout=60).responses == found.responses
