"""Root mean square norm (Zhang and Sennrich 2019), as Llama and its kin have it.

    y = w ⊙ x·r        r = (mean(x²) + eps)^(−1/2), one per row
    dx = r·(g⊙w − x·r²·mean(g⊙w⊙x))        dw = Σ over rows of g ⊙ x·r

x and r are saved for backward; autograd would save x once more in fp32, its square and its product with r. On
the CPU each direction is one C call, on a GPU one kernel, elsewhere the same in PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from capotune.kernels.backends import backend_for
from capotune.kernels.native import check_shape
from capotune.kernels.reference import rms_norm_reference

__all__ = ["RmsNormPrologue", "rms_norm_reference"]


@dataclass(frozen=True)
class RmsNormPrologue:
    """The same, faster and with less saved, as the prologue of linear layers: x (..., hidden) and weight (hidden,) →
    (..., hidden). Raises ``SettingError`` where the weight does not fit x."""

    eps: float
    trains: bool = False
    """Whether the weight is to have a gradient."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """y, and r in fp32."""
        check_shape("the norm's weight", weight, x.shape[-1:])
        y, roots = backend_for(x, weight).rms_norm(x, weight, self.eps)
        return y, (roots,)

    def backward(
        self, grad: torch.Tensor, saved: tuple[torch.Tensor, ...], *, recompute: bool
    ) -> tuple[tuple[torch.Tensor | None, ...], torch.Tensor | None]:
        """The gradients of x and, where it trains, of the weight, and y once more."""
        x, weight, roots = saved
        backend = backend_for(grad, x, weight)
        y = backend.rms_norm(x, weight, self.eps)[0] if recompute else None
        of_weight = None
        if self.trains:
            products = grad.float().mul(x).reshape(-1, x.shape[-1])
            of_weight = torch.mv(products.t(), roots).to(weight.dtype)
        return (backend.rms_norm_backward(grad, x, weight, roots), of_weight), y
