"""The floor of a step: its necessary matrix products alone, on the real tokens of the same batches.

For each frozen linear layer forward x·Wᵀ and the input's gradient g·W; the same for the output layer, where something
is learned and nowhere else; for layers that train the weight's gradient gᵀ·x too; no gradient below the lowest trained
layer, and no second forward pass where nothing below changes. All are plain 2-D products over the tokens of a batch put
one after the other, into memory that is there already.

``run_floor`` takes them as PyTorch does, in fp32 (on a GPU those of language models in its 16 bits),
``run_kernel_floor`` as capotune does where it has a kernel for them.

Left out: attention's own products (two forward, four back), LoRA's skinny ones, unpacking of 4-bit weights, norms,
activations, the softmax, the optimiser, solving a head. So no engine can reach it; it says how much there is to gain.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from _engine_clock import Clock
from _engine_data import DEVICE, NOT_LEARNED, VIRTUAL_TOKENS, Job, dtype_of
from torch import nn
from transformers import AutoConfig, AutoModel

from capotune.kernels.execution import reduced_precision
from capotune.kernels.linear import LinearInput, amx_kernels, input_gradient
from capotune.kernels.native import address
from capotune.kernels.prepacked import prepack, prepacked_amx_kernels, strip_bytes
from capotune.kernels.program import Program, symbol

FEW = 48
"""Rows, below which capotune leaves a product alone to PyTorch."""
_READS_BLOCK_INPUT = re.compile(r"(query|key|value|[qkv]_proj)$")


@dataclass(frozen=True)
class Product:
    """A linear layer's weight (out, into) and what has to be computed with it."""

    weight: torch.Tensor
    once: bool = False
    """Nothing below it changes, so that its outputs of the first epoch do for all."""
    input_gradient: bool = True
    weight_gradient: bool = False


class Space:
    """Matrices that are there already: the first rows of one block of memory for each use and width."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._blocks: dict[tuple[str, int], torch.Tensor] = {}

    def of(self, use: str, rows: int, columns: int) -> torch.Tensor:
        """(rows, columns) of some numbers, not zeros."""
        found = self._blocks.get((use, columns))
        if found is None or len(found) < rows:
            found = self._blocks[use, columns] = torch.rand(rows, columns, dtype=self.dtype, device=DEVICE)
        return found[:rows]


def run_floor(job: Job, clock: Clock) -> None:
    """Every batch's products, as PyTorch takes them."""
    _run(job, clock, multiply)


def run_kernel_floor(job: Job, clock: Clock) -> None:
    """Every batch's products, by capotune's kernels."""
    with reduced_precision():
        _run(job, clock, PrepackedProducts() if job.workload.classifies else multiply_by_kernels)


def no_kernels() -> str | None:
    """Why the second floor is the first, if so."""
    return None if amx_kernels() else "no AMX here that capotune knows"


def _run(job: Job, clock: Clock, product: Callable[[Product, int, Space], None]) -> None:
    layers, head, space = backbone(job), output(job), Space(dtype_of(job.workload))

    second_run = any(one.options.get("second_run") for one in job.comparison.contenders)

    def step(epoch: int, tokens: int, learned: int) -> None:
        for layer in layers:
            if not layer.once or (epoch == 0 and not second_run):
                product(layer, tokens, space)
        if head is not None:
            product(head, learned, space)

    epochs = job.rows["epochs"][: 1 if job.workload.solved else None]
    sizes = [(epoch, *size(job, batch)) for epoch, batches in enumerate(epochs) for batch in batches]
    _, tokens, learned = (max(column) for column in zip(*sizes, strict=True))
    step(0, tokens, learned)  # so that the memory is there
    clock.begin()
    for one in sizes:
        step(*one)
        clock.step()


def size(job: Job, batch: list[int]) -> tuple[int, int]:
    """Tokens of the batch, a soft prompt's too, and how many of them, or rows, are learned."""
    virtual = VIRTUAL_TOKENS if job.workload.method == "prompt-tuning" else 0
    tokens = sum(len(job.rows["sequences"][row]) + virtual for row in batch)
    if job.workload.classifies:
        return tokens, len(batch)
    return tokens, sum(label != NOT_LEARNED for row in batch for label in job.rows["targets"][row])


def multiply(layer: Product, rows: int, space: Space) -> None:
    """Forward, and what backward needs."""
    out, into = layer.weight.shape
    x, y = space.of("x", rows, into), space.of("y", rows, out)
    torch.mm(x, layer.weight.t(), out=y)
    if layer.input_gradient:
        torch.mm(y, layer.weight, out=space.of("gradient of x", rows, into))
    if layer.weight_gradient:
        torch.mm(y.t(), x, out=space.of("gradient of weight", out, into))


class PrepackedProducts:
    """The same by ``capotune.kernels.prepacked``, as the weights of small models are prepacked."""

    def __init__(self) -> None:
        self._weights: dict[tuple[int, bool], tuple[torch.Tensor, Program]] = {}

    def __call__(self, layer: Product, rows: int, space: Space) -> None:
        if layer.weight_gradient or rows < FEW:
            multiply_by_kernels(layer, rows, space)
            return
        out, into = layer.weight.shape
        x, y = space.of("x", rows, into), space.of("y", rows, out)
        self._run(layer, x, y, input_gradient=False)
        if layer.input_gradient:
            self._run(layer, y, space.of("gradient of x", rows, into), input_gradient=True)

    def _run(self, layer: Product, x: torch.Tensor, y: torch.Tensor, *, input_gradient: bool) -> None:
        terms, key = x.shape[1], (id(layer), input_gradient)
        if key not in self._weights:
            unit, program = prepacked_amx_kernels(), Program()
            assert unit is not None
            form = prepack(layer.weight, input_gradient=input_gradient)
            program.call(
                unit.prepacked_product_int16, None, symbol("rows") * (terms * y.shape[1]),
                rows=symbol("rows"), terms=terms, columns=y.shape[1], x=symbol("x"), x_stride=terms, activation=0,
                strips=symbol("strips"), strips_ready=False, weight=address(form), bias=0,
                y=symbol("y"), y_stride=y.shape[1], accumulate=False,
                delta_ranks=0, delta_xa=0, delta_matrix=0, delta_scale=0,
                projected_ranks=0, projected_xa=0, projected_matrix=0, projected_scale=0, xa_stride=0,
            )  # fmt: skip
            self._weights[key] = form, program
        strips = torch.empty(-(-len(x) // 16), strip_bytes(terms), dtype=torch.int8)
        self._weights[key][1].run({"rows": len(x), "x": address(x), "strips": address(strips), "y": address(y)})


def multiply_by_kernels(layer: Product, rows: int, space: Space) -> None:
    """The same by ``capotune.kernels.linear``."""
    out, into = layer.weight.shape
    x, y = space.of("x", rows, into), space.of("y", rows, out)
    LinearInput(x).linear(layer.weight, out=y)
    if layer.input_gradient:
        input_gradient(y, layer.weight)
    if layer.weight_gradient:
        torch.mm(y.t(), x, out=space.of("gradient of weight", out, into))


def backbone(job: Job) -> list[Product]:
    """Its linear layers in order."""
    work = job.workload
    config = AutoConfig.from_pretrained(job.base["folder"])
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    lowest = config.num_hidden_layers - work.trainable_layers if work.method == "feature-extraction" else 0
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith("pooler"):
            block = next(int(part) for part in name.split(".") if part.isdigit())
            bottom = block == lowest and _READS_BLOCK_INPUT.search(name) and work.method != "prompt-tuning"
            layers.append(
                Product(
                    torch.rand(module.weight.shape, dtype=dtype_of(work), device=DEVICE),
                    once=block < lowest,
                    input_gradient=block >= lowest and not bottom,
                    weight_gradient=block >= lowest and work.method == "feature-extraction",
                )
            )
    return layers


def output(job: Job) -> Product | None:
    """The output layer, or the classifier's head, which trains; None where the head is solved and not stepped."""
    if job.workload.solved:
        return None
    config = AutoConfig.from_pretrained(job.base["folder"])
    outputs = len(job.base["labels"]) if job.workload.classifies else config.vocab_size
    weight = torch.rand(outputs, config.hidden_size, dtype=dtype_of(job.workload), device=DEVICE)
    return Product(weight, weight_gradient=job.workload.classifies)
