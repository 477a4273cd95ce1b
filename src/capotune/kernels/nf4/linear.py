"""A linear layer whose frozen weight is in 4 bits."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capotune.errors import ModelError
from capotune.kernels.nf4 import triton_ops
from capotune.kernels.nf4.checkpoint import from_checkpoint, is_weight_key, to_checkpoint
from capotune.kernels.nf4.convert import dequantize_4bit, quantize_4bit
from capotune.kernels.nf4.tensor import QuantizedTensor

__all__ = ["Linear4bit", "borrow_dense"]

_scratch = threading.local()


def borrow_dense(q: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """``dequantize_4bit(q, dtype)`` in memory that this thread's next call overwrites.

    On the CPU a large new tensor costs more in page faults than the arithmetic that fills it, and one matrix is needed
    at a time. Elsewhere PyTorch's allocator keeps the memory itself.
    """
    if q.codes.device.type != "cpu":
        return dequantize_4bit(q, dtype)
    buffer: Tensor | None = getattr(_scratch, "buffer", None)
    nbytes = q.numel * dtype.itemsize
    if buffer is None or buffer.numel() < nbytes:
        _scratch.buffer = buffer = torch.empty(nbytes, dtype=torch.uint8)
    return dequantize_4bit(q, out=buffer[:nbytes].view(dtype).view(q.shape))


class _Linear4bitFunction(torch.autograd.Function):
    """y = x Wᵀ + b with W dequantised for the product only: (…, in) → (…, out).

    Only the reference to the quantized weight is saved for backward, which dequantises again: dx = dy W. W has no
    gradient. On a GPU, where Triton is, a few rows are multiplied with the quantized weight itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, q: QuantizedTensor) -> Tensor:
        ctx.q = q
        if triton_ops.fits(x, q):
            y = triton_ops.linear(x, q)
            return y if bias is None else y.add_(bias)
        y = F.linear(x.reshape(-1, x.shape[-1]), borrow_dense(q, x.dtype), bias)
        # no view, which PyTorch would let nobody change in place (a model may: ``x += …``)
        out: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        needs_x, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_y @ borrow_dense(ctx.q, grad_y.dtype) if needs_x else None
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if needs_bias else None
        return grad_x, grad_bias, None


class Linear4bit(nn.Module):
    """A frozen linear layer with its weight in 4 bits: y = x Wᵀ + b, (…, in_features) → (…, out_features).

    The codes and their statistics are buffers; the dense weight exists only inside a product. ``compute_dtype``
    is what the product runs in (None: the input's dtype); the result has the input's dtype. ``state_dict`` holds
    bitsandbytes' published names (see ``to_checkpoint``). Casting the module (``.to(torch.bfloat16)``) casts the bias
    and leaves the statistics in fp32, which their meaning depends on.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None

    def __init__(
        self, q: QuantizedTensor, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        self._set_quantized(q)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ModelError(f"bias has shape {tuple(bias.shape)}, the weight {q.shape}")

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> Linear4bit:
        """Quantise ``linear``'s weight (out, in) and share its bias. Raises as ``quantize_4bit`` does."""
        q = quantize_4bit(linear.weight, quant_type=quant_type, block_size=block_size, double_quant=double_quant)
        return cls(q, linear.bias, compute_dtype)

    @classmethod
    def from_quantized(
        cls, q: QuantizedTensor, *, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None
    ) -> Linear4bit:
        """Wrap a weight (out, in) that is already in 4 bits. Raises ``ModelError`` if it is not a matrix."""
        return cls(q, bias, compute_dtype)

    @property
    def quantized(self) -> QuantizedTensor:
        """The quantized weight; shares memory with the buffers."""
        return QuantizedTensor(
            self.codes,
            self.absmax,
            self.quant_type,
            self.block_size,
            (self.out_features, self.in_features),
            self.weight_dtype,
            self.nested_absmax,
            self.offset,
        )

    @property
    def weight_nbytes(self) -> int:
        """Bytes that the quantized weight needs, statistics included."""
        return self.quantized.nbytes

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """A new dense copy of the weight: (out_features, in_features)."""
        return dequantize_4bit(self.quantized, dtype)

    def borrowed_weight(self, dtype: torch.dtype) -> Tensor:
        """``dense_weight`` without the cost of new memory: valid until this thread asks any layer for the next one.

        For a product that runs at once and keeps no reference, as in a hand-written autograd function.
        """
        return borrow_dense(self.quantized, dtype)

    def multiplies_quantized(self, x: Tensor) -> bool:
        """Whether ``forward(x)`` needs no dense weight: few rows on a GPU with Triton (``triton_ops``)."""
        return triton_ops.fits(x, self.quantized)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        y: Tensor = _Linear4bitFunction.apply(x.to(dtype), bias, self.quantized)  # type: ignore[no-untyped-call]
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"quant_type={self.quant_type}, block_size={self.block_size}, double_quant={self.nested_absmax is not None}"
        )

    def _set_quantized(self, q: QuantizedTensor) -> None:
        if len(q.shape) != 2:
            raise ModelError(f"a linear weight must have two dimensions (out, in), not {q.shape}")
        self.out_features, self.in_features = q.shape
        self.quant_type, self.block_size, self.weight_dtype = q.quant_type, q.block_size, q.dtype
        for name in ("codes", "absmax", "nested_absmax", "offset"):
            self.register_buffer(name, getattr(q, name), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Linear4bit:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self.get_buffer(name)
            if new.dtype != old.dtype:  # a cast of the module must not round the statistics
                setattr(self, name, old.to(new.device))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(to_checkpoint(self.quantized, prefix))

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: Any,
        unexpected_keys: Any,
        error_msgs: Any,
    ) -> None:
        mine = {key: state_dict[key] for key in state_dict if is_weight_key(key, prefix)}
        rest = {key: state_dict[key] for key in state_dict if key not in mine}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if not mine:
            missing_keys.append(f"{prefix}weight")
            return
        q = from_checkpoint(mine, prefix)
        if q.shape != (self.out_features, self.in_features):
            raise ModelError(f"{prefix}weight has shape {q.shape}; expected {(self.out_features, self.in_features)}")
        device = self.codes.device
        self._set_quantized(q)
        self.to(device)
