"""The kernels of ``elementwise_triton``; importing this imports Triton.

A program computes one row, or a tile of one: its values in fp32, whatever the tensors' dtype, rounded once where they
are written. Every tensor's columns lie side by side, its rows ``…_stride`` elements apart.
"""

# mypy: ignore-errors
# Triton compiles these functions from their source: annotations other than its own have no meaning in them.
from __future__ import annotations

import triton
import triton.language as tl

from capotune.kernels._triton_rounding import rounded


@triton.jit
def _store(to, values, mask):
    tl.store(to, rounded(values, to.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_kernel(x, weight, y, roots, columns, eps, block: tl.constexpr):
    """y = w ⊙ x·r, where x·r is rounded before w multiplies it; r into ``roots``."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    inside = at < columns
    wide = tl.load(x + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    root = 1 / tl.sqrt(tl.sum(wide * wide) / columns + eps)
    normal = rounded(wide * root, x.dtype.element_ty).to(tl.float32)
    _store(y + row * columns + at, tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) * normal, inside)
    tl.store(roots + row, root)


@triton.jit
def rms_norm_backward_kernel(grad, x, weight, roots, grad_x, columns, block: tl.constexpr):
    """dx = r·(g⊙w − x·r²·mean(g⊙w⊙x))."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    inside, first = at < columns, row * columns
    wide = tl.load(x + first + at, mask=inside, other=0.0).to(tl.float32)
    weighted = tl.load(grad + first + at, mask=inside, other=0.0).to(tl.float32)
    weighted *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    root = tl.load(roots + row)
    along = root * root * (tl.sum(weighted * wide) / columns)
    _store(grad_x + first + at, root * (weighted - wide * along), inside)


@triton.jit
def swiglu_kernel(gate, up, y, gate_stride, up_stride, y_stride, columns, block: tl.constexpr):
    """y = gate·s(gate)·up."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    inside = at < columns
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    _store(y + row * y_stride + at, g * tl.sigmoid(g) * u, inside)


@triton.jit
def swiglu_backward_kernel(
    grad, gate, up, grad_gate, grad_up, y,
    grad_stride, gate_stride, up_stride, grad_gate_stride, grad_up_stride, y_stride, columns, block: tl.constexpr,
):  # fmt: skip
    """d gate = g·up·s·(1 + gate·(1 − s)), d up = g·gate·s, and y once more. All is read before anything is written:
    they may be the same memory."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    inside = at < columns
    given = tl.load(grad + row * grad_stride + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    _store(grad_gate + row * grad_gate_stride + at, given * u * (s * (1 + g * tl.sigmoid(-g))), inside)
    _store(grad_up + row * grad_up_stride + at, given * (g * s), inside)
    _store(y + row * y_stride + at, g * s * u, inside)


@triton.jit
def rotary_kernel(
    x, cos, sin, y, x_stride, y_stride, heads, half,
    transposed: tl.constexpr, block_heads: tl.constexpr, block_half: tl.constexpr,
):  # fmt: skip
    """Both halves (a, b) of every head of one token: (a·cos_a − b·sin_a, b·cos_b + a·sin_b), or, ``transposed``,
    (a·cos_a + b·sin_b, b·cos_b − a·sin_a). A token is read before it is written: y may be x."""
    token, at = tl.program_id(0).to(tl.int64), tl.arange(0, block_half)
    head = tl.arange(0, block_heads)
    first = head[:, None] * (2 * half) + at[None, :]
    inside = (head[:, None] < heads) & (at[None, :] < half)
    a = tl.load(x + token * x_stride + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + token * x_stride + half + first, mask=inside, other=0.0).to(tl.float32)
    angle, within = token * 2 * half + at, at < half
    cos_a = tl.load(cos + angle, mask=within, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos + half + angle, mask=within, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin + angle, mask=within, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin + half + angle, mask=within, other=0.0).to(tl.float32)[None, :]
    if transposed:
        new_a, new_b = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        new_a, new_b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    _store(y + token * y_stride + first, new_a, inside)
    _store(y + token * y_stride + half + first, new_b, inside)


@triton.jit
def softmax_cross_entropy_kernel(
    logits, targets, losses, stride, columns, smoothing, in_place: tl.constexpr, block: tl.constexpr
):
    """logsumexp of a row, with its largest logit taken out as it goes, and the loss; with ``in_place`` a second pass
    writes the gradient over the logits. A target beyond the vocabulary gives NaN."""
    row = tl.program_id(0).to(tl.int64)
    of_row, target = logits + row * stride, tl.load(targets + row)
    largest = tl.full((), float("-inf"), tl.float32)
    total, plain_sum = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    for start in range(0, columns, block):
        at = start + tl.arange(0, block)
        found = tl.load(of_row + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        grown = tl.maximum(largest, tl.max(found))
        total = total * tl.exp(largest - grown) + tl.sum(tl.exp(found - grown))
        plain_sum += tl.sum(tl.where(at < columns, found, 0.0))
        largest = grown
    log_sum = largest + tl.log(total)
    known = (target >= 0) & (target < columns)
    own = tl.load(of_row + target, mask=known, other=float("nan")).to(tl.float32)
    tl.store(losses + row, log_sum - (1 - smoothing) * own - smoothing * (plain_sum / columns))
    if in_place:
        for start in range(0, columns, block):
            at = start + tl.arange(0, block)
            found = tl.load(of_row + at, mask=at < columns, other=float("-inf")).to(tl.float32)
            wanted = tl.where(at == target, 1 - smoothing, 0.0) + smoothing / columns
            _store(of_row + at, tl.exp(found - log_sum) - wanted, at < columns)
