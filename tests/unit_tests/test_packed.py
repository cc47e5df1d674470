"""Packed products: the same numbers as torch's, within the engine only, and never of weights that have changed."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from langchain_aisp.engine import TransformersEngine, packed
from langchain_aisp.engine.packed import PackedProducts
from tests import tiny

pytestmark = pytest.mark.skipif(not packed.can_pack(), reason="this torch has no packed products")


def layers(*shapes: tuple[int, int], bias: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Linear(*shape, bias=bias) for shape in shapes))


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_products_are_those_of_torch(bias: bool) -> None:
    with torch.inference_mode(mode=False):
        model = layers((48, 80), (80, 272), bias=bias)
    rows = torch.randn(7, 1, 48)
    products = PackedProducts(model)
    expected = model(rows)
    with products.installed():
        found = model(rows)
    assert len(products.products) == 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert all("forward" not in vars(layer) for layer in model)
    assert torch.equal(model(rows), expected)


@pytest.mark.parametrize("shape", [(256, 704), (704, 256), (256, 4096), (100, 37), (32, 32)])
@torch.inference_mode()
def test_a_row_has_the_same_bits_however_many_others_there_are(shape: tuple[int, int]) -> None:
    with torch.inference_mode(mode=False):
        model = layers(shape)
    rows = torch.randn(300, shape[0])
    with PackedProducts(model).installed():
        whole = model(rows)
        for count in (4, 5, 8, 20, 32, 33, 64, 100, 256):
            assert torch.equal(model(rows[:count].clone()), whole[:count])


@torch.inference_mode()
def test_weights_that_change_are_packed_again() -> None:
    with torch.inference_mode(mode=False):
        model = layers((16, 16))
    products, rows = PackedProducts(model), torch.randn(4, 16)
    with torch.inference_mode(mode=False), torch.no_grad():
        model[0].weight.mul_(2)
    with products.installed():
        torch.testing.assert_close(model(rows), rows @ model[0].weight.T)
    with torch.inference_mode(mode=False):
        model[0].weight = nn.Parameter(torch.eye(16))
    with products.installed():
        torch.testing.assert_close(model(rows), rows)


def test_gradients_are_those_of_torch() -> None:
    model = layers((16, 8))
    with PackedProducts(model).installed():
        model(torch.randn(4, 16)).sum().backward()
    assert model[0].weight.grad is not None


@torch.inference_mode()
def test_a_layer_that_was_wrapped_since_keeps_its_wrapper() -> None:
    with torch.inference_mode(mode=False):
        model = layers((16, 8))
    products = PackedProducts(model)
    vars(model[0])["forward"] = lambda rows: rows
    with products.installed():
        assert model(torch.ones(4, 16)).shape == (4, 16)
    assert "forward" in vars(model[0])


def test_a_model_can_be_copied_while_its_products_are_packed() -> None:
    model = layers((16, 8))
    products = PackedProducts(model)
    clone = copy.deepcopy(model)
    assert torch.equal(clone[0].weight, model[0].weight)
    assert len(products.products) == 1


def test_only_plain_matrices_are_packed_and_only_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapped(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), Wrapped(8, 8), nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8))
    vars(model[3])["forward"] = model[3].forward  # as offloading does
    assert [product.modules for product in PackedProducts(model).products] == [(model[0],)]
    monkeypatch.setattr(packed, "free_bytes", lambda _: 4 * 8 * 8 * 4 - 1)
    assert PackedProducts(model).products == []
    monkeypatch.setattr(packed, "free_bytes", lambda _: 4 * 8 * 8 * 4)
    assert len(PackedProducts(model).products) == 1


def test_the_engine_says_the_same_with_and_without() -> None:
    engine = TransformersEngine(tiny.model(), tiny.tokenizer())
    wave = tiny.wave(engine.encode([{"role": "user", "content": "Hello"}], seed=3), 12, 24)
    found = engine.submit(wave).future.result(timeout=60)
    assert engine.packed.products
    engine.packed.products = []
    engine.cache.decoder = None
    assert engine.submit(replace(wave)).future.result(timeout=60).responses == found.responses
    engine.close()
