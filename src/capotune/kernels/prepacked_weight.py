"""A frozen dense weight laid out once, when first used, as a CPU's matrix product wants it, instead of at each product.

oneDNN's product with a weight in its own blocked layout does what ``PlainWeight`` does, 5 to 40 % faster on few rows
(up to some hundreds), where bringing the weight into such a layout is a good part of the work. The price is memory:
one copy for xWᵀ and one for grad·W.
"""

from __future__ import annotations

import platform
from functools import cached_property

import torch

__all__ = ["PrepackedWeight", "can_prepack"]

_ROWS = 512  # what the layout is chosen for; it does for any number


def can_prepack(weight: torch.Tensor) -> bool:
    """Whether there is such a product here: fp32, on an x86-64 CPU, in a PyTorch that has oneDNN's operators."""
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and platform.machine().lower() in ("x86_64", "amd64")
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


class PrepackedWeight:
    """A ``FrozenWeight`` (``lora_linear``) of a dense weight (out, in) that ``can_prepack`` says yes to."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight.detach()

    @cached_property
    def _forward(self) -> torch.Tensor:
        return _laid_out(self.weight)

    @cached_property
    def _backward(self) -> torch.Tensor:
        return _laid_out(self.weight.t())

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x (rows, in) → xWᵀ + bias (rows, out)."""
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._forward, bias, "none", [], "")
        return y

    def backward(self, grad: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
        """grad (rows, out) → grad·W (rows, in), plus ``onto`` where that is given."""
        product = torch.ops.mkldnn._linear_pointwise
        found: torch.Tensor
        if onto is None:
            found = product(grad, self._backward, None, "none", [], "")
        else:
            found = product.binary(grad, onto, self._backward, None, "add")
        return found


def _laid_out(weight: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    return found
