"""Products with weights that were laid out once: on a CPU, oneDNN's instead of torch's plain ones.

Torch's own product lays the weights out anew, or not at all, at every call, and a step of decoding has few rows to
earn that back. Laid out once, the products of a step take between a half and nine tenths of the time, the less the
larger the weights and the fewer the rows. A row still has the same bits however many others there are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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

    def __init__(self, model: nn.Module) -> None:
        """Lay out the weights, if this torch can and there is room."""
        found = [module for module in model.modules() if isinstance(module, nn.Linear) and _is_plain(module)]
        size = sum(module.weight.nbytes for module in found)
        free = free_bytes(torch.device("cpu"))
        roomy = free is None or size <= free // _SHARE
        if found and not roomy:
            logger.info("weights are not packed: the copies would take %d MiB", size >> 20)
        self.products = [_Product(module) for module in found] if roomy and _can_pack() else []

    @property
    def size(self) -> int:
        """Bytes of the copies."""
        return sum(product.module.weight.nbytes for product in self.products)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the model's layers use the packed weights; one that got a forward of its own since keeps it."""
        for product in self.products:  # past Module.__setattr__, which costs more than it serves here
            product.module.__dict__.setdefault("forward", product)
        try:
            yield
        finally:
            for product in self.products:
                if product.module.__dict__.get("forward") is product:
                    del product.module.__dict__["forward"]


class _Product:
    """The forward of one linear layer."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self._multiply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
        self._pack()

    def __call__(self, rows: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return nn.functional.linear(rows, self.module.weight, self.module.bias)
        weight = self.module.weight
        if weight is not self._weight or weight._version != self._version:
            self._pack()
        return self._multiply(rows, self._packed, self.module.bias, "none", [], "")

    def _pack(self) -> None:
        with torch.inference_mode(mode=False), torch.no_grad():
            self._weight = self.module.weight
            self._version = self._weight._version
            self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(self._weight.detach(), _ROWS)


def _can_pack() -> bool:
    """Whether this torch has oneDNN and the two operators, which its compiler uses and no promise covers."""
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def _is_plain(module: nn.Linear) -> bool:
    """Whether a layer is a product of two ordinary matrices in memory; a wrapped one has a forward of its own."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module.weight.data
    return type(weight) is Tensor and weight.dtype == torch.float32 and weight.device.type == "cpu"
