"""Where a training step's time goes: workloads (a) and (d) of ``engine.py``, tuned, under PyTorch's profiler.

    python benchmarks/engine_profile.py [--label after] [--source src]

Times are each operation's own, summed over five steps on one batch, and put together by what they are for. ``--source``
is the source folder of another version of capotune, so that two can be compared by one script:

    git worktree add /tmp/before cb00828
    python benchmarks/engine_profile.py --label before --source /tmp/before/src
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "engine-profile.json"
STEPS = 5
_SMALL = 64  # a product with a side up to this is one of a low rank
KINDS = {
    "large matrix products": ("amx",),
    "attention": ("attention",),
    "low-rank products": ("low_rank_",),
    "norms": ("norm", "rsqrt", "pow", "mean"),
    "activations": ("gelu", "silu", "swiglu", "exp", "sigmoid"),
    "rotary embedding": ("rotary", "neg"),
    "softmax of the loss": ("cross_entropy", "softmax", "nll", "logsumexp", "sub_", "scatter", "gather"),
    "optimizer and clipping": ("adamw", "foreach", "vector_norm"),
    "copies and new memory": ("copy_", "empty", "fill_", "zero", "cat", "clone", "contiguous", "resize"),
    "sums, products by element": ("add", "mul", "div", "sum", "where", "index", "embedding"),
}


def kind(name: str, shapes: list[Any]) -> str:
    """What an operation is for."""
    if name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "mkldnn::_linear_pointwise"):
        sides = [side for shape in shapes if isinstance(shape, list) and len(shape) >= 2 for side in shape[-2:]]
        return "low-rank products" if min(sides, default=0) <= _SMALL else "large matrix products"
    low = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in low for part in parts)), "the rest, Python's too")


def profile_step(letter: str) -> dict[str, Any]:
    """Milliseconds of a step by kind, and of a step without the profiler."""
    import torch
    from _engine_data import Job, without_dropout
    from _engine_ours import assembled, settings_of
    from _engine_process import prepare
    from _engine_workloads import GROUPED, OURS, workload
    from torch.profiler import ProfilerActivity, profile

    from capotune.data.batches import TokenRows
    from capotune.engine import loop
    from capotune.engine import optimizer as optimizers
    from capotune.evaluation.forward import Examples

    work = workload(letter, steps=5)
    comparison = work.comparison(GROUPED)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        prepare(work, folder)
        ours = next(one for one in comparison.everyone if one.name == OURS)
        job = Job(work, comparison, ours, folder)
        settings = settings_of(work, comparison.batch_size)
        model = assembled(work, settings, job.base)
        without_dropout(model.model)
        targets = torch.tensor(job.rows["targets"]) if work.classifies else job.rows["targets"]
        examples = Examples(TokenRows(job.rows["sequences"], model.task.pad_id), targets)
        weights = model.trainable()
        rates = dict.fromkeys(weights, 1e-4)
        if hasattr(optimizers, "FlatAdamW"):  # not in versions before it
            to_update: tuple[Any, ...] = (stack.enter_context(optimizers.FlatAdamW(weights, rates, 0.0)),)
        else:
            to_update = (weights, optimizers.make_optimizer(weights, rates, 0.0))
        batch = np.array(job.rows["epochs"][0][2])
        if hasattr(model, "reading"):  # not in versions before it
            from capotune.kernels.execution import reduced_precision, reusing_memory

            stack.enter_context(reduced_precision())
            stack.enter_context(reusing_memory())
            stack.enter_context(model.reading())
            name_kernels(stack)

        def step() -> float:
            began = time.perf_counter()
            if hasattr(loop, "_step"):  # in versions before
                loop._step(model, examples, batch, *to_update, settings)
            else:
                loop._update(*to_update, settings, loop.accumulate(model, examples, batch, settings))
            return time.perf_counter() - began

        step()
        plain = float(np.median([step() for _ in range(STEPS)]))
        found: dict[str, float] = defaultdict(float)
        for _ in range(STEPS):  # each by a profiler of its own: one that records shapes keeps tensors in memory
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
                step()
            for event in profiler.key_averages(group_by_input_shape=True):
                found[kind(event.key, event.input_shapes)] += event.self_cpu_time_total / 1000 / STEPS
            del profiler
    tokens = sum(len(job.rows["sequences"][row]) for row in batch)
    ordered = dict(sorted(found.items(), key=lambda one: -one[1]))
    return {
        "tokens": tokens,
        "step_ms": 1000 * plain,
        "by_kind_ms": {name: round(ms, 2) for name, ms in ordered.items()},
    }


def name_kernels(stack: ExitStack) -> None:
    """Let the profiler see each C kernel by its name."""
    from unittest.mock import patch

    from torch.profiler import record_function

    from capotune.kernels import (
        attention,
        linear,
        native_ops,
        program,
    )

    def named(lib: Any, kernel: str, *sizes: Any, **arguments: Any) -> None:
        with record_function(kernel):
            plain(lib, kernel, *sizes, **arguments)

    plain = native_ops.over_rows
    for module in (attention, native_ops):
        stack.enter_context(patch.object(module, "over_rows", named))
    multiply = linear._multiply

    def multiply_named(*given: Any, **how: Any) -> None:
        with record_function("AMX"):
            multiply(*given, **how)

    stack.enter_context(patch.object(linear, "_multiply", multiply_named))
    stack.enter_context(patch.object(program.Program, "run", run_call_by_call))


def run_call_by_call(program: Any, values: dict[str, int]) -> None:
    """``Program.run``, each call by its name instead of all at once."""
    import ctypes

    import torch
    from torch.profiler import record_function

    from capotune.kernels import abi, policy
    from capotune.kernels import native as native_module

    program._symbols or program._translate()
    fields = program._matrix @ np.array([1, *(values[name] for name in program._symbols[1:])], np.int64)
    names = kernel_names()
    sharer, counts = native_module.library("elementwise_cpu"), (torch.get_num_threads(), policy.ELEMENTS_PER_THREAD)
    call = abi.layout("call")
    for at in range(0, len(program._calls) * call.size, call.size):
        kernel, arguments = (fields[(at + call.offsets[name]) // 8 :] for name in ("kernel", "arguments"))
        arguments[0] -= at  # they are found from the first call on
        with record_function(names[kernel[0]]):
            where = ctypes.c_void_p(fields.ctypes.data + at)
            sharer.run_program(where, ctypes.c_int64(1), native_module.fork_join(), *map(ctypes.c_int64, counts))


def kernel_names() -> dict[int, str]:
    """By address, all that were used."""
    import ctypes

    from capotune.kernels import native as native_module

    names = {}
    for library in ("products_cpu", "elementwise_cpu", "products_amx", "prepacked_amx"):
        kernels = vars(native_module.library(library)) if native_module.library(library) else {}
        for name, kernel in kernels.items():
            if isinstance(kernel, ctypes._CFuncPtr):
                address = ctypes.cast(kernel, ctypes.c_void_p).value
                names[address] = f"AMX: {name}" if library.endswith("_amx") else name
    return names


def main() -> None:
    """Adds one label's profile to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", default="after")
    parser.add_argument("--source", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.source:
        sys.path.insert(0, str(options.source))
    found = {letter: profile_step(letter) for letter in "ad"}
    before = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    options.out.write_text(json.dumps({**before, options.label: found}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
