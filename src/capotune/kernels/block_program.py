"""Compiles a block's ops into two programs of kernel calls, forward and backward, for fp32 on a CPU.

Each op becomes one or a few calls, in order; backward, what belongs to the ops is called in reverse order, each from
the gradients of its outputs to those of its inputs. Values are matrices (tokens, columns) in three places: *saved*,
what backward reads of forward; *workspace*, whose parts are used again as soon as nothing reads them any more; and
tensors that the caller gives. Where a program's tensors lie is known when it runs: addresses are sums of symbols.

How many tokens there are is known when a program runs; which layers have a LoRA delta, whether a subset of the rows is
asked for and what dropout there is, when it is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from capotune.kernels.block_layout import (
    ALIGNED,
    NO_DELTA,
    TOKENS,
    LowRank,
    Matrix,
    Saved,
    Space,
    Variant,
    active_ops,
    given,
    rank,
    ranks,
    shape,
    value_widths,
)
from capotune.kernels.blocks import (
    Add,
    AddNorm,
    Attention,
    Block,
    Dropout,
    Gelu,
    Linear,
    Op,
    RmsNorm,
    Rotary,
    Subset,
    SwiGLU,
    inputs,
    outputs,
)
from capotune.kernels.lora_linear import LinearLayer
from capotune.kernels.native import address, library
from capotune.kernels.prepacked import prepack, prepacked_amx_kernels, strip_bytes
from capotune.kernels.program import Affine, Program, kernel_address, symbol

__all__ = ["SUBSET", "BackwardWriter", "ForwardWriter", "Prepacked", "Writer"]

SUBSET = symbol("rows of the subset")
_LANES = 8  # columns that products_cpu.c takes together


class Prepacked:
    """Weights of a block as the kernels here read them, each laid out once."""

    def __init__(self) -> None:
        self._weights: dict[tuple[int, bool], torch.Tensor] = {}

    def of(self, layer: LinearLayer, *, input_gradient: bool) -> torch.Tensor:
        """For xWᵀ, or for gW."""
        key = (id(layer), input_gradient)
        if key not in self._weights:
            self._weights[key] = prepack(layer.weight(torch.float32), input_gradient=input_gradient)
        return self._weights[key]


class Writer:
    """What both directions share: calls for products, copies and the elementwise parts."""

    def __init__(self, block: Block, prepacked: Prepacked, variant: Variant) -> None:
        self.block, self.prepacked, self.variant = block, prepacked, variant
        self.ops = active_ops(block, variant)
        self.widths = value_widths(block, self.ops)
        self.program, self.saved = Program(), Saved(block, self.ops, self.widths)
        self.workspace = Space("workspace")
        self.values = {"x": given("x", self.widths["x"])}
        self.rows = TOKENS
        """That the next calls are for."""
        products, elementwise, self.amx = library("products_cpu"), library("elementwise_cpu"), prepacked_amx_kernels()
        assert products is not None
        assert elementwise is not None
        self.products, self.elementwise = products, elementwise
        self._reserve()
        widest = max(max(shape(layer)) for layer in block.layers.values())
        self._strips = self.workspace.matrix(strip_bytes(widest) // (4 * ALIGNED))

    def _reserve(self) -> None:
        """Place what has a fixed size, before any matrix."""

    def product(
        self,
        name: str,
        x: Matrix,
        y: Matrix,
        projection: LowRank,
        delta: LowRank,
        *,
        input_gradient: bool,
        accumulate: bool,
        strips_ready: bool = False,
        activation: Any = None,
    ) -> None:
        """xa = scale·x·matrixᵀ of the ``projection``; y (+)= xWᵀ + bias, or xW, + scale·xa·matrix of the ``delta``, for
        the layer of this name. ``strips_ready``: they are x's already."""
        layer = self.block.layers[name]
        if self.amx is None:
            assert activation is None
            if projection.xa.columns:
                self.low_rank("low_rank_project", x, projection.xa, projection.matrix, projection.scale)
            self._product_fp32(layer, x, y, delta, input_gradient=input_gradient, accumulate=accumulate)
            return
        weight = self.prepacked.of(layer, input_gradient=input_gradient)
        terms, columns = shape(layer) if input_gradient else shape(layer)[::-1]
        self.program.call(
            self.amx.prepacked_product_int16, None, self.rows * (terms * columns),
            rows=self.rows, terms=terms, columns=columns, x=x.address, x_stride=x.stride,
            activation=kernel_address(activation), strips=self._strips.address, strips_ready=strips_ready,
            weight=address(weight), bias=0 if input_gradient else address(layer.bias),
            y=y.address, y_stride=y.stride, accumulate=accumulate,
            delta_ranks=delta.xa.columns, delta_xa=delta.xa.address, delta_matrix=delta.matrix,
            delta_scale=delta.scale, projected_ranks=projection.xa.columns, projected_xa=projection.xa.address,
            projected_matrix=projection.matrix, projected_scale=projection.scale, xa_stride=delta.xa.stride,
        )  # fmt: skip

    def _product_fp32(
        self, layer: LinearLayer, x: Matrix, y: Matrix, delta: LowRank, *, input_gradient: bool, accumulate: bool
    ) -> None:
        panels = self.prepacked.of(layer, input_gradient=input_gradient)
        terms, columns = shape(layer) if input_gradient else shape(layer)[::-1]
        self.program.call(
            self.products.prepacked_product_fp32, None, self.rows * (terms * columns),
            rows=self.rows, terms=terms, columns=columns, x=x.address, x_stride=x.stride, panels=address(panels),
            bias=0 if input_gradient else address(layer.bias), y=y.address, y_stride=y.stride, accumulate=accumulate,
            ranks=delta.xa.columns, xa=delta.xa.address, xa_stride=delta.xa.stride, matrix=delta.matrix,
            scale=delta.scale,
        )  # fmt: skip

    def low_rank(self, kernel: str, x: Matrix, xa: Matrix, matrix: Affine | int, scale: float = 1.0) -> None:
        """A kernel of ``low_rank.py``."""
        groups = -(-x.columns // _LANES)
        items, columns = (groups, groups * _LANES) if kernel == "low_rank_gather" else (self.rows, x.columns)
        self.program.call(
            getattr(self.products, kernel), items, self.rows * (columns * xa.columns),
            rows=self.rows, columns=x.columns, ranks=xa.columns, x=x.address, xa=xa.address, matrix=matrix,
            x_stride=x.stride, xa_stride=xa.stride, scale=scale,
        )  # fmt: skip

    def copy(self, source: Affine, rows: int, columns: int, target: Affine, *, transposed: bool = False) -> None:
        """(rows, columns) to the same, or to (columns, rows)."""
        row_stride, column_stride = (1, rows) if transposed else (columns, 1)
        self.program.call(
            self.products.copy_matrix, rows, rows * columns,
            source=source, columns=columns, target=target, row_stride=row_stride, column_stride=column_stride,
        )  # fmt: skip

    def multiply_by(self, x: Matrix, number: int, y: Matrix) -> None:
        """x times the factors of the ``number``-th dropout."""
        self.program.call(
            self.products.multiply_by, self.rows, self.rows * x.columns,
            columns=x.columns, x=x.address, factors=symbol(f"factors {number}"), y=y.address,
        )  # fmt: skip

    def attend(
        self, kernel: Any, op: Attention, out: Affine | int, grad: Affine | int, grads: Sequence[Affine | int]
    ) -> None:
        """``short_attention`` or its backward."""
        block, (q, k, v) = self.block, (self.values[name] for name in inputs(op))
        heads, key_heads = q.columns // block.head_size, k.columns // block.head_size
        grad_q, grad_k, grad_v = grads
        self.program.call(
            kernel, symbol("sequences") * key_heads, symbol("pairs") * q.columns,
            heads=heads, heads_per_key=heads // key_heads, head_size=block.head_size, causal=block.causal,
            starts=symbol("starts"), q=q.address, k=k.address, v=v.address,
            q_stride=q.stride, k_stride=k.stride, v_stride=v.stride, scale=block.scale,
            out=out, grad=grad, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v, longest=symbol("longest"),
        )  # fmt: skip

    def add(self, x: Matrix, z: Matrix, y: Matrix) -> None:
        """x + z."""
        self.program.call(
            self.products.add_values, self.rows, self.rows * x.columns,
            columns=x.columns, x=x.address, z=z.address, y=y.address,
        )  # fmt: skip

    def rms_norm(self, op: RmsNorm, y: Matrix) -> None:
        """Of its x."""
        x, norm = self.values[op.x], self.block.norms[op.norm]
        self.program.call(
            self.elementwise.rms_norm, self.rows, self.rows * x.columns,
            dtype=0, x=x.address, weight=address(norm.weight), columns=x.columns, eps=norm.eps, y=y.address,
            roots=self.saved.roots[op.norm].address,
        )  # fmt: skip

    def rotate(self, x: Matrix, y: Matrix, *, transposed: bool) -> None:
        """Rotary embedding, or backward."""
        self.program.call(
            self.elementwise.rotary, self.rows, self.rows * x.columns,
            dtype=0, heads=x.columns // self.block.head_size, half=self.block.head_size // 2, x=x.address,
            cos=symbol("cos"), sin=symbol("sin"), y=y.address, x_stride=x.stride, y_stride=y.stride,
            transposed=transposed,
        )  # fmt: skip

    def by_layer(self, op: Linear, xa: Matrix) -> list[Matrix]:
        """The columns of each of its layers, none where it has no LoRA delta."""
        found, start = [], 0
        for name in op.layers:
            found.append(xa.part(start, rank(self.block.layers[name])))
            start += rank(self.block.layers[name])
        return found


class ForwardWriter(Writer):
    """Reads ``x``, the factors of dropout and, of a subset, its ``rows``; writes ``y`` and ``saved``."""

    def __init__(self, block: Block, prepacked: Prepacked, variant: Variant) -> None:
        super().__init__(block, prepacked, variant)
        self._activations: dict[str, Any] = {}
        """Elementwise kernels that are still to be applied to a value, which AMX's kernel does a few rows at a time."""
        self._arrange_weights()
        last_reads = {name: number for number, op in enumerate(self.ops) for name in inputs(op)}
        for number, op in enumerate(self.ops):
            self._write(op)
            for name in [name for name, last in last_reads.items() if last == number]:
                self._release(name)

    def _release(self, name: str) -> None:
        matrix = self.values.pop(name)
        if matrix not in self.values.values():
            self.workspace.give_back(matrix)

    def _place(self, name: str) -> Matrix:
        """Where the value is to be written."""
        if name == "y":
            found = given("y", self.widths["y"])
        else:
            found = self.saved.values.get(name) or self.workspace.borrow(self.widths[name])
        self.values[name] = found
        return found

    def _arrange_weights(self) -> None:
        """Bᵀ of every layer, and the A of those that share an input one below the other."""
        for op, stacked in self.saved.a.items():
            start = 0
            for name in op.layers:
                a, b = self.block.layers[name].lora_a, self.block.layers[name].lora_b
                if a is not None and b is not None:
                    (rank, width), place = a.shape, self.saved.b_transposed[name]
                    if rank < ranks(self.block, op):
                        self.copy(symbol(f"a of {name}"), rank, width, stacked + 4 * start * width)
                    self.copy(symbol(f"b of {name}"), len(b), rank, place, transposed=True)
                    start += rank

    def _write(self, op: Op) -> None:
        match op:
            case Linear():
                self._linear(op)
            case Attention():
                self.attend(self.products.short_attention, op, self._place(op.y).address, 0, (0, 0, 0))
            case Subset():
                x, y = self.values[op.x], self._place(op.y)
                self.program.call(
                    self.products.select_rows, SUBSET, SUBSET * x.columns,
                    columns=x.columns, source=x.address, indices=symbol("rows"), target=y.address,
                )  # fmt: skip
                self.rows = SUBSET
            case Dropout():
                x = self.values[op.y] = self.values[op.x]  # which nothing else reads
                self.multiply_by(x, op.number, x)
            case AddNorm():
                self._add_norm(op)
            case Gelu():
                self._gelu(op)
            case RmsNorm():
                self.rms_norm(op, self._place(op.y))
            case Rotary():
                self.rotate(self.values[op.x], self._place(op.y), transposed=False)
            case SwiGLU():
                gate, up, y = self.values[op.gate], self.values[op.up], self._place(op.y)
                self.program.call(
                    self.elementwise.swiglu, self.rows, self.rows * y.columns,
                    dtype=0, columns=y.columns, gate=gate.address, up=up.address, y=y.address,
                    gate_stride=gate.stride, up_stride=up.stride, y_stride=y.stride,
                )  # fmt: skip
            case Add():
                self.add(self.values[op.x], self.values[op.residual], self._place(op.y))

    def _linear(self, op: Linear) -> None:
        x, xa, activation = self.values[op.x], self.saved.xa[op], self._activations.get(op.x)
        projection = LowRank(xa, self.saved.a[op])
        for number, (name, own) in enumerate(zip(op.layers, self.by_layer(op, xa), strict=True)):
            delta = LowRank(own, self.saved.b_transposed.get(name, 0), self.block.layers[name].scale)
            self.product(
                name, x, self._place(name), NO_DELTA if number else projection, delta,
                input_gradient=False, accumulate=False, strips_ready=number > 0, activation=activation,
            )  # fmt: skip

    def _add_norm(self, op: AddNorm) -> None:
        x, residual, y = self.values[op.x], self.values[op.residual], self._place(op.y)
        norm, (total, means, roots) = self.block.norms[op.norm], self.saved.norms[op.norm]
        self.program.call(
            self.elementwise.add_layer_norm, self.rows, self.rows * x.columns,
            dtype=0, x=x.address, residual=residual.address, weight=address(norm.weight), bias=address(norm.bias),
            columns=x.columns, eps=norm.eps, total=total.address, y=y.address, means=means.address,
            roots=roots.address,
        )  # fmt: skip

    def _gelu(self, op: Gelu) -> None:
        x, kernel = self.values[op.x], self.elementwise.gelu
        if self.amx is not None:
            self.values[op.y], self._activations[op.y] = x, kernel
            return
        y = self._place(op.y)
        self.program.call(
            kernel, self.rows, self.rows * x.columns, dtype=0, columns=x.columns, x=x.address, y=y.address
        )


class BackwardWriter(Writer):
    """Reads what forward read and saved (of a subset instead of its rows, which of them each row is, ``places``), and
    ``grad``, that of y; writes ``grad_x`` and ``grads``."""

    def __init__(self, block: Block, prepacked: Prepacked, variant: Variant) -> None:
        super().__init__(block, prepacked, variant)
        self.values |= self.saved.values
        self._gradients = {"y": given("grad", self.widths["y"])}
        self._waiting: dict[str, tuple[Linear, Matrix]] = {}
        """Linear layers whose input is still to be recomputed, by its name, for the gradient of A."""
        self._of_input = {"x"} | {op.y for op in self.ops if isinstance(op, RmsNorm) and op.x == "x"}
        """Values whose gradients nothing needs unless x does."""
        self.rows = SUBSET if variant.subset else TOKENS
        for op in reversed(self.ops):
            self._write(op)
            for name in outputs(op):
                self._release(name)

    def _reserve(self) -> None:
        """``starts``: where the gradients of A and B of each adapted layer begin in ``grads``."""
        self.grads, self.starts = Space("grads"), dict[str, tuple[int, int]]()
        for op in self.saved.a:
            start = self.grads.fixed  # of layers that share an input, those of A follow each other
            self.grads.elements(ranks(self.block, op) * shape(self.block.layers[op.layers[0]])[1])
            for name in op.layers:
                a, b = self.block.layers[name].lora_a, self.block.layers[name].lora_b
                if a is not None and b is not None:
                    self.starts[name] = start, self.grads.fixed
                    start += a.numel()
                    self.grads.elements(b.numel())
        b_sizes = (one.lora_b.numel() for one in self.block.layers.values() if one.lora_b is not None)
        self._transposed = self.workspace.elements(max(b_sizes, default=0))

    def _release(self, name: str) -> None:
        matrix = self._gradients.pop(name, None)
        if matrix is not None and matrix not in self._gradients.values():
            self.workspace.give_back(matrix)

    def _gradient_of(self, name: str) -> tuple[Matrix, bool]:
        """Where the value's gradient is to be written, and whether to add it to what is there."""
        if name in self._gradients:
            return self._gradients[name], True
        width = self.widths[name]
        self._gradients[name] = given("grad_x", width) if name == "x" else self.workspace.borrow(width)
        return self._gradients[name], False

    def _write(self, op: Op) -> None:
        match op:
            case Linear():
                self._linear(op)
            case Attention():
                grads = [self._gradient_of(name)[0].address for name in inputs(op)]
                self.attend(self.products.short_attention_backward, op, 0, self._gradients[op.y].address, grads)
            case Subset():
                grad, grad_x = self._gradients[op.y], self._gradient_of(op.x)[0]
                self.program.call(
                    self.products.scatter_rows, TOKENS, TOKENS * grad.columns,
                    columns=grad.columns, source=grad.address, places=symbol("places"), target=grad_x.address,
                )  # fmt: skip
                self.rows = TOKENS
            case Dropout():
                self.multiply_by(self._gradients[op.y], op.number, self._gradient_of(op.x)[0])
            case AddNorm():
                self._add_norm(op)
            case Gelu():
                self._gelu(op)
            case RmsNorm():
                self._rms_norm(op)
            case Rotary():
                grad = self._gradients[op.x] = self._gradients[op.y]  # which nothing else reads
                self.rotate(grad, grad, transposed=True)
            case SwiGLU():
                self._swiglu(op)
            case Add():
                assert op.x not in self._gradients
                self._gradients[op.x] = self._gradients[op.residual] = self._gradients[op.y]

    def _linear(self, op: Linear) -> None:
        xa, grad_xa, done = self.saved.xa[op], self.workspace.matrix(ranks(self.block, op)), 0
        needed = self.variant.input_gradient or op.x not in self._of_input
        parts = zip(op.layers, self.by_layer(op, xa), self.by_layer(op, grad_xa), strict=True)
        for name, own, own_grad in parts:
            layer, grad = self.block.layers[name], self._gradients[name]
            projection = LowRank(own_grad, self.saved.b_transposed.get(name, 0), layer.scale)
            if needed:
                grad_x, accumulate = self._gradient_of(op.x)
                delta = LowRank(own_grad, self.saved.a[op] + 4 * done * grad_x.columns)
                self.product(name, grad, grad_x, projection, delta, input_gradient=True, accumulate=accumulate)
            elif own.columns:
                self.low_rank("low_rank_project", grad, own_grad, projection.matrix, layer.scale)
            if own.columns:
                self.low_rank("low_rank_gather", grad, own, self._transposed, layer.scale)
                b_gradient = symbol("grads") + 4 * self.starts[name][1]
                self.copy(self._transposed, own.columns, grad.columns, b_gradient, transposed=True)
            done += own.columns
        if grad_xa.columns and op.x in self.values:
            self._a_gradient(op, grad_xa)
        elif grad_xa.columns:
            self._waiting[op.x] = op, grad_xa

    def _a_gradient(self, op: Linear, grad_xa: Matrix) -> None:
        """Of all layers of the op together."""
        first = next(name for name in op.layers if name in self.starts)
        self.low_rank("low_rank_gather", self.values[op.x], grad_xa, symbol("grads") + 4 * self.starts[first][0])

    def _add_norm(self, op: AddNorm) -> None:
        """The gradients of x and of the residual are the same."""
        grad, (grad_x, accumulate) = self._gradients[op.y], self._gradient_of(op.residual)
        assert not accumulate
        assert op.x not in self._gradients
        self._gradients[op.x] = grad_x
        norm, (total, means, roots) = self.block.norms[op.norm], self.saved.norms[op.norm]
        self.program.call(
            self.elementwise.add_layer_norm_backward, self.rows, self.rows * grad.columns,
            dtype=0, grad=grad.address, total=total.address, weight=address(norm.weight), means=means.address,
            roots=roots.address, columns=grad.columns, grad_x=grad_x.address,
        )  # fmt: skip

    def _gelu(self, op: Gelu) -> None:
        """The gradient of y becomes that of x in its place; x becomes y where that is waited for."""
        grad, x, waiting = self._gradients[op.y], self.values[op.x], self._waiting.pop(op.y, None)
        self._gradients[op.x] = grad
        self.program.call(
            self.elementwise.gelu_backward, self.rows, self.rows * x.columns,
            dtype=0, columns=x.columns, grad=grad.address, x=x.address, grad_x=grad.address,
            y=0 if waiting is None else x.address,
        )  # fmt: skip
        if waiting is not None:
            self.values[op.y] = x
            self._a_gradient(*waiting)

    def _swiglu(self, op: SwiGLU) -> None:
        """The gradients of gate and up come in their places, y in that of its gradient."""
        grad, gate, up = self._gradients[op.y], self.values[op.gate], self.values[op.up]
        self._gradients[op.gate], self._gradients[op.up] = gate, up
        self.program.call(
            self.elementwise.swiglu_backward, self.rows, self.rows * grad.columns,
            dtype=0, columns=grad.columns, grad=grad.address, gate=gate.address, up=up.address,
            grad_gate=gate.address, grad_up=up.address, y=grad.address, grad_stride=grad.stride,
            gate_stride=gate.stride, up_stride=up.stride, grad_gate_stride=gate.stride, grad_up_stride=up.stride,
            y_stride=grad.stride,
        )  # fmt: skip
        if op.y in self._waiting:
            self.values[op.y] = grad
            self._a_gradient(*self._waiting.pop(op.y))

    def _rms_norm(self, op: RmsNorm) -> None:
        """Adds to the gradient of x that the residual's path gave, in a matrix of its own: others may read that."""
        if op.y in self._waiting:
            y = self.values[op.y] = self.workspace.borrow(self.widths[op.y])
            self.rms_norm(op, y)
            self._a_gradient(*self._waiting.pop(op.y))
            self.workspace.give_back(y)
        if op.y not in self._gradients:
            return
        x, before = self.values[op.x], self._gradients[op.x]
        grad, grad_x = self._gradients[op.y], self.workspace.borrow(x.columns)
        self.program.call(
            self.elementwise.rms_norm_backward, self.rows, self.rows * x.columns,
            dtype=0, grad=grad.address, x=x.address, weight=address(self.block.norms[op.norm].weight),
            roots=self.saved.roots[op.norm].address, columns=x.columns, grad_x=grad_x.address,
        )  # fmt: skip
        total = given("grad_x", x.columns) if op.x == "x" else grad_x
        self.add(grad_x, before, total)
        if total is not grad_x:
            self.workspace.give_back(grad_x)
        self._release(op.x)
        self._gradients[op.x] = total
