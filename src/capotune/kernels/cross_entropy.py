"""Cross-entropy of a frozen output layer, without ever holding all logits.

    loss_i = logsumexp(h_i Wᵀ + b) − (h_i Wᵀ + b)[target_i]        for tokens i = 1 … n

The logits of a language model are its largest tensor: (tokens, vocabulary). Here they exist for one chunk of tokens at
a time, and while a chunk's are at hand its gradient ∂loss_i/∂h_i = (softmax_i − onehot_i) W is computed too, so that
the backward pass only scales what is saved: (tokens, hidden). W is frozen and gets no gradient. The idea of taking the
gradient in the forward pass is Liger Kernel's (Hsu et al. 2024, arXiv 2410.10989, §3.2), there for trained W as well.

On the CPU the way from a chunk's logits to losses and softmax_i − onehot_i is one C call, on a GPU one kernel; in
PyTorch it takes eight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from capotune.errors import DataError
from capotune.kernels import policy
from capotune.kernels.backends import backend_for
from capotune.kernels.execution import execution
from capotune.kernels.linear import LinearInput, input_gradient
from capotune.kernels.native import check_shape


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
        memory = execution().memory if hidden.is_cpu and hidden.dtype == torch.float32 else None
        most = policy.LOGITS_AT_ONCE if memory is None else policy.LOGITS_AT_ONCE_IN_LENT_MEMORY
        rows = max(1, min(most // len(weight), len(hidden)))
        if memory is None:
            space = torch.empty(rows * len(weight), dtype=hidden.dtype, device=hidden.device)
        else:
            space = memory.lend("logits", rows * len(weight))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            chunk = hidden[part]
            logits = LinearInput(chunk).linear(weight, bias, out=space[: len(chunk) * len(weight)].view(len(chunk), -1))
            if logits.dtype not in backend_for(logits).LOGITS_DTYPES:
                logits = logits.float()
            losses[part] = softmax_cross_entropy(logits, targets[part], label_smoothing, needs_gradient)
            if gradient is not None:
                gradient[part] = input_gradient(logits.to(weight.dtype), weight)
        if memory is not None:
            memory.take_back("logits", space)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad[:, None]).to(gradient.dtype), None, None, None, None


def softmax_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float, in_place: bool
) -> torch.Tensor:
    """logits (n, vocabulary) fp32, on a GPU also bf16 or fp16; targets (n,) int64 → losses (n,) fp32; outside of
    autograd.

    With ``in_place`` the gradients of the losses replace the logits: softmax − onehot where nothing is smoothed. For a
    target that is not in the vocabulary ``DataError`` is raised on a CPU, and on a GPU, where to look would be to wait,
    the loss is NaN.
    """
    check_shape("targets", targets, (len(logits),))
    targets = targets.long()
    _check_targets(targets, logits.shape[1])
    return backend_for(logits).softmax_cross_entropy(logits, targets, label_smoothing, in_place)


def _check_targets(targets: torch.Tensor, vocabulary: int) -> None:
    """C would read beyond the logits' end. Elsewhere the kernels look themselves."""
    if targets.device.type != "cpu" or len(targets) == 0:
        return
    least, largest = (int(bound) for bound in targets.aminmax())
    if least < 0 or largest >= vocabulary:
        raise DataError(
            f"targets run from {least} to {largest}, and the output layer knows tokens 0 to {vocabulary - 1}; "
            "is the tokenizer the model's own?"
        )
