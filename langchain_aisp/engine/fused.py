"""A pass through a Llama-like decoder as one plain loop: on a CPU, past its modules, with fewer and wider products.

A step of decoding has so few rows that calling modules, looking up their attributes and small products take a third of
its time at 4 rows and a sixth at 32: eighty modules a step for six layers. Here queries, keys and values come out of
one product, gate and up too, and what a pass has to say of the last layer alone is left out where only keys and values
are wanted. The operations between the products are those of transformers, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from langchain_aisp.engine.cache import Unsuited
from langchain_aisp.engine.packed import Product, can_pack, has_room, is_plain
from langchain_aisp.engine.slots import Pass, Scoring

# Decoders of transformers whose passes are this one: norm, attention with half-rotated queries and keys, norm, gated
# linear unit, each beside a residual; the last two norm queries and keys, too.
_FAMILIES = ("Llama", "Mistral", "Ministral", "Qwen2", "Qwen3")


class FusedDecoder:
    """The layers of one model, for passes without gradients."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Lay out a model's weights; raise ``Unsuited`` where it is not of a known kind, not plain or too large."""
        kind = type(model)
        if kind.__name__ not in {f"{family}ForCausalLM" for family in _FAMILIES} or (
            not kind.__module__.startswith("transformers.models.")
        ):
            raise Unsuited("its layers are not those of Llama")
        decoder = model.get_submodule("model")
        layers = list(decoder.get_submodule("layers").children())
        linear = [module for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)]
        if not can_pack() or not all(is_plain(module) for module in linear):
            raise Unsuited("its linear layers are not all plain float32 ones on a CPU")
        if not has_room(linear):
            raise Unsuited("the copies of its weights would take too much memory")
        self._embedding, self._rotary, self._norm = (
            decoder.get_submodule(name) for name in ("embed_tokens", "rotary_emb", "norm")
        )
        self._head = model.get_submodule("lm_head")
        self._layers = [_Layer(index, layer) for index, layer in enumerate(layers)]
        self._called = {self._embedding, self._rotary, self._head}
        self._watched: list[tuple[Mapping[str, nn.Module | None], str, nn.Module]] = [({"": model}, "", model)]
        for parent in (
            model,
            decoder,
            decoder.get_submodule("layers"),
            *(m for layer in layers for m in layer.modules()),
        ):
            self._watched += [(parent._modules, name, child) for name, child in parent.named_children()]
        if not self._is_as_it_was():
            raise Unsuited("somebody looks at what its modules do")

    @property
    def products(self) -> list[Product]:
        """All products."""
        return [product for layer in self._layers for product in layer.products]

    @property
    def applies(self) -> bool:
        """Whether the modules are still those that were read, no hook looks at them and no gradient is wanted."""
        return not torch.is_grad_enabled() and self._is_as_it_was()

    def _is_as_it_was(self) -> bool:
        return all(
            children.get(name) is module and (_is_bare(module) or module in self._called)
            for children, name, module in self._watched
        )

    def logits(self, ids: Tensor, positions: Tensor, rows: Pass) -> Tensor:
        """Read tokens [n, q] at positions [n, q] and return the logits [n, 1, V] of the last ones."""
        hidden, angles = self._begin(ids, positions)
        for layer in self._layers:
            hidden = layer(hidden, angles, rows)
        logits: Tensor = self._head(_normed(hidden[:, -1:], self._norm))
        return logits

    def read(self, ids: Tensor, positions: Tensor, rows: Pass) -> None:
        """Read tokens [n, q] at positions [n, q] for their keys and values alone."""
        hidden, angles = self._begin(ids, positions)
        for layer in self._layers[:-1]:
            hidden = layer(hidden, angles, rows)
        self._layers[-1].keep(hidden, angles, rows)

    def _begin(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Embeddings [n, q, D], and the cosines and signed sines [n, q, 1, d] by which heads are rotated."""
        hidden = self._embedding(ids)
        cosines, sines = self._rotary(hidden, positions)
        half = sines.shape[-1] // 2
        signed = torch.cat((-sines[..., :half], sines[..., half:]), dim=-1)
        return hidden, (cosines.unsqueeze(2), signed.unsqueeze(2))


class _Layer:
    """One layer."""

    def __init__(self, index: int, layer: nn.Module) -> None:
        self.index = index
        attention: Any
        attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
        query, key, value, out = (_linear(attention, name) for name in "qkvo")
        gate, up, down = (_linear(mlp, name) for name in ("gate", "up", "down"))
        self._projected, self._out = Product(query, key, value), Product(out)
        self._gate_up, self._down = Product(gate, up), Product(down)
        self._before, self._between = (layer.get_submodule(f"{name}_layernorm") for name in ("input", "post_attention"))
        self._of_queries, self._of_keys = (attention._modules.get(name) for name in ("q_norm", "k_norm"))
        self._activation = mlp.get_submodule("act_fn")
        self._width = attention.head_dim
        self._scoring = Scoring(attention.scaling, softcap=None, sinks=None)
        self._heads = query.out_features // self._width, key.out_features // self._width

    @property
    def products(self) -> list[Product]:
        return [self._projected, self._out, self._gate_up, self._down]

    def __call__(self, hidden: Tensor, angles: tuple[Tensor, Tensor], rows: Pass) -> Tensor:
        """What the layer makes of the residual [n, q, D]."""
        query, key, value = self._project(hidden, angles)
        seen = rows.attend(self.index, query, key, value, self._scoring)
        hidden = self._out(seen.flatten(2)).add_(hidden)
        gate, up = self._gate_up(_normed(hidden, self._between)).chunk(2, dim=-1)
        return self._down(self._activation(gate) * up).add_(hidden)

    def keep(self, hidden: Tensor, angles: tuple[Tensor, Tensor], rows: Pass) -> None:
        """Remember the keys and values that the layer makes of the residual, nothing else."""
        _, key, value = self._project(hidden, angles)
        rows.keep(self.index, key, value)

    def _project(self, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, [n, heads, q, d] each."""
        queries, keys = self._heads
        projected = self._projected(_normed(hidden, self._before)).view(*hidden.shape[:2], -1, self._width)
        both, value = projected[:, :, : queries + keys], projected[:, :, queries + keys :]
        if self._of_queries is not None and self._of_keys is not None:
            parts = both.split((queries, keys), dim=2)
            both = torch.cat([_normed(parts[0], self._of_queries), _normed(parts[1], self._of_keys)], dim=2)
        cosines, sines = angles
        rotated = both.roll(self._width // 2, dims=-1).mul_(sines).add_(both * cosines).transpose(1, 2)
        return rotated[:, :queries], rotated[:, queries:], value.transpose(1, 2)


def _linear(parent: nn.Module, name: str) -> nn.Linear:
    module = parent.get_submodule(f"{name}_proj")
    assert isinstance(module, nn.Linear)
    return module


def _normed(hidden: Tensor, norm: Any) -> Tensor:
    """Root mean square norm."""
    weight: Tensor = norm._parameters["weight"]
    return torch.rms_norm(hidden, weight.shape, weight, norm.variance_epsilon)


def _is_bare(module: nn.Module) -> bool:
    """Whether a call of the module is its class's forward and nothing else."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
