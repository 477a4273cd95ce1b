"""How many stored tensors equal bitsandbytes' to the bit: kinds × shapes × dtypes × code books × block sizes.

    python benchmarks/nf4_bits.py [--out benchmarks/results/nf4-bits.json]

The comparisons of tests/test_nf4.py at every block size, counted instead of asserted: codes, absmax, and with double
quantisation the 8-bit absmax, its own absmax and the offset; then the dequantised numbers in fp32, bf16 and fp16. Both
Capotune's C kernels and its PyTorch path are compared with bitsandbytes' PyTorch kernels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from test_nf4 import BLOCK_SIZES, DTYPES, KINDS, QUANT_TYPES, SHAPES, bitsandbytes, make

from capotune.device import cpu_level
from capotune.kernels import native as native_module
from capotune.kernels import nf4


def compare(path: str) -> dict[str, Counter[str]]:
    """Equal and all, by what was compared."""
    counts: dict[str, Counter[str]] = {}

    def count(what: str, one: torch.Tensor, other: torch.Tensor) -> None:
        entry = counts.setdefault(what, Counter())
        entry["all"] += 1
        entry["equal"] += bool(one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8)))
        entry["numbers"] += one.numel()

    cases = itertools.product(KINDS, SHAPES, DTYPES, QUANT_TYPES, BLOCK_SIZES)
    for kind, shape, dtype, quant_type, block_size in cases:
        theirs, x = bitsandbytes(kind, shape, dtype, quant_type, block_size), make(kind, shape, dtype)
        for nested in (False, True):
            q = nf4.quantize_4bit(x, quant_type=quant_type, block_size=block_size, double_quant=nested)
            count("codes", q.codes, theirs.codes)
            if q.nested_absmax is None or q.offset is None:
                count("absmax", q.absmax, theirs.absmax)
            else:
                count("absmax in 8 bits", q.absmax, theirs.absmax8)
                count("nested absmax", q.nested_absmax, theirs.nested_absmax)
                count("offset", q.offset.view(1), theirs.offset.view(1))
            for out in DTYPES:
                name = str(out).removeprefix("torch.")
                count(f"dequantised to {name}", nf4.dequantize_4bit(q, out), theirs.numbers[nested, out])
    for what, entry in counts.items():
        print(f"{path:8} {what:22} {entry['equal']:6,} of {entry['all']:6,} tensors, {entry['numbers']:12,} numbers")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "nf4-bits.json")
    options = parser.parse_args()
    found = {"C": compare("C")} if native_module.library("nf4_cpu") is not None else {}
    native_module.library = lambda _: None  # type: ignore[assignment]
    found["PyTorch"] = compare("PyTorch")
    record = {
        "versions": {name: metadata.version(name) for name in ("torch", "bitsandbytes")},
        "kinds": KINDS,
        "shapes": SHAPES,
        "block_sizes": BLOCK_SIZES,
        "simd": cpu_level(),
        "paths": found,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    if any(entry["equal"] != entry["all"] for counts in found.values() for entry in counts.values()):
        raise SystemExit("some differ")


if __name__ == "__main__":
    main()
