"""Memory of QLoRA's base from a GGUF file: the most that loading adds, against the result and its largest tensor.

    python benchmarks/gguf_memory.py [--out benchmarks/results/gguf-memory.json]

SmolLM2-135M-Instruct (Q4_1), and a file of Llama-3.2-1B's widths with four blocks and random bytes (Q4_0). Each is
loaded in 4 bits with an empty cache, so that it is quantized, and again from the cache, every time in a process of its
own. *Added* is the peak of the resident set less what was resident before; *largest* is the largest tensor in fp32. The
limit is the result and two of the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from capotune.device import environment
from capotune.models.base import embedded_file

RESULTS = Path(__file__).parent / "results" / "gguf-memory.json"
HIDDEN, INNER, HEADS, KV_HEADS, BLOCKS, VOCABULARY = 2048, 8192, 32, 8, 4, 32_000


def write_wide(path: Path) -> None:
    """A Llama of Llama-3.2-1B's widths with few blocks; its quantised values are random and finite."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(2048)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    letters = pre_tokenizers.ByteLevel.alphabet()
    writer.add_token_list([*letters, *(f"t{number}" for number in range(VOCABULARY - len(letters)))])
    writer.add_token_merges(["t 1"])
    generator = np.random.default_rng(0)

    def add(name: str, rows: int, columns: int) -> None:
        raw = generator.integers(0, 256, (rows, columns // 32, 18), dtype=np.uint8)
        raw[:, :, :2] = np.frombuffer(np.float16(0.01).tobytes(), dtype=np.uint8)  # a block's scale
        writer.add_tensor(name, raw.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    add("token_embd.weight", VOCABULARY, HIDDEN)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, dtype=np.float32))
    narrow = HIDDEN // HEADS * KV_HEADS
    for block in range(BLOCKS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{norm}.weight", np.ones(HIDDEN, dtype=np.float32))
        for name, rows, columns in (
            ("attn_q", HIDDEN, HIDDEN), ("attn_k", narrow, HIDDEN), ("attn_v", narrow, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN), ("ffn_gate", INNER, HIDDEN), ("ffn_up", INNER, HIDDEN),
            ("ffn_down", HIDDEN, INNER),
        ):  # fmt: skip
            add(f"blk.{block}.{name}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(path: str) -> dict[str, float]:
    """Load the file in 4 bits in this process: bytes resident before, added at the peak, of result and largest."""
    from capotune.device import peak_memory_bytes
    from capotune.models.base import Quantization, find
    from capotune.models.load import load_causal_lm

    base = find(path)
    pages, start = int(Path("/proc/self/statm").read_text().split()[1]), time.perf_counter()
    model = load_causal_lm(base, quantization=Quantization("nf4", 64, True))
    added, seconds = peak_memory_bytes() - pages * os.sysconf("SC_PAGE_SIZE"), time.perf_counter() - start
    stored = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    result, largest = sum(stored.values()), max(one.nbytes for one in base.tensors)
    return {
        "added": added, "result": result, "largest": largest, "limit": result + 2 * largest, "seconds": seconds,
        "whole": base.tensors.nbytes,
    }  # fmt: skip


def measure(path: Path) -> dict[str, Any]:
    """First with an empty cache, then with what that left."""
    with tempfile.TemporaryDirectory() as cache:
        here = os.environ | {"CAPOTUNE_CACHE": cache}
        command = [sys.executable, __file__, "--load", str(path)]
        found = {}
        for name in ("first", "again"):
            done = subprocess.run(command, env=here, check=True, capture_output=True, text=True)
            found[name] = json.loads(done.stdout.splitlines()[-1])
            megabytes = {key: round(value / 1e6) for key, value in found[name].items() if key != "seconds"}
            print(path.name, name, megabytes, f"{found[name]['seconds']:.1f} s", flush=True)
        found["on_disk"] = sum(one.stat().st_size for one in Path(cache, "models").rglob("*") if one.is_file())
        return found


def main() -> None:
    """Measure, and write ``results/gguf-memory.json``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        print(json.dumps(load(given.load)))
        return
    with tempfile.TemporaryDirectory() as folder:
        wide, smollm2 = Path(folder, "llama-1b-widths.Q4_0.gguf"), embedded_file("smollm2")
        write_wide(wide)
        files = [wide] if smollm2 is None else [smollm2, wide]
        content = {"environment": environment(), "files": {path.name: measure(path) for path in files}}
    given.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
