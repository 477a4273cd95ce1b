"""Cross-entropy of an output layer without its logits, forward and backward: Capotune's kernel and its peers.

    python benchmarks/_gpu_loss.py --out FILE [--quick]

16,384 tokens, hidden size 2,048, a vocabulary of 248,320, bf16, the output layer frozen (the peers compute its gradient
only where it is asked for). How far each loss and the norm of its gradient are from Capotune's stands beside its time;
memory is what the call adds at its peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from capotune.device import environment, pick_device
from capotune.kernels.cross_entropy import linear_cross_entropy

SIZES = (16_384, 2_048, 248_320)
QUICK_SIZES = (64, 32, 500)
REPEATS = 7
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From hidden (tokens, hidden), weight (vocabulary, hidden) and targets (tokens,) to the mean loss."""


def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Capotune's."""
    return linear_cross_entropy(hidden, weight, None, targets).mean()


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """All logits at once."""
    return functional.cross_entropy((hidden @ weight.T).float(), targets)


def cut(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Apple's cut-cross-entropy."""
    from cut_cross_entropy import linear_cross_entropy as theirs

    found: torch.Tensor = theirs(hidden, weight, targets)
    return found


def liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Liger's fused linear cross-entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    found: torch.Tensor = liger_fused_linear_cross_entropy(hidden, weight, targets)
    return found


PEERS: dict[str, tuple[Loss, str | None]] = {
    "capotune": (ours, None),
    "PyTorch": (plain, None),
    "cut-cross-entropy": (cut, "cut_cross_entropy"),
    "Liger": (liger, "liger_kernel"),
}
"""And the package that each needs."""


def measured(loss: Loss, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
    """Loss, gradient norm, median seconds, bytes added."""
    seconds, on_gpu = [], hidden.is_cuda
    for _ in range(REPEATS + 1):
        hidden.grad = None
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.cuda.synchronize()
        started = time.perf_counter()
        value = loss(hidden, weight, targets)
        value.backward()  # type: ignore[no-untyped-call]
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    assert hidden.grad is not None
    return {
        "loss": value.item(),
        "gradient_norm": float(hidden.grad.float().norm()),
        "seconds": statistics.median(seconds[1:]),
        "peak_bytes": torch.cuda.max_memory_allocated() - before if on_gpu else None,
    }


def main() -> None:
    """Everyone who is installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    tokens, size, vocabulary = QUICK_SIZES if options.quick else SIZES
    device = pick_device()
    torch.manual_seed(0)
    with device:
        hidden = torch.randn(tokens, size, dtype=torch.bfloat16).requires_grad_()
        weight = (torch.randn(vocabulary, size) * 0.02).bfloat16()
        targets = torch.randint(0, vocabulary, (tokens,))
    results: dict[str, Any] = {"environment": environment(), "sizes": [tokens, size, vocabulary], "runs": {}}
    for name, (loss, package) in PEERS.items():
        if package and (find_spec(package) is None or device.type != "cuda"):
            results["runs"][name] = {"absent": f"needs {package} and a GPU with CUDA"}
            continue
        try:
            found = measured(loss, hidden, weight, targets)
        except torch.OutOfMemoryError as error:
            found = {"failed": str(error).splitlines()[0]}
        else:
            first = results["runs"].get("capotune", found)
            for what in ("loss", "gradient_norm"):
                found[f"{what}_difference"] = abs(found[what] - first[what]) / first[what]
        results["runs"][name] = found
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
