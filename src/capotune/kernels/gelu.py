"""GELU in its exact form (Hendrycks and Gimpel 2016): y = x·Φ(x), where Φ is the normal distribution function.

    dx = g·(Φ(x) + x·φ(x))        φ: the normal density

x is saved for backward, nothing else; y is recomputed there, while Φ is at hand. On the CPU each direction
is one C call, elsewhere the same in PyTorch.
"""

from __future__ import annotations

import torch

from capotune.kernels.backends import backend_for
from capotune.kernels.native import check_shape
from capotune.kernels.reference import gelu_reference

__all__ = ["GeluPrologue", "gelu_backward", "gelu_forward", "gelu_reference"]


class GeluPrologue:
    """The same, faster and with less saved, as the prologue of a linear layer: x (rows, n) → (rows, n)."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """y; nothing else is saved."""
        return gelu_forward(x), ()

    def backward(
        self,
        grad: torch.Tensor,
        saved: tuple[torch.Tensor, ...],
        *,
        recompute: bool,  # noqa: ARG002 - y costs nothing
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """The gradient in its own memory, and y in that of x, which nobody else reads."""
        grad_x, y = gelu_backward(grad, *saved)
        return (grad_x,), y


@torch.no_grad()
def gelu_forward(x: torch.Tensor) -> torch.Tensor:
    """x (rows, columns), contiguous → a new tensor like it; outside of autograd."""
    return backend_for(x).gelu(x)


@torch.no_grad()
def gelu_backward(grad: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of x, y), in the memory of ``grad`` and of ``x``. Raises ``SettingError`` where shapes differ."""
    check_shape("grad", grad, x.shape)
    backend_for(grad, x).gelu_backward(grad, x)
    return grad, x
