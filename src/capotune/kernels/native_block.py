"""A block as one C call forward and one backward, by the programs that ``block_program.py`` compiles.

It computes what ``composed_block.py`` does, but for the order of sums of gradients. Where steps are short, calling a
function for each part takes as long as the parts' work.

It is for fp32 on a CPU, short sequences, frozen layers with a LoRA delta or without, and models so small that their
weights may stand beside them prepacked (``prepacked.py``): with AMX where reduced precision is allowed, and with AVX2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from capotune.errors import SettingError
from capotune.kernels import policy
from capotune.kernels.block_layout import Variant, aligned_tokens, ranks, shape
from capotune.kernels.block_program import BackwardWriter, ForwardWriter, Prepacked, Writer
from capotune.kernels.blocks import Block, Call, Dropout, Linear, Rotary
from capotune.kernels.memory import Memory
from capotune.kernels.native import address, check_shape, library
from capotune.kernels.native_ops import MOST_RANKS
from capotune.kernels.prepacked import MOST_TERMS, fits_prepacked

__all__ = ["NativeBlock"]

_LANES = 8  # a head is a multiple of them


class NativeBlock:
    """Executes ``block``, whose layers are read when this is made. ``memory`` is what the blocks of a model share."""

    def __init__(self, block: Block, memory: Memory) -> None:
        self.block, self.memory = block, memory
        self.adapted = [name for name, layer in block.layers.items() if layer.lora_a is not None]
        """In the order in which autograd is given their A and B."""
        self._prepacked = Prepacked()
        self._programs: dict[tuple[type[Writer], Variant], Writer] = {}
        self._compiles = _compiles(block)

    def takes(self, x: torch.Tensor, call: Call) -> bool:
        """Whether it is for such input (tokens, hidden), here and now.

        Of many tokens Llama's form saves too much: the composed block's saved activations are quantised then
        (``saved_activations.py``), and those of a program are not. BERT's models are small.
        """
        rotates = any(isinstance(op, Rotary) for op in self.block.ops)
        if rotates and (call.rotation is None or len(x) >= policy.QUANTIZE_SAVED_FROM_TOKENS):
            return False
        short = max(call.sequences.lengths, default=0) <= policy.SHORT_ATTENTION_LENGTH
        rows = call.rows is None or len(call.rows) > 0
        fp32 = all(one.dtype == torch.float32 for one in (x, *(call.rotation or ())))
        fits = self._compiles and rows and short and fp32 and x.is_contiguous()
        return fits and fits_prepacked(x) and library("products_cpu") is not None

    def __call__(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        """x (tokens, hidden) → (tokens, hidden), or with ``call.rows`` (rows, hidden).

        To be asked only where it ``takes`` x. Raises ``SettingError`` where shapes do not fit, or for rows that x does
        not have: C would read beyond it.
        """
        check_shape("x", x, (sum(call.sequences.lengths), _hidden(self.block)))
        if call.rows is not None:
            _check_rows(call.rows, len(x))
        for angles in call.rotation or ():
            check_shape("cos and sin", angles, (len(x), self.block.head_size))
        computed = x if call.rows is None else x[: len(call.rows)]
        rates = call.dropout or (0.0,) * sum(isinstance(op, Dropout) for op in self.block.ops)
        factors = [_dropout_factors(computed, rate) for rate in rates]
        trained = [one for name in self.adapted for one in _lora(self.block, name)]
        if torch.is_grad_enabled():
            y: torch.Tensor = _NativeBlock.apply(self, call, factors, x, *trained)  # type: ignore[no-untyped-call]
            return y
        y, saved = self.forward(call, factors, x)
        self.memory.take_back("saved", saved)
        return y

    def forward(
        self, call: Call, factors: Sequence[torch.Tensor | None], x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output, and what backward reads, a lent buffer."""
        writer = self._program(ForwardWriter, call, factors)
        y = x.new_empty(len(x) if call.rows is None else len(call.rows), x.shape[1])
        saved = self.memory.lend("saved", writer.saved.space.elements_for(len(x)))
        self._run(writer, call, len(y), factors, {"x": x, "y": y, "saved": saved, "rows": call.rows})
        return y, saved

    def backward(
        self, call: Call, factors: Sequence[torch.Tensor | None], x: torch.Tensor, saved: torch.Tensor,
        grad: torch.Tensor, needs_input: bool,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:  # fmt: skip
        """The gradients of x, where it needs one, and of the trained weights in their order."""
        writer = self._program(BackwardWriter, call, factors, needs_input)
        assert isinstance(writer, BackwardWriter)
        grad, grad_x, grads = grad.contiguous(), torch.empty_like(x), torch.empty(writer.grads.elements_for(0))
        tensors = {"x": x, "saved": saved, "grad": grad, "grad_x": grad_x, "grads": grads}
        self._run(writer, call, len(grad), factors, {**tensors, "places": _places(call.rows, len(x))})
        self.memory.take_back("saved", saved)
        of_weights = [
            grads.as_strided(weight.shape, weight.stride(), start)
            for name in self.adapted
            for weight, start in zip(_lora(self.block, name), writer.starts[name], strict=True)
        ]
        return grad_x if needs_input else None, of_weights

    def _program(
        self, direction: type[Writer], call: Call, factors: Sequence[torch.Tensor | None], needs_input: bool = True
    ) -> Writer:
        """Written once for each variant."""
        variant = Variant(call.rows is not None, tuple(one is not None for one in factors), needs_input)
        key = direction, variant
        if key not in self._programs:
            self._programs[key] = direction(self.block, self._prepacked, variant)
        return self._programs[key]

    def _run(
        self, writer: Writer, call: Call, rows: int, factors: Sequence[torch.Tensor | None],
        tensors: Mapping[str, torch.Tensor | None],
    ) -> None:  # fmt: skip
        """On these tensors, by their names in the program; so many ``rows`` are computed."""
        lengths = call.sequences.lengths
        tokens, longest = sum(lengths), max(lengths)
        workspace = self.memory.lend("workspace", writer.workspace.elements_for(tokens))
        values = {name: address(tensor) for name, tensor in tensors.items()}
        values |= {
            "tokens": tokens, "tokens, rounded up": aligned_tokens(tokens), "rows of the subset": rows,
            "sequences": len(lengths), "longest": longest, "pairs": tokens * longest,
            "starts": address(call.sequences.starts), "workspace": address(workspace),
        }  # fmt: skip
        values |= {f"factors {number}": address(one) for number, one in enumerate(factors)}
        rotation = [] if call.rotation is None else [one.contiguous() for one in call.rotation]
        values |= dict(zip(("cos", "sin"), map(address, rotation), strict=False))
        for name in self.adapted:
            a, b = _lora(self.block, name)
            values[f"a of {name}"], values[f"b of {name}"] = address(a), address(b)
        writer.program.run(values)
        self.memory.take_back("workspace", workspace)


class _NativeBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        native: NativeBlock,
        call: Call,
        factors: Sequence[torch.Tensor | None],
        x: torch.Tensor,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        y, saved = native.forward(call, factors, x)
        ctx.save_for_backward(x, saved, *factors, *trained)
        ctx.call = native, call, len(factors)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if getattr(ctx, "ran_backward", False):  # it has written over what was saved
            raise RuntimeError("a second backward through a block: run the forward pass again")
        ctx.ran_backward = True
        native, call, count = ctx.call
        x, saved, *rest = ctx.saved_tensors
        grad_x, of_weights = native.backward(call, rest[:count], x, saved, grad, ctx.needs_input_grad[3])
        return None, None, None, grad_x, *of_weights


def _compiles(block: Block) -> bool:
    """Whether programs can be written for this block."""
    weights = [layer.weight(torch.float32) for layer in block.layers.values()]
    vectors = [one for norm in block.norms.values() for one in (norm.weight, norm.bias)]
    others = [one for layer in block.layers.values() for one in (layer.bias, layer.lora_a, layer.lora_b)]
    tensors = [one for one in (*weights, *vectors, *others) if one is not None]
    return (
        all(layer.is_frozen for layer in block.layers.values())
        and all(norm.is_frozen for norm in block.norms.values())
        and all(one.is_cpu and one.is_contiguous() and one.dtype == torch.float32 for one in tensors)
        and max(max(shape(layer)) for layer in block.layers.values()) <= MOST_TERMS
        and max(ranks(block, op) for op in block.ops if isinstance(op, Linear)) <= MOST_RANKS
        and block.window is None
        and block.prefix is None
        and 0 < block.head_size <= policy.SHORT_ATTENTION_HEAD_SIZE
        and block.head_size % _LANES == 0
        and block.scale > 0
    )


def _hidden(block: Block) -> int:
    return len(next(iter(block.norms.values())).weight)


def _lora(block: Block, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    layer = block.layers[name]
    assert layer.lora_a is not None
    assert layer.lora_b is not None
    return layer.lora_a, layer.lora_b


def _check_rows(rows: torch.Tensor, tokens: int) -> None:
    """Raise ``SettingError`` unless these are numbers of so many tokens."""
    if rows.dtype != torch.int64 or rows.dim() != 1 or not rows.is_contiguous():
        raise SettingError(f"rows: whole numbers of 64 bits, one after the other, not {rows.dtype} {rows.shape}.")
    if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < tokens):
        raise SettingError(f"rows: numbers from 0 to {tokens - 1}, not {int(rows.min())} to {int(rows.max())}.")


def _places(rows: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """For each token, which of the ``rows`` it is; -1: none."""
    if rows is None:
        return None
    return torch.full((tokens,), -1).index_copy_(0, rows, torch.arange(len(rows)))


def _dropout_factors(x: torch.Tensor, rate: float) -> torch.Tensor | None:
    """What PyTorch's dropout multiplies x by, from the same random numbers."""
    if rate == 1:
        return torch.zeros_like(x)
    return torch.empty_like(x).bernoulli_(1 - rate).div_(1 - rate) if rate else None
