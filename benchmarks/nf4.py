"""Four-bit weights on the CPU against bitsandbytes: quantise, dequantise, and a linear layer forward and backward.

    python benchmarks/nf4.py [--rounds 7] [--out benchmarks/results/nf4.json]

Contenders alternate inside one process, so that whatever else the machine does hits all of them alike. Both store the
same format with the same codes (tests/test_nf4.py); the layer's result is compared before it is timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from capotune.device import cpu_level
from capotune.kernels import native as native_module
from capotune.kernels import nf4
from capotune.kernels.nf4 import reference

SHAPES = ((2048, 2048), (4096, 11008))  # (out, in)
TOKENS = (128, 512, 2048)
BLOCK_SIZE = 64
Work = Callable[[], object]


def alternate(contenders: dict[str, Work], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each: median, quartiles, smallest. The first round warms up and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(rounds + 1):
        for name, work in contenders.items():
            start = time.perf_counter()
            result = work()
            elapsed = time.perf_counter() - start
            del result
            if round_number:
                times[name].append(elapsed * 1e3)
    return {name: summary(values) for name, values in times.items()}


def summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {name: round(x, 3) for name, x in (("median", middle), ("q1", low), ("q3", high), ("min", min(values)))}


def packed_pair(weight: torch.Tensor) -> tuple[nf4.QuantizedTensor, torch.Tensor, Any]:
    """The same codes and statistics, as each library holds them."""
    codes, state = bnb.functional.quantize_4bit(
        weight, blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=True
    )
    parts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return nf4.from_checkpoint({"weight": codes} | parts), codes, state


def quantising(weight: torch.Tensor) -> dict[str, Work]:
    flat = weight.view(-1)
    options = {"blocksize": BLOCK_SIZE, "quant_type": "nf4", "compress_statistics": True}
    return {
        "capotune": lambda: nf4.quantize_4bit(weight, block_size=BLOCK_SIZE),
        "capotune, PyTorch path, without double quantisation": lambda: reference.quantize(flat, "nf4", BLOCK_SIZE),
        "bitsandbytes": lambda: bnb.functional.quantize_4bit(weight, **options),
    }


def dequantising(weight: torch.Tensor) -> dict[str, Work]:
    q, codes, state = packed_pair(weight)
    assert torch.equal(nf4.dequantize_4bit(q), bnb.functional.dequantize_4bit(codes, state))
    out = torch.empty_like(weight)
    return {
        "capotune": lambda: nf4.dequantize_4bit(q),
        "capotune, into a tensor that exists": lambda: nf4.dequantize_4bit(q, out=out),
        "capotune, PyTorch path": lambda: reference.dequantize(q, out.view(-1)),
        "bitsandbytes": lambda: bnb.functional.dequantize_4bit(codes, state),
    }


def linear(weight: torch.Tensor, tokens: int) -> dict[str, Work]:
    q, codes, state = packed_pair(weight)
    ours = nf4.Linear4bit.from_quantized(q)
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
    dense.weight.copy_(ours.dense_weight())
    theirs = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, quant_type="nf4"
    )
    theirs.weight = bnb.nn.Params4bit(codes, requires_grad=False, quant_state=state, bnb_quantized=True)
    theirs.weight.quant_state = state
    x = torch.randn(tokens, weight.shape[1], dtype=weight.dtype)
    grad = torch.randn(tokens, weight.shape[0], dtype=weight.dtype)

    def step(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        (grad_x,) = torch.autograd.grad(y, leaf, grad)
        return y, grad_x

    for mine, other in zip(step(ours), step(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    return {
        "capotune": lambda: step(ours),
        "bitsandbytes": lambda: step(theirs),
        "dense nn.Linear": lambda: step(dense),
    }


def measure(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
        works = {"quantise": quantising, "dequantise": dequantising}
        works |= {f"linear, {n} tokens": lambda w, n=n: linear(w, n) for n in TOKENS}  # type: ignore[misc]
        for what, build in works.items():
            times = alternate(build(weight), rounds)
            ratio = round(times["bitsandbytes"]["median"] / times["capotune"]["median"], 2)
            rows.append({"what": what, "shape": shape, "milliseconds": times, "speed_against_bitsandbytes": ratio})
            print(f"{what:22} {shape!s:14} {ratio:6.2f}x  " + "  ".join(f"{n} {t['median']}" for n, t in times.items()))
            gc.collect()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "nf4.json")
    options = parser.parse_args()
    record = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "system": platform.platform(),
            "simd": cpu_level(),
            "threads": torch.get_num_threads(),
            "c_kernels": native_module.library("nf4_cpu") is not None,
        },
        "versions": {name: metadata.version(name) for name in ("torch", "bitsandbytes")},
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
        "rounds": options.rounds,
        "rows": measure(options.rounds),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
