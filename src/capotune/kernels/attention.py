"""Attention of sequences that stand one after the other, each to itself.

    out_i = softmax(scale · q_i Kᵀ) V        K, V: the tokens of token i's own sequence that it may look at

With ``causal`` those are the ones up to i; with ``window`` the ones less than ``window`` away.

There is no padding and no mask. Short sequences on a CPU have a kernel of their own (``products_cpu.c``): PyTorch's is
made for long ones. Where one is longer, neighbours of equal length go through PyTorch's fused attention together, as a
batch that is a view of the tokens; sequences sorted by length make few such groups. A GPU's kernels get where each
sequence starts and take all of them at once: flash attention for 16 bits (Dao 2023), for fp32 the memory-efficient one
(Rabe and Staats 2021).
"""

from __future__ import annotations

from ctypes import CDLL
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch.nn import functional

from capotune.kernels import policy
from capotune.kernels.native import address, as_rows, over_rows, products

_LANES = 8
"""Elements in one of products_cpu.c's vectors."""
_FLASH, _FLASH_HEAD = (torch.bfloat16, torch.float16), 256  # what flash attention takes
_CAUSAL = 1  # of PyTorch's masks by number: from the top left corner


@dataclass(frozen=True)
class Sequences:
    """How tokens are shared out over sequences, in their order."""

    lengths: tuple[int, ...]
    """Tokens of each."""
    prefix: int = 0
    """Keys and values of a deep prompt before those of each, which no token stands for (``kernels.prefix``)."""

    @cached_property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(sequences, length) of each run of neighbours that are equally long."""
        return tuple((sum(1 for _ in run), length) for length, run in groupby(self.lengths) if length)

    def positions(self, first: int) -> torch.Tensor:
        """Position of each token in its own sequence, where the prefix begins at ``first``: (tokens,) int64."""
        first += self.prefix
        return torch.cat([torch.arange(first, first + length) for length in self.lengths])

    @cached_property
    def whole(self) -> Sequences:
        """The same with the prefix counted in each."""
        return Sequences(tuple(self.prefix + length for length in self.lengths))

    @cached_property
    def starts(self) -> torch.Tensor:
        """Where each sequence starts, and where the last ends: (sequences + 1,) int64."""
        return torch.tensor([0, *self.lengths]).cumsum(0)

    def starts_on(self, gpu: torch.device) -> torch.Tensor:
        """The same there, int32, moved once for all the layers that ask."""
        if gpu not in self._moved:
            self._moved[gpu] = self.starts.to(gpu, torch.int32)
        return self._moved[gpu]

    def split_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Where in ``whole`` the prefixes stand, (sequences · prefix,), and the tokens, (tokens,): int64, rising."""
        if device not in self._split:
            of_prefix = torch.cat([torch.arange(length) < self.prefix for length in self.whole.lengths])
            self._split[device] = of_prefix.nonzero()[:, 0].to(device), (~of_prefix).nonzero()[:, 0].to(device)
        return self._split[device]

    @cached_property
    def _moved(self) -> dict[torch.device, torch.Tensor]:
        return {}

    @cached_property
    def _split(self) -> dict[torch.device, tuple[torch.Tensor, torch.Tensor]]:
        return {}


def packed_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """The definition in plain PyTorch, one sequence after the other. Shapes as in ``packed_attention``."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    outs = []
    for rows in zip(*(torch.split(x.transpose(0, 1), list(sequences.lengths), 1) for x in (q, k, v)), strict=True):
        scores = scale * rows[0].float() @ rows[1].float().transpose(1, 2)  # (heads, length, length)
        seen = _seen(scores.shape[-1], causal, window, q.device)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outs.append((weights @ rows[2].float()).to(q.dtype).transpose(0, 1))
    return torch.cat(outs)


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """The same, faster: q (tokens, heads, head_dim), k and v (tokens, key-value heads, head_dim) → as q.

    ``heads`` is a multiple of the key-value heads, which neighbouring heads share (grouped-query attention).
    """
    assert len(q) == sum(sequences.lengths)
    narrow = window is not None and any(length > window for length in sequences.lengths)
    if q.device.type == "cpu" and not narrow:
        if _short(q, k, v, sequences) is not None and scale > 0:
            return _ShortAttention.apply(q, k, v, sequences, causal, scale)  # type: ignore[no-any-return, no-untyped-call]
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # the kernels do not look
        return _PackedAttention.apply(q, k, v, sequences, causal, scale)  # type: ignore[no-any-return, no-untyped-call]
    if q.is_cuda and len(q) > 0:
        if q.dtype in _FLASH and q.shape[-1] <= _FLASH_HEAD and q.shape[-1] % 8 == 0 and scale > 0:
            return _flash(q, k, v, sequences, causal, scale, window)
        if q.dtype == torch.float32 and not narrow and q.shape[-1] % 4 == 0 and scale > 0:
            return _efficient(q, k, v, sequences, causal, scale)
    sizes = [count * length for count, length in sequences.groups]
    parts = zip(*(torch.split(x, sizes) for x in (q, k, v)), sequences.groups, strict=True)
    outs = []
    for query, key, value, (count, length) in parts:
        mask = _seen(length, causal, window, q.device) if narrow else None
        out = functional.scaled_dot_product_attention(
            _heads_first(query, count),
            _heads_first(key, count),
            _heads_first(value, count),
            attn_mask=mask,
            is_causal=causal and mask is None,
            scale=scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    causal: bool,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """PyTorch's op behind ``torch.nn.attention.varlen``, which PyTorch 2.9 does not have; with its own gradients."""
    starts, longest = sequences.starts_on(q.device), max(sequences.lengths)
    before = None if window is None else window - 1
    sides = {"window_size_left": before, "window_size_right": 0 if causal else before}
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, causal, False, scale=scale, **({} if window is None else sides)
    )[0]
    return out


def _efficient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences, causal: bool, scale: float
) -> torch.Tensor:
    """PyTorch's op below its attention with ``SDPBackend.EFFICIENT_ATTENTION``; it knows no shared key-value heads."""
    starts, longest = sequences.starts_on(q.device), max(sequences.lengths)
    repeats = q.shape[1] // k.shape[1]
    k, v = (x if repeats == 1 else x.repeat_interleave(repeats, 1) for x in (k, v))
    out: torch.Tensor = torch.ops.aten._efficient_attention_forward(
        q[None], k[None], v[None], None, starts, starts, longest, longest, 0.0, _CAUSAL if causal else 0,
        compute_log_sumexp=torch.is_grad_enabled(), scale=scale,
    )[0]  # fmt: skip
    return out[0]


def _short(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences) -> CDLL | None:
    """The kernels for short sequences, where these are such."""
    size = q.shape[-1]
    narrow = size <= policy.SHORT_ATTENTION_HEAD_SIZE and size % _LANES == 0
    short = narrow and max(sequences.lengths, default=0) <= policy.SHORT_ATTENTION_LENGTH
    return products(q, k, v) if short else None


class _ShortAttention(torch.autograd.Function):
    """Saves q, k and v alone; the softmax is so small that it is recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sequences: Sequences,
        causal: bool,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.how = sequences, causal, scale
        out = torch.empty(q.shape, dtype=q.dtype)
        _run_short("short_attention", (q, k, v), sequences, causal, scale, out=out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        qkv, grad, (sequences, causal, scale) = ctx.saved_tensors, grad.contiguous(), ctx.how
        gradients = tuple(torch.empty(x.shape, dtype=x.dtype) for x in qkv)
        _run_short("short_attention_backward", qkv, sequences, causal, scale, grad=grad, gradients=gradients)
        return *gradients, None, None, None


def _run_short(
    kernel: str,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    sequences: Sequences,
    causal: bool,
    scale: float,
    *,
    out: torch.Tensor | None = None,
    grad: torch.Tensor | None = None,
    gradients: tuple[torch.Tensor | None, ...] = (None, None, None),
) -> None:
    """Writes ``out``, or from its gradient ``grad`` the ``gradients`` of q, k and v."""
    lib = _short(*qkv, sequences)
    assert lib is not None
    (tokens, heads, size), key_heads = qkv[0].shape, qkv[1].shape[1]
    q, k, v = (as_rows(x, tokens, x.shape[1] * size) for x in qkv)
    longest, items = max(sequences.lengths, default=0), len(sequences.lengths) * key_heads
    grad_q, grad_k, grad_v = map(address, gradients)
    over_rows(
        lib, kernel, items, tokens * longest * heads * size // max(items, 1),
        heads=heads, heads_per_key=heads // key_heads, head_size=size, causal=causal,
        starts=address(sequences.starts), q=address(q), k=address(k), v=address(v),
        q_stride=q.stride(0), k_stride=k.stride(0), v_stride=v.stride(0), scale=scale,
        out=address(out), grad=address(grad), grad_q=grad_q, grad_k=grad_k, grad_v=grad_v, longest=longest,
    )  # fmt: skip


class _PackedAttention(torch.autograd.Function):
    """PyTorch's CPU kernels called by group, so that gradients are written in place rather than padded and summed."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sequences: Sequences,
        causal: bool,
        scale: float,
    ) -> torch.Tensor:
        out, log_sums = torch.empty(q.shape, dtype=q.dtype), []
        for part, count in _parts(sequences):
            query, key, value = (_heads_first(x[part], count) for x in (q, k, v))
            found, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, causal, scale=scale
            )
            out[part] = found.transpose(1, 2).flatten(0, 1)
            log_sums.append(log_sum)
        ctx.save_for_backward(q, k, v, out, *log_sums)
        ctx.how = sequences, causal, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, *log_sums = ctx.saved_tensors
        sequences, causal, scale = ctx.how
        gradients = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
        for (part, count), log_sum in zip(_parts(sequences), log_sums, strict=True):
            given = (_heads_first(x[part], count) for x in (grad, q, k, v, out))
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *given, log_sum, 0.0, causal, scale=scale
            )
            for whole, of_part in zip(gradients, found, strict=True):
                whole[part] = of_part.transpose(1, 2).flatten(0, 1)
        return *gradients, None, None, None


def _parts(sequences: Sequences) -> list[tuple[slice, int]]:
    """Tokens of each group and how many sequences they are."""
    parts, start = [], 0
    for count, length in sequences.groups:
        parts.append((slice(start, start + count * length), count))
        start += count * length
    return parts


def _heads_first(x: torch.Tensor, count: int) -> torch.Tensor:
    """(count·length, heads, head_dim) as (count, heads, length, head_dim), without a copy."""
    return x.view(count, -1, *x.shape[1:]).transpose(1, 2)


def _seen(length: int, causal: bool, window: int | None, device: torch.device) -> torch.Tensor:
    """(length, length) bool: which tokens (columns) each token (rows) looks at."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    seen = torch.ones(length, length, dtype=torch.bool, device=device)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window
    return seen
