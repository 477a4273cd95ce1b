"""Cross-entropy of a frozen output layer, without ever holding all logits.

    loss_i = logsumexp(h_i Wᵀ + b) − (h_i Wᵀ + b)[target_i]        for tokens i = 1 … n

The logits of a language model are its largest tensor: (tokens, vocabulary). Here they exist for one chunk of tokens at
a time, and while a chunk's are at hand its gradient ∂loss_i/∂h_i = (softmax_i − onehot_i) W is computed too, so that
the backward pass only scales what is kept: (tokens, hidden). W is frozen and gets no gradient. The idea of taking the
gradient in the forward pass is Liger Kernel's (Hsu et al. 2024, arXiv 2410.10989, §3.2), there for trained W as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

_LOGITS_AT_ONCE = 2**23
"""Numbers in one chunk of logits: 32 MiB in fp32."""


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The definition in plain PyTorch. Shapes as in ``linear_cross_entropy``."""
    logits = functional.linear(hidden, weight, bias).float()
    return functional.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The same in little memory: hidden (n, hidden), frozen weight (vocabulary, hidden) and bias (vocabulary,),
    targets (n,) int64 → losses (n,) fp32 in nats."""
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, label_smoothing)  # type: ignore[no-any-return, no-untyped-call]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        label_smoothing: float,
    ) -> torch.Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if needs_gradient else None
        rows = max(1, _LOGITS_AT_ONCE // len(weight))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = functional.linear(hidden[part], weight, bias).float()
            target = targets[part, None]
            total = logits.logsumexp(1)
            losses[part] = total - (1 - label_smoothing) * logits.gather(1, target)[:, 0]
            if label_smoothing:
                losses[part] -= label_smoothing * logits.mean(1)
            if gradient is not None:
                logits.sub_(total[:, None]).exp_()  # softmax, in place
                logits.scatter_add_(1, target, torch.full_like(target, -(1 - label_smoothing), dtype=torch.float32))
                if label_smoothing:
                    logits.sub_(label_smoothing / logits.shape[1])
                gradient[part] = logits.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad[:, None]).to(gradient.dtype), None, None, None, None
