"""Products with weights that were laid out once: on a CPU, oneDNN's instead of torch's plain ones.

Torch's own product lays the weights out anew, or not at all, at every call, and a step of decoding has few rows to
earn that back. Laid out once, the products of a step take between a half and nine tenths of the time, the less the
larger the weights and the fewer the rows. A row still has the same bits however many others there are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn

from langchain_aisp.engine.memory import free_bytes

logger = logging.getLogger(__name__)

_SHARE = 4  # the copies may take one in so many of the bytes that are free
_ROWS = 32  # a layout serves any number of rows; it is chosen for so many


class PackedProducts:
    """Copies of a model's weights for products of few rows, used within ``installed``.

    Only plain float32 linear layers on a CPU have one, and none has where memory is short. The model itself is left as
    it is: what is computed outside of ``installed``, or with gradients, is computed by torch, and weights that change
    are laid out again.
    """

    def __init__(self, model: nn.Module, known: Sequence[Product] = ()) -> None:
        """Lay out the weights, if this torch can and there is room, but those that ``known`` products hold already."""
        taken = {module for product in known for module in product.modules}
        found = [module for module in model.modules() if is_plain(module) and module not in taken]
        roomy = has_room(found)
        if found and not roomy:
            logger.info("weights are not packed: the copies would take %d MiB", _bytes_of(found) >> 20)
        self.known = known
        self.products = [Product(module) for module in found] if roomy and can_pack() else []

    @property
    def size(self) -> int:
        """Bytes of the copies, those of the known products among them."""
        return sum(_bytes_of(product.modules) for product in (*self.known, *self.products))

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the model's layers use the packed weights; one that got a forward of its own since keeps it."""
        for product in self.products:  # past Module.__setattr__, which costs more than it serves here
            product.modules[0].__dict__.setdefault("forward", product)
        try:
            yield
        finally:
            for product in self.products:
                if product.modules[0].__dict__.get("forward") is product:
                    del product.modules[0].__dict__["forward"]


class Product:
    """What linear layers make of the same rows, side by side: [..., in] -> [..., out + out + …]."""

    def __init__(self, *modules: nn.Linear) -> None:
        """Lay out the weights of plain layers, all of them with a bias or none."""
        self.modules = modules
        self._multiply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
        self._pack()

    def __call__(self, rows: Tensor) -> Tensor:
        """Multiply; with gradients as torch does."""
        if torch.is_grad_enabled():
            outputs = [nn.functional.linear(rows, module.weight, module.bias) for module in self.modules]
            return torch.cat(outputs, dim=-1)
        for own, name, known, version in self._read:
            if own[name] is not known or known._version != version:
                self._pack()
                break
        return self._multiply(rows, self._weight, self._bias, "none", [], "")

    def _pack(self) -> None:
        with torch.inference_mode(mode=False), torch.no_grad():
            self._read = [
                (module._parameters, name, parameter, parameter._version)
                for name in ("weight", "bias")
                for module in self.modules
                if (parameter := module._parameters[name]) is not None
            ]
            parts = [parameter.detach() for _, _, parameter, _ in self._read]
            count = len(self.modules)
            self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(_stacked(parts[:count]), _ROWS)
            self._bias = _stacked(parts[count:]) if len(parts) > count else None


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def can_pack() -> bool:
    """Whether this torch has oneDNN and the two operators, which its compiler uses and no promise covers."""
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def has_room(modules: Sequence[nn.Linear]) -> bool:
    """Whether copies of the weights of some layers leave most of the memory free."""
    free = free_bytes(torch.device("cpu"))
    return free is None or _bytes_of(modules) <= free // _SHARE


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is a product of two ordinary matrices in memory; a wrapped one has a forward of its own."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module.weight.data
    return type(weight) is Tensor and weight.dtype == torch.float32 and weight.device.type == "cpu"


def _bytes_of(modules: Sequence[nn.Linear]) -> int:
    return sum(module.weight.nbytes for module in modules)
