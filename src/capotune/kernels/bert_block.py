"""A whole BERT block as two programs of kernel calls: one forward, one back.

    u = norm₁(x + m₁⊙o(attention(q, k, v of x)))        y = norm₂(u + m₂⊙down(gelu(up(u))))

m₁ and m₂ are dropout's, or left out; every linear layer is frozen, with or without a low-rank change. It computes what
``models.fusion`` composes of one function for each part, but for the order of sums of gradients. Where steps are short,
calling those functions takes as long as their work.

It is for fp32 on a CPU, short sequences, and models so small that their weights may be kept in the kernels' form too
(``prepacked.py``): with a matrix unit where that one's precision is allowed, and with AVX2.

For the way back the inputs of norms, of the activation and of attention are kept, as the parts do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from capotune.errors import SettingError
from capotune.kernels import policy
from capotune.kernels.attention import Sequences, packed_attention_reference
from capotune.kernels.gelu import gelu_reference
from capotune.kernels.layer_norm import add_layer_norm_reference
from capotune.kernels.lora_linear import LinearLayer, lora_reference
from capotune.kernels.memory import Memory
from capotune.kernels.native import address, check_shape, library
from capotune.kernels.native_ops import MOST_RANKS
from capotune.kernels.prepacked import MOST_TERMS, fits_prepacked, prepack, prepacked_amx_kernels, strip_bytes
from capotune.kernels.program import Affine, Program, kernel_address, symbol

__all__ = ["BertBlock", "LayerNorm", "bert_block_reference"]

_LANES = 8  # columns that products_cpu.c takes together


class LayerNorm(NamedTuple):
    """A frozen one: weight and bias (hidden,)."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


def bert_block_reference(
    x: torch.Tensor,
    groups: Sequence[Sequence[LinearLayer]],
    norms: Sequence[LayerNorm],
    sequences: Sequences,
    head_size: int,
    scale: float,
    *,
    causal: bool,
) -> torch.Tensor:
    """The definition in plain PyTorch, without dropout: x (tokens, hidden) → the same, the rest as in ``BertBlock``."""
    query, key, value = (_linear_reference(x, layer).view(len(x), -1, head_size) for layer in groups[0])
    mixed = packed_attention_reference(query, key, value, sequences, causal=causal, scale=scale).flatten(1)
    u = add_layer_norm_reference(_linear_reference(mixed, *groups[1]), x, *norms[0])
    wide = gelu_reference(_linear_reference(u, *groups[2]))
    return add_layer_norm_reference(_linear_reference(wide, *groups[3]), u, *norms[1])


def _linear_reference(x: torch.Tensor, layer: LinearLayer) -> torch.Tensor:
    if layer.lora_a is None or layer.lora_b is None:
        return functional.linear(x, layer.weight(x.dtype), layer.bias)
    return lora_reference(x, layer.weight, layer.bias, layer.lora_a, layer.lora_b, layer.scale)


class BertBlock:
    """The block of these layers: ``groups`` are q, k and v, then o, up and down, each alone. ``memory`` is what the
    blocks of a model share."""

    def __init__(
        self,
        groups: Sequence[Sequence[LinearLayer]],
        norms: Sequence[LayerNorm],
        head_size: int,
        scale: float,
        *,
        causal: bool,
        memory: Memory,
    ) -> None:
        self.groups, self.norms, self.memory = groups, norms, memory
        self.head_size, self.scale, self.causal = head_size, scale, causal
        self.layers = [layer for group in self.groups for layer in group]
        self.adapted = [layer for layer in self.layers if layer.lora_a is not None]
        weights = [layer.weight(torch.float32) for layer in self.layers]
        frozen = [*weights, *(one for norm in norms for one in (norm.weight, norm.bias))]
        others = [one for layer in self.layers for one in (layer.bias, layer.lora_a, layer.lora_b) if one is not None]
        ranks = [len(layer.lora_a) for layer in self.adapted if layer.lora_a is not None]
        self._programs: dict[tuple[Any, tuple[bool, ...]], _Writer] = {}
        self._forms: dict[tuple[int, bool], torch.Tensor] = {}
        self._known = (
            all(layer.is_frozen for layer in self.layers)
            and not any(weight.requires_grad for norm in norms for weight in (norm.weight, norm.bias))
            and all(one.is_cpu and one.is_contiguous() and one.dtype == torch.float32 for one in (*frozen, *others))
            and max(max(weight.shape) for weight in weights) <= MOST_TERMS
            and _ranks(groups[0]) <= MOST_RANKS
            and max(ranks, default=0) <= MOST_RANKS
            and 0 < head_size <= policy.SHORT_ATTENTION_HEAD_SIZE
            and head_size % _LANES == 0
            and scale > 0
        )

    def takes(self, x: torch.Tensor, sequences: Sequences, wanted: torch.Tensor | None = None) -> bool:
        """Whether it is for such input (tokens, hidden), here and now."""
        short = max(sequences.lengths, default=0) <= policy.SHORT_ATTENTION_LENGTH
        some = wanted is None or len(wanted) > 0
        plain = self._known and some and short and x.dtype == torch.float32 and x.is_contiguous()
        return plain and fits_prepacked(x) and library("products_cpu") is not None

    def __call__(
        self,
        x: torch.Tensor,
        sequences: Sequences,
        dropout: Sequence[float] = (0.0, 0.0),
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (tokens, hidden) → the same, or the rows ``wanted`` of it alone: their numbers, int64, each once.

        ``dropout``: the rates behind attention and behind ``down``. To be asked only where it ``takes`` x.
        """
        check_shape("x", x, (sum(sequences.lengths), len(self.norms[0].weight)))
        if wanted is not None:
            check_rows(wanted, len(x))
        factors = [_dropout_factors(x if wanted is None else x[: len(wanted)], rate) for rate in dropout]
        trained = [weight for layer in self.adapted for weight in (layer.lora_a, layer.lora_b) if weight is not None]
        if torch.is_grad_enabled():
            y: torch.Tensor = _BertBlock.apply(self, sequences, wanted, *factors, x, *trained)  # type: ignore[no-untyped-call]
            return y
        y, kept = self.forward(sequences, wanted, factors, x, trained)
        self.memory.take_back("kept", kept)
        return y

    def forward(
        self,
        sequences: Sequences,
        wanted: torch.Tensor | None,
        factors: Sequence[torch.Tensor | None],
        x: torch.Tensor,
        trained: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output, and what the way back reads, a lent buffer."""
        writer = self.written(_write_forward, *(one is not None for one in (wanted, *factors)))
        y = x.new_empty(len(x) if wanted is None else len(wanted), x.shape[1])
        kept = self.memory.lend("kept", writer.kept.space.numbers_for(len(x)))
        tensors = {"x": x, "y": y, "kept": kept, "factors0": factors[0], "factors1": factors[1], "wanted": wanted}
        writer.run(sequences, len(y), trained, tensors)
        return y, kept

    def written(self, write: Callable[..., _Writer], *how: bool) -> _Writer:
        """The program that ``write`` gives for this block, written once."""
        key = (write, how)
        if key not in self._programs:
            self._programs[key] = write(self, *how)
        return self._programs[key]

    def form(self, layer: LinearLayer, *, input_gradient: bool) -> torch.Tensor:
        """The kernels' form of its weight, made once."""
        key = (id(layer), input_gradient)
        if key not in self._forms:
            self._forms[key] = prepack(layer.weight(torch.float32), input_gradient=input_gradient)
        return self._forms[key]


def check_rows(wanted: torch.Tensor, rows: int) -> None:
    """Raise ``SettingError`` unless these are numbers of so many rows: C would read beyond them."""
    if wanted.dtype != torch.int64 or wanted.dim() != 1 or not wanted.is_contiguous():
        raise SettingError(f"wanted: whole numbers of 64 bits, one after the other, not {wanted.dtype} {wanted.shape}.")
    if len(wanted) and not (int(wanted.min()) >= 0 and int(wanted.max()) < rows):
        raise SettingError(
            f"wanted: numbers of rows from 0 to {rows - 1}, not {int(wanted.min())} to {int(wanted.max())}."
        )


def _places(wanted: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """For each of so many rows, which of the ``wanted`` ones it is; -1: none."""
    if wanted is None:
        return None
    return torch.full((rows,), -1).index_copy_(0, wanted, torch.arange(len(wanted)))


def _dropout_factors(x: torch.Tensor, rate: float) -> torch.Tensor | None:
    """What PyTorch's dropout multiplies x by, from the same random numbers."""
    if rate == 1:
        return torch.zeros_like(x)
    return torch.empty_like(x).bernoulli_(1 - rate).div_(1 - rate) if rate else None


class _BertBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        block: BertBlock,
        sequences: Sequences,
        wanted: torch.Tensor | None,
        factors1: torch.Tensor | None,
        factors2: torch.Tensor | None,
        x: torch.Tensor,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        y, kept = block.forward(sequences, wanted, (factors1, factors2), x, trained)
        ctx.save_for_backward(x, kept, wanted, factors1, factors2, *trained)
        ctx.how = block, sequences
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if getattr(ctx, "went_back", False):  # it has written over what was kept
            raise RuntimeError("a second way back through a block: run the forward pass again")
        ctx.went_back = True
        x, kept, wanted, factors1, factors2, *trained = ctx.saved_tensors
        (block, sequences), needs_input = ctx.how, ctx.needs_input_grad[5]
        some = (one is not None for one in (wanted, factors1, factors2))
        writer = block.written(_write_backward, *some, needs_input)
        grad, grad_x, grads = grad.contiguous(), torch.empty_like(x), torch.empty(writer.grads.numbers_for(0))
        tensors = {"x": x, "kept": kept, "factors0": factors1, "factors1": factors2, "places": _places(wanted, len(x))}
        writer.run(sequences, len(grad), trained, {**tensors, "grad": grad, "grad_x": grad_x, "grads": grads})
        block.memory.take_back("kept", kept)
        of_trained = (
            grads.as_strided(one.shape, one.stride(), start) for start, one in zip(writer.starts, trained, strict=True)
        )
        return None, None, None, None, None, grad_x if needs_input else None, *of_trained


# ------------------------------------------------------------------------------------------------------------ matrices

_TOKENS = symbol("tokens")
_WANTED = symbol("wanted rows")
_ROOM = symbol("room")  # tokens, rounded up so that every matrix begins at a multiple of 64 bytes
_SIXTEEN = 16


class _Matrix(NamedTuple):
    """(tokens, columns) fp32, or what else is said; rows lie ``stride`` apart."""

    address: Affine
    columns: int
    stride: int

    def part(self, start: int, columns: int) -> _Matrix:
        return _Matrix(self.address + 4 * start, columns, self.stride)


class _Small(NamedTuple):
    """One side of a low-rank change: low (tokens, ranks), none where it has no columns, and matrix (ranks, any)."""

    low: _Matrix
    matrix: Affine | int
    scale: float = 1.0


class _Space:
    """Matrices one after the other in one tensor; those of a fixed size come first."""

    def __init__(self, name: str) -> None:
        self._address = symbol(name)
        self.fixed = self.columns = 0

    def numbers(self, count: int) -> Affine:
        """Address of so many numbers, whatever the tokens."""
        assert not self.columns
        found = self._address + 4 * self.fixed
        self.fixed += -(-count // _SIXTEEN) * _SIXTEEN
        return found

    def matrix(self, columns: int) -> _Matrix:
        """(tokens, columns), with room for whole tiles."""
        found = self._address + _ROOM * (4 * self.columns) + 4 * self.fixed
        self.columns += columns
        return _Matrix(found, columns, columns)

    def numbers_for(self, tokens: int) -> int:
        """How many are needed for all."""
        return self.fixed + _room(tokens) * self.columns


def _room(tokens: int) -> int:
    return -(-tokens // _SIXTEEN) * _SIXTEEN


_NONE = _Small(_Matrix(symbol("tokens") * 0, 0, 0), 0)


def _given(name: str, columns: int) -> _Matrix:
    return _Matrix(symbol(name), columns, columns)


class _Kept:
    """What the way back finds: Bᵀ of each layer, for each group of layers A and x·Aᵀ, and the input of everything that
    is not linear; that of ``o`` and ``up`` where they have a low-rank change."""

    def __init__(self, block: BertBlock) -> None:
        (hidden, inner), space = _widths(block), _Space("kept")
        self.space = space
        self.b_turned = {id(one): space.numbers(one.lora_b.numel()) for one in block.adapted if one.lora_b is not None}
        self.a = [self._place_of_a(block, group) for group in block.groups]
        self.low = [space.matrix(_ranks(group)) for group in block.groups]
        self.qkv = [space.matrix(hidden) for _ in range(3)]
        self.mixed, self.u = (space.matrix(hidden) if _ranks(group) else None for group in block.groups[1:3])
        self.totals = [space.matrix(hidden) for _ in range(2)]
        self.means, self.roots = ([space.matrix(1) for _ in range(2)] for _ in range(2))
        self.wide = space.matrix(inner)

    def _place_of_a(self, block: BertBlock, group: Sequence[LinearLayer]) -> Affine:
        """Of those one below the other; one alone stays where it is."""
        adapted = [number for number, layer in enumerate(block.adapted) if any(layer is one for one in group)]
        return symbol(f"a{adapted[0]}") if len(adapted) == 1 else self.space.numbers(_ranks(group) * _into(group))


def _widths(block: BertBlock) -> tuple[int, int]:
    """Hidden size and that between ``up`` and ``down``."""
    inner, hidden = block.groups[2][0].weight(torch.float32).shape
    return hidden, inner


def _into(group: Sequence[LinearLayer]) -> int:
    return group[0].weight(torch.float32).shape[1]


def _ranks(group: Sequence[LinearLayer]) -> int:
    return sum(0 if layer.lora_a is None else len(layer.lora_a) for layer in group)


# ------------------------------------------------------------------------------------------------------------ programs


class _Writer:
    """Writes kernel calls into a program; arguments are the structs' of the C sources."""

    def __init__(self, block: BertBlock) -> None:
        self.block, self.program = block, Program()
        self.rows = _TOKENS
        """That the next calls are for."""
        self.scratch, self.kept, self.grads = _Space("scratch"), _Kept(block), _Space("grads")
        self.starts = self._place_gradients()
        """Where the gradients of the trained weights begin in ``grads``, in their order."""
        products, elementwise, unit = library("products_cpu"), library("elementwise_cpu"), prepacked_amx_kernels()
        assert products is not None
        assert elementwise is not None
        self.products, self.elementwise, self.unit = products, elementwise, unit
        self._numbers = {id(layer): number for number, layer in enumerate(block.adapted)}
        self._turned = self.scratch.numbers(
            max((one.lora_b.numel() for one in block.adapted if one.lora_b is not None), default=0)
        )
        self._strips = self.scratch.matrix(strip_bytes(max(_widths(block))) // (4 * _SIXTEEN))

    def run(
        self,
        sequences: Sequences,
        wanted: int,
        trained: Sequence[torch.Tensor],
        tensors: Mapping[str, torch.Tensor | None],
    ) -> None:
        """On these tensors, by their names in the program; so many rows are ``wanted``."""
        tokens, longest = sum(sequences.lengths), max(sequences.lengths)
        scratch = self.block.memory.lend("scratch", self.scratch.numbers_for(tokens))
        values = {name: address(tensor) for name, tensor in tensors.items()}
        values |= {"tokens": tokens, "room": _room(tokens), "longest": longest, "pairs": tokens * longest}
        values |= {
            "sequences": len(sequences.lengths),
            "starts": address(sequences.starts),
            "scratch": address(scratch),
            "wanted rows": wanted,
        }
        for number, (a, b) in enumerate(zip(trained[0::2], trained[1::2], strict=True)):
            values[f"a{number}"], values[f"b{number}"] = address(a), address(b)
        self.program.run(values)
        self.block.memory.take_back("scratch", scratch)

    # --------------------------------------------------------------------------------------------------- linear layers

    def turn_weights(self) -> None:
        """Bᵀ of every layer, and the A of those that share an input one below the other."""
        for group, stacked in zip(self.block.groups, self.kept.a, strict=True):
            start = 0
            for layer in group:
                if layer.lora_a is not None and layer.lora_b is not None:
                    (rank, into), number = layer.lora_a.shape, self._numbers[id(layer)]
                    if rank < _ranks(group):
                        self._copy(symbol(f"a{number}"), rank, into, stacked + 4 * start * into, into, 1)
                    self._turn(symbol(f"b{number}"), len(layer.lora_b), rank, self.kept.b_turned[id(layer)])
                    start += rank

    def linears(self, group: int, x: _Matrix, outs: Sequence[_Matrix], before: Any = None) -> None:
        """Every layer of the group on x, or on what the elementwise kernel ``before`` gives of it."""
        layers, low = self.block.groups[group], self.kept.low[group]
        made = _Small(low, self.kept.a[group])
        for number, (layer, y, own) in enumerate(zip(layers, outs, _by_rank(low, layers), strict=True)):
            change = _Small(own, self.kept.b_turned.get(id(layer), 0), layer.scale)
            ready = number > 0
            first = _NONE if ready else made
            self._product(layer, x, y, first, change, input_gradient=False, ready=ready, onto=False, before=before)

    def linears_backward(self, group: int, grads: Sequence[_Matrix], grad_x: _Matrix | None, *, onto: bool) -> _Matrix:
        """From the gradients of their outputs those of B and, (+)=, of x; returns that of x·Aᵀ."""
        layers, low = self.block.groups[group], self.kept.low[group]
        grad_low, done = self.scratch.matrix(low.columns), 0
        parts = zip(layers, grads, _by_rank(low, layers), _by_rank(grad_low, layers), strict=True)
        for number, (layer, grad, own, grad_own) in enumerate(parts):
            made = _Small(grad_own, self.kept.b_turned.get(id(layer), 0), layer.scale)
            if grad_x is not None:
                change = _Small(grad_own, self.kept.a[group] + 4 * done * grad_x.columns)
                more = onto or number > 0
                self._product(layer, grad, grad_x, made, change, input_gradient=True, ready=False, onto=more)
            elif own.columns:
                self._low_rank("low_rank_project", grad, grad_own, self.kept.b_turned[id(layer)], layer.scale)
            if own.columns:
                self._low_rank("low_rank_gather", grad, own, self._turned, layer.scale)
                self._turn(self._turned, own.columns, grad.columns, self._gradient(layer, 1))
            done += own.columns
        return grad_low

    def gradient_of_a(self, group: int, x: _Matrix | None, grad_low: _Matrix) -> None:
        """Of all layers of the group together."""
        if grad_low.columns:
            assert x is not None
            first = next(layer for layer in self.block.groups[group] if layer.lora_a is not None)
            self._low_rank("low_rank_gather", x, grad_low, self._gradient(first, 0))

    def _gradient(self, layer: LinearLayer, which: int) -> Affine:
        """Address of the gradient of A (0) or B (1)."""
        return symbol("grads") + 4 * self.starts[2 * self._numbers[id(layer)] + which]

    def _place_gradients(self) -> list[int]:
        """Where each begins; those of A of layers that share an input follow each other."""
        starts = []
        for group in self.block.groups:
            start = self.grads.fixed
            self.grads.numbers(_ranks(group) * _into(group))
            for layer in group:
                if layer.lora_a is not None and layer.lora_b is not None:
                    starts += [start, self.grads.fixed]
                    start += layer.lora_a.numel()
                    self.grads.numbers(layer.lora_b.numel())
        return starts

    def _product(
        self,
        layer: LinearLayer,
        x: _Matrix,
        y: _Matrix,
        made: _Small,
        change: _Small,
        *,
        input_gradient: bool,
        ready: bool,
        onto: bool,
        before: Any = None,
    ) -> None:
        """low = scale·x·matrixᵀ of what is ``made``; y (+)= xWᵀ + bias, or xW, + scale·low·matrix of the ``change``.
        ``ready``: the strips are x's."""
        if self.unit is None:
            assert before is None
            self._product_by_vectors(layer, x, y, made, change, input_gradient=input_gradient, onto=onto)
            return
        (out, into), form = layer.weight(torch.float32).shape, self.block.form(layer, input_gradient=input_gradient)
        terms, columns, bias = (out, into, None) if input_gradient else (into, out, layer.bias)
        self.program.call(
            self.unit.prepacked_product_int16, None, self.rows * (terms * columns),
            rows=self.rows, terms=terms, columns=columns, x=x.address, x_stride=x.stride,
            activation=kernel_address(before), strips=self._strips.address, strips_ready=ready,
            weight=address(form), bias=address(bias), y=y.address, y_stride=y.stride, accumulate=onto,
            delta_ranks=change.low.columns, delta_xa=change.low.address, delta_matrix=change.matrix,
            delta_scale=change.scale, projected_ranks=made.low.columns, projected_xa=made.low.address,
            projected_matrix=made.matrix, projected_scale=made.scale,
            xa_stride=change.low.stride,
        )  # fmt: skip

    def _product_by_vectors(
        self,
        layer: LinearLayer,
        x: _Matrix,
        y: _Matrix,
        made: _Small,
        change: _Small,
        *,
        input_gradient: bool,
        onto: bool,
    ) -> None:
        if made.low.columns:
            assert isinstance(made.matrix, Affine)
            self._low_rank("low_rank_project", x, made.low, made.matrix, made.scale)
        (out, into), panels = layer.weight(torch.float32).shape, self.block.form(layer, input_gradient=input_gradient)
        terms, columns = (out, into) if input_gradient else (into, out)
        self.program.call(
            self.products.prepacked_product_fp32, None, self.rows * (terms * columns),
            rows=self.rows, terms=terms, columns=columns, x=x.address, x_stride=x.stride, panels=address(panels),
            bias=0 if input_gradient else address(layer.bias), y=y.address, y_stride=y.stride, accumulate=onto,
            ranks=change.low.columns, xa=change.low.address, xa_stride=change.low.stride, matrix=change.matrix,
            scale=change.scale,
        )  # fmt: skip

    def _low_rank(self, name: str, x: _Matrix, low: _Matrix, matrix: Affine, scale: float = 1.0) -> None:
        """A kernel of ``low_rank.py``."""
        groups = -(-x.columns // _LANES)
        items, columns = (groups, groups * _LANES) if name == "low_rank_gather" else (self.rows, x.columns)
        self.program.call(
            getattr(self.products, name), items, self.rows * (columns * low.columns),
            rows=self.rows, columns=x.columns, ranks=low.columns, x=x.address, xa=low.address, matrix=matrix,
            x_stride=x.stride, xa_stride=low.stride, scale=scale,
        )  # fmt: skip

    def _copy(self, source: Affine, rows: int, columns: int, to: Affine, to_row: int, to_column: int) -> None:
        self.program.call(
            self.products.copy_matrix, rows, rows * columns,
            source=source, columns=columns, target=to, row_stride=to_row, column_stride=to_column,
        )  # fmt: skip

    def _turn(self, source: Affine, rows: int, columns: int, to: Affine) -> None:
        """(rows, columns) → (columns, rows)."""
        self._copy(source, rows, columns, to, 1, rows)

    # ------------------------------------------------------------------------------------------------- all other parts

    def take_wanted(self, x: _Matrix, y: _Matrix) -> None:
        """Those rows of x that are wanted. y's rows are as many."""
        self.program.call(
            self.products.select_rows, _WANTED, _WANTED * x.columns,
            columns=x.columns, source=x.address, indices=symbol("wanted"), target=y.address,
        )  # fmt: skip

    def put_wanted(self, x: _Matrix, y: _Matrix) -> None:
        """To where x's rows were taken from; zeros in y's others."""
        self.program.call(
            self.products.scatter_rows, _TOKENS, _TOKENS * x.columns,
            columns=x.columns, source=x.address, places=symbol("places"), target=y.address,
        )  # fmt: skip

    def multiply_by(self, x: _Matrix, factors: str, y: _Matrix) -> None:
        self.program.call(
            self.products.multiply_by, self.rows, self.rows * x.columns,
            columns=x.columns, x=x.address, factors=symbol(factors), y=y.address,
        )  # fmt: skip

    def norm(self, number: int, x: _Matrix, residual: _Matrix, y: _Matrix) -> None:
        norm, total, means, roots = self._of_norm(number)
        self.program.call(
            self.elementwise.add_layer_norm, self.rows, self.rows * x.columns,
            dtype=0, x=x.address, residual=residual.address, weight=address(norm.weight), bias=address(norm.bias),
            columns=x.columns, eps=norm.eps, total=total.address, y=y.address, means=means.address,
            roots=roots.address,
        )  # fmt: skip

    def norm_backward(self, number: int, grad: _Matrix, grad_x: _Matrix) -> None:
        norm, total, means, roots = self._of_norm(number)
        self.program.call(
            self.elementwise.add_layer_norm_backward, self.rows, self.rows * grad.columns,
            dtype=0, grad=grad.address, total=total.address, weight=address(norm.weight), means=means.address,
            roots=roots.address, columns=grad.columns, grad_x=grad_x.address,
        )  # fmt: skip

    def _of_norm(self, number: int) -> tuple[LayerNorm, _Matrix, _Matrix, _Matrix]:
        kept = self.kept
        return self.block.norms[number], kept.totals[number], kept.means[number], kept.roots[number]

    def linears_of_gelu(self, group: int, x: _Matrix, outs: Sequence[_Matrix]) -> None:
        """Every layer of the group on gelu(x), which the matrix unit's kernel has of a few rows at a time only."""
        kernel = self.elementwise.gelu
        if self.unit is not None:
            self.linears(group, x, outs, before=kernel)
            return
        active = self.scratch.matrix(x.columns)
        self.program.call(
            kernel, self.rows, self.rows * x.columns, dtype=0, columns=x.columns, x=x.address, y=active.address
        )
        self.linears(group, active, outs)

    def gelu_backward(self, grad: _Matrix, x: _Matrix, *, again: bool) -> None:
        """The gradient becomes that of x; with y ``again``, x becomes y."""
        self.program.call(
            self.elementwise.gelu_backward, self.rows, self.rows * x.columns,
            dtype=0, columns=x.columns, grad=grad.address, x=x.address, grad_x=grad.address,
            y=x.address if again else 0,
        )  # fmt: skip

    def attention(self, out: _Matrix) -> None:
        self._attend(self.products.short_attention, out.address, 0, (0, 0, 0))

    def attention_backward(self, grad: _Matrix, grads: Sequence[_Matrix]) -> None:
        self._attend(self.products.short_attention_backward, 0, grad.address, [one.address for one in grads])

    def _attend(self, kernel: Any, out: Affine | int, grad: Affine | int, grads: Sequence[Affine | int]) -> None:
        block, (q, k, v), (grad_q, grad_k, grad_v) = self.block, self.kept.qkv, grads
        heads = q.columns // block.head_size
        self.program.call(
            kernel, symbol("sequences") * heads, symbol("pairs") * q.columns,
            heads=heads, heads_per_key=1, head_size=block.head_size, causal=block.causal, starts=symbol("starts"),
            q=q.address, k=k.address, v=v.address, q_stride=q.stride, k_stride=k.stride, v_stride=v.stride,
            scale=block.scale, out=out, grad=grad, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v,
            longest=symbol("longest"),
        )  # fmt: skip


def _write_forward(block: BertBlock, some: bool, drops1: bool, drops2: bool) -> _Writer:
    """Reads ``x``, dropout's factors and, for ``some`` rows, which are ``wanted``; writes ``y`` and ``kept``."""
    writer = _Writer(block)
    (hidden, _), kept, x = _widths(block), writer.kept, _given("x", _widths(block)[0])
    narrow = writer.scratch.matrix(hidden)
    mixed, u = (one or writer.scratch.matrix(hidden) for one in (kept.mixed, kept.u))
    writer.turn_weights()
    writer.linears(0, x, kept.qkv)
    if some:
        of_all, of_wanted = (writer.scratch.matrix(hidden) for _ in range(2))
        writer.attention(of_all)
        writer.take_wanted(of_all, mixed)
        writer.take_wanted(x, of_wanted)
        writer.rows, x = _WANTED, of_wanted
    else:
        writer.attention(mixed)
    writer.linears(1, mixed, [narrow])
    if drops1:
        writer.multiply_by(narrow, "factors0", narrow)
    writer.norm(0, narrow, x, u)
    writer.linears(2, u, [kept.wide])
    writer.linears_of_gelu(3, kept.wide, [narrow])
    if drops2:
        writer.multiply_by(narrow, "factors1", narrow)
    writer.norm(1, narrow, u, _given("y", hidden))
    return writer


def _write_backward(block: BertBlock, some: bool, drops1: bool, drops2: bool, needs_input: bool) -> _Writer:
    """Reads what the forward program read and kept (for ``some`` rows their ``places``), and ``grad``, that of y;
    writes ``grad_x`` and ``grads``."""
    writer = _Writer(block)
    (hidden, inner), kept, x = _widths(block), writer.kept, _given("x", _widths(block)[0])
    grad_u, dropped, grad_wide = (writer.scratch.matrix(columns) for columns in (hidden, hidden, inner))
    grad_qkv, grad_x = [writer.scratch.matrix(hidden) for _ in range(3)], _given("grad_x", hidden)
    top = writer.scratch.matrix(hidden) if some else grad_x  # of what the first norm is given beside attention's

    writer.rows = _WANTED if some else _TOKENS
    writer.norm_backward(1, _given("grad", hidden), grad_u)
    if drops2:
        writer.multiply_by(grad_u, "factors1", dropped)
    grad_low = writer.linears_backward(3, [dropped if drops2 else grad_u], grad_wide, onto=False)
    writer.gelu_backward(grad_wide, kept.wide, again=grad_low.columns > 0)
    writer.gradient_of_a(3, kept.wide, grad_low)
    grad_low = writer.linears_backward(2, [grad_wide], grad_u, onto=True)
    writer.gradient_of_a(2, kept.u, grad_low)

    writer.norm_backward(0, grad_u, top)
    if drops1:
        writer.multiply_by(top, "factors0", dropped)
    grad_mixed = grad_u
    grad_low = writer.linears_backward(1, [dropped if drops1 else top], grad_mixed, onto=False)
    writer.gradient_of_a(1, kept.mixed, grad_low)
    if some:
        writer.rows, grad_mixed = _TOKENS, writer.scratch.matrix(hidden)
        writer.put_wanted(grad_u, grad_mixed)
        writer.put_wanted(top, grad_x)
    writer.attention_backward(grad_mixed, grad_qkv)
    grad_low = writer.linears_backward(0, grad_qkv, grad_x if needs_input else None, onto=True)
    writer.gradient_of_a(0, x, grad_low)
    return writer


def _by_rank(low: _Matrix, group: Sequence[LinearLayer]) -> list[_Matrix]:
    """The columns of each layer of the group, none where it has no low-rank change."""
    found, start = [], 0
    for layer in group:
        rank = 0 if layer.lora_a is None else len(layer.lora_a)
        found.append(low.part(start, rank))
        start += rank
    return found
