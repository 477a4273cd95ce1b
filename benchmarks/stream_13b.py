"""A model of Llama-2-13B's shapes on a machine that could not hold it: streamed into 4 bits, and one QLoRA step.

    python benchmarks/stream_13b.py [--scale 1.0] [--folder DIR] [--out benchmarks/results/stream-13b.json]

Random bf16 weights are written as safetensors shards into a temporary folder (26 GB at full scale; ``--folder`` says on
which disk), loaded through Capotune's own loader, and trained for one step of 512 tokens through its own loop's parts:
method attached, forward, loss on the labels, backward, AdamW. A thread notes this process's memory all the while.
``--scale 0.1`` makes a tenth of the blocks, in a tenth of the time, with tensors as large as the real ones.

Written: seconds of each phase, the memory curve, and a picture of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from capotune.adapters.assemble import describe
from capotune.device import compute_dtype, cpu_level
from capotune.engine.loop import checkpointing
from capotune.kernels import native as native_module
from capotune.kernels.cross_entropy import linear_cross_entropy
from capotune.methods import make
from capotune.methods.base import Start
from capotune.methods.qlora.settings import QloraSettings
from capotune.models.base import Base, Quantization
from capotune.models.load import load_causal_lm
from capotune.models.shard_writer import Plan, ShardWriter
from capotune.models.stream import empty_model

BLOCKS, TOKENS, LIMIT_GIB = 40, 512, 12
EVERY = 0.2  # seconds between two looks at the memory


class Watch:
    """Resident memory of this process over time, and when each phase began and ended."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.curve: list[tuple[float, float]] = []
        self.phases: list[dict[str, Any]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(EVERY):
            self.note()

    def note(self) -> None:
        self.curve.append((round(time.perf_counter() - self.start, 2), round(resident_gib(), 3)))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        self.note()
        yield
        self.note()
        ended = time.perf_counter()
        peak = max(memory for at, memory in self.curve if at >= round(began - self.start, 2))
        self.phases.append(
            {
                "phase": name,
                "from": round(began - self.start, 2),
                "seconds": round(ended - began, 2),
                "peak_gib": peak,
                "end_gib": self.curve[-1][1],
            }
        )
        print(
            f"{name:24} {ended - began:8.1f} s   peak {peak:6.2f} GiB   after {self.curve[-1][1]:6.2f} GiB", flush=True
        )

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


def resident_gib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def config(scale: float) -> LlamaConfig:
    """Llama-2-13B's shapes; ``scale`` shortens the stack of blocks."""
    return LlamaConfig(
        vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=max(1, round(BLOCKS * scale)),
        num_attention_heads=40, num_key_value_heads=40, max_position_embeddings=4096, rms_norm_eps=1e-5,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip


def write_model(folder: Path, shapes: LlamaConfig) -> int:
    """Random bf16 shards, a tensor at a time; returns the bytes written."""
    from transformers import AutoModelForCausalLM

    shapes.save_pretrained(folder)
    sizes = {name: tuple(weight.shape) for name, weight in empty_model(AutoModelForCausalLM, shapes).named_parameters()}
    plans = [[Plan.of(name, "BF16", shape)] for name, shape in sizes.items()]
    with ShardWriter(folder, plans) as writer:
        for name, shape in sizes.items():
            weight = torch.empty(shape, dtype=torch.bfloat16)
            writer.write(name, weight.fill_(1) if len(shape) == 1 else weight.normal_(0, 0.02))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def train_step(model: Any, watch: Watch, keep_activations: bool) -> dict[str, float]:
    """QLoRA on every linear layer: attach, forward, loss, backward, one step of AdamW.

    Unless ``keep_activations``, a block's activations are computed again in the backward pass (Chen et al. 2016), as
    ``capo train --gradient-checkpointing`` does: kept, those of 40 blocks would take some 5.5 GiB at 512 tokens.
    """
    settings = QloraSettings().completed("generation", model.config.hidden_size)
    method = make(settings)
    with watch.phase("attach adapters"):
        method.attach(model, describe(model, model.base_model_prefix), Start(torch.Generator().manual_seed(0)))
        parameters = list(method.parameters().values())
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate)
    ids = torch.randint(0, model.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with checkpointing([] if keep_activations else model.base_model.layers):
        with watch.phase("forward"):
            states = model.base_model(input_ids=ids).last_hidden_state[0]
            head = model.get_output_embeddings().weight
            loss = linear_cross_entropy(states[:-1], head, None, ids[0, 1:]).mean()
        with watch.phase("backward"):
            loss.backward()
    with watch.phase("optimizer step"):
        optimizer.step()
    assert bool(torch.isfinite(loss))
    changed = sum(int(weight.abs().sum() > 0) for key, weight in method.parameters().items() if ".lora_B." in key)
    return {"loss": loss.item(), "adapter_weights": sum(weight.numel() for weight in parameters), "changed_b": changed}


def picture(record: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*record["curve"], strict=True), color="black", linewidth=1.2)
    for number, phase in enumerate(record["phases"]):
        axes.axvspan(
            phase["from"], phase["from"] + phase["seconds"], color=f"C{number}", alpha=0.2, label=phase["phase"]
        )
    axes.axhline(LIMIT_GIB, color="red", linestyle="--", linewidth=1, label=f"limit, {LIMIT_GIB} GiB")
    axes.set(xlabel="seconds", ylabel="resident memory, GiB", ylim=(0, None))
    axes.set_title(f"{record['parameters'] / 1e9:.1f}B weights: load into 4 bits, one QLoRA step of {TOKENS} tokens")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="where the model is written for as long as this runs")
    parser.add_argument("--keep-activations", action="store_true", help="do not compute blocks again for backward")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stream-13b.json")
    options = parser.parse_args()
    shapes = config(options.scale)
    folder = Path(tempfile.mkdtemp(prefix="capotune-13b-", dir=options.folder))
    watch = Watch()
    try:
        room = shutil.disk_usage(folder).free
        needs = 2 * (2 * 32000 * 5120 + shapes.num_hidden_layers * (4 * 5120**2 + 3 * 5120 * 13824))
        if room < 1.05 * needs:
            raise SystemExit(
                f"{folder}: {room / 1e9:.0f} GB free, {needs / 1e9:.0f} GB needed. Give --folder or --scale."
            )
        with watch.phase("write random shards"):
            on_disk = write_model(folder, shapes)
        gc.collect()
        dtype = compute_dtype(torch.device("cpu"), packed=True)
        with watch.phase("load into 4 bits"):
            model = load_causal_lm(Base("13b", folder), dtype=dtype, quantization=Quantization("nf4", 64, True))
        step = train_step(model, watch, options.keep_activations)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        watch.stop()
    peak = max(memory for _, memory in watch.curve)
    record = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "system": platform.platform(),
            "simd": cpu_level(),
            "threads": torch.get_num_threads(),
            "c_kernels": native_module.library("nf4_cpu") is not None,
        },
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "blocks": shapes.num_hidden_layers,
        "parameters": on_disk // 2,
        "bytes_on_disk": on_disk,
        "compute_dtype": str(dtype).removeprefix("torch."),
        "tokens": TOKENS,
        "activations": "kept" if options.keep_activations else "computed again",
        "peak_gib": peak,
        "limit_gib": LIMIT_GIB,
        **step,
        "phases": watch.phases,
        "curve": watch.curve,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record) + "\n")
    picture(record, options.out.with_suffix(".png"))
    print(f"peak {peak:.2f} GiB of {LIMIT_GIB}; {options.out}")


if __name__ == "__main__":
    main()
