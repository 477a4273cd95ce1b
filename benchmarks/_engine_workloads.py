"""What ``engine.py`` measures: the workloads, and in each of them who runs on which batches.

Plain data and the standard library alone: the process that starts the others must stay small, since Linux counts what
the starter of a process held into that process's own peak.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

SHARED = Path(__file__).parents[2] / "shared" / "data"
OURS, FLOOR, KERNEL_FLOOR = "capotune", "matrix products alone", "matrix products alone, by capotune's kernels"


@dataclass(frozen=True)
class Contender:
    """One row of a table."""

    name: str
    runner: str
    """Who does it, by a name that ``_engine_process`` knows."""
    options: dict[str, Any] = field(default_factory=dict)
    """What is unlike the runner's defaults."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of its process."""


@dataclass(frozen=True)
class Comparison:
    """Contenders on the same batches of the same rows."""

    name: str
    contenders: tuple[Contender, ...]
    batch_size: int = 8
    grouped: bool = False
    """Rows of like length together (``capotune.data.batches.epoch_order``); otherwise any eight, as they are drawn."""
    rounds: int | None = None
    """As many as the workload's where left out."""

    @property
    def everyone(self) -> tuple[Contender, ...]:
        """The floor, as PyTorch computes it and as capotune's kernels do, and capotune too."""
        first = (Contender(FLOOR, "floor"), Contender(KERNEL_FLOOR, "kernel floor"))
        if not any(one.name == OURS for one in self.contenders):
            first += (Contender(OURS, "capotune"),)
        return first + self.contenders


@dataclass(frozen=True)
class Workload:
    """One job with its settings."""

    letter: str
    title: str
    words: str
    """What is done, for the reader."""
    base: Literal["minilm", "llama"]
    method: Literal["lora", "qlora", "prompt-tuning", "feature-extraction"]
    comparisons: tuple[Comparison, ...]
    learning_rate: float = 1e-3
    steps: int | None = None
    """Optimiser steps in an epoch; None: as many as the rows give."""
    epochs: int = 1
    rounds: int = 3
    whole: bool = False
    """Whether the first step counts: where work is done once for all of them, or there is no other."""
    trainable_layers: int = 0
    tokens: int | None = None
    """Length of every row, where it is not the data's."""
    shape: str = "135m"
    """Of the Llama, by a name in ``SHAPES``."""
    rank: int = 8
    """Of LoRA; alpha is twice as much."""
    rows: int | None = None
    """Most rows of the data, or how many of ``tokens`` there are; None: all, or one."""

    @property
    def classifies(self) -> bool:
        """Whether labels are learned; text otherwise."""
        return self.base == "minilm"

    @property
    def solved(self) -> bool:
        """Whether it is about accuracy at convergence, and not about the same steps."""
        return self.classifies and self.method == "feature-extraction"

    def comparison(self, name: str) -> Comparison:
        """The one of that name."""
        return next(one for one in self.comparisons if one.name == name)

    def data(self) -> Path:
        """Folder of the data set."""
        return SHARED / ("banking77" if self.classifies else "gsm8k")


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 128, "vocab_size": 512, "tie_word_embeddings": True},
    "135m-short": {"hidden_size": 576, "num_hidden_layers": 3, "num_attention_heads": 9, "num_key_value_heads": 3,
                   "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True},
    "135m": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
             "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip
"""Llama's settings: SmolLM-135M's, Llama 3.2 1B's, Llama 3 8B's, and two small ones to try the scripts with."""

LORA = "LoRA of rank 8, alpha 16 on every linear layer, no dropout"
ADAM = (
    "AdamW (0.9, 0.999, 1e-8) without weight decay, gradients clipped at norm 1, a learning rate that falls linearly "
    "to 0, fp32"
)
LLAMA = "A Llama of SmolLM-135M's shape with random weights (30 blocks, hidden 576, 9 heads on 3, vocabulary 49,152)"
SFT = (
    "on records as long as GSM8K's (characters/4 as tokens, ids drawn at random with frequencies like words': no "
    "tokenizer of this vocabulary is at hand), loss on completions alone"
)

QUIET = {"logging_strategy": "no", "dataloader_pin_memory": False}
"""Trainer settings that save a little time on a CPU."""
TRAINER = Contender("PEFT + Trainer", "trainer")
HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**23), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""What capotune asks of glibc by itself: that memory which one tensor leaves goes to the next."""
TUNED = Contender("PEFT + Trainer, tuned", "trainer", {"arguments": QUIET}, HEAP)
BF16_PRODUCTS = Contender(
    "PEFT + Trainer, tuned, bf16 products", "trainer", {"arguments": QUIET, "precision": "medium"}, HEAP
)
"""With ``torch.set_float32_matmul_precision("medium")``."""
TRL = Contender("TRL SFTTrainer", "trl")
TRL_TUNED = Contender("TRL SFTTrainer, tuned", "trl", {"arguments": {**QUIET, "gradient_checkpointing": False}}, HEAP)
LIGER = Contender("PEFT + Trainer + Liger", "liger")
UNSLOTH = Contender("Unsloth", "unsloth")
CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}

AS_IT_COMES, GROUPED = "as it comes", "tuned"

WORKLOADS = (
    Workload(
        "a",
        "Banking77, LoRA",
        f"MiniLM (22.6M) with a linear head, {LORA}; all 10,003 rows once (or the steps that the "
        "tables name), learning rate 2e-4. "
        f"{ADAM}. As it comes: "
        "batches of 8, drawn at random, one round. Tuned: batches of 32, rows of like length together, glibc told to "
        "keep memory.",
        "minilm",
        "lora",
        (Comparison(AS_IT_COMES, (TRAINER,), rounds=1), Comparison(GROUPED, (TUNED, BF16_PRODUCTS), 32, grouped=True)),
        learning_rate=2e-4,
        rounds=2,
    ),
    Workload(
        "b",
        "Banking77, frozen backbone to convergence",
        "MiniLM frozen, a linear head. capotune: features of every layer computed once (nothing cached before), the "
        "regularisation chosen on held-out training rows, the head solved. As it comes: Trainer over the frozen "
        "backbone, batches of 8, until the test accuracy has not risen for 3 epochs, 8 at most; its time ends with "
        "its best epoch; learning rate 1e-2. Tuned: last-layer features computed once by "
        "hand, standardised, scikit-learn's LogisticRegression.",
        "minilm",
        "feature-extraction",
        (
            Comparison(
                AS_IT_COMES,
                (Contender("Trainer", "head", {"learning_rate": 1e-2}),),
            ),
            Comparison(GROUPED, (Contender("cached features + scikit-learn", "sklearn"),)),
        ),
        epochs=8,
        rounds=2,
        whole=True,
    ),
    Workload(
        "c",
        "Banking77, prompt tuning, 60 steps",
        "MiniLM with a linear head, 20 virtual tokens, learning rate 1e-3 (at 1e-2, Adam soon makes large differences "
        f"of the last digits'). {ADAM}. Batches as in (a).",
        "minilm",
        "prompt-tuning",
        (Comparison(AS_IT_COMES, (TRAINER,)), Comparison(GROUPED, (TUNED,), 32, grouped=True)),
        learning_rate=1e-3,
        steps=60,
    ),
    Workload(
        "d",
        "135M Llama, LoRA, completions",
        f"{LLAMA}, {SFT}; {LORA}, batches of 8, learning rate 2e-3. {ADAM}. Tuned: rows of like length together, glibc "
        "told to keep memory; TRL without the gradient checkpointing that it comes with.",
        "llama",
        "lora",
        (
            Comparison(AS_IT_COMES, (TRAINER, TRL, LIGER, UNSLOTH)),
            Comparison(GROUPED, (TUNED, TRL_TUNED, BF16_PRODUCTS), grouped=True),
        ),
        learning_rate=2e-3,
        steps=5,
        rounds=2,
    ),
    Workload(
        "e",
        "135M Llama, QLoRA (NF4), completions",
        "As (d), over NF4 in blocks of 64 with double quantisation, computing in fp32; the peers' base is "
        "bitsandbytes'. TRL would turn LoRA's weights into bf16 here, which is undone so that losses compare.",
        "llama",
        "qlora",
        (
            Comparison(AS_IT_COMES, (TRAINER, TRL, UNSLOTH)),
            Comparison(GROUPED, (TUNED, TRL_TUNED), grouped=True),
        ),
        learning_rate=2e-3,
        steps=5,
        rounds=2,
    ),
    Workload(
        "f",
        "135M Llama, the last 2 blocks",
        f"{LLAMA}, {SFT}; the last two blocks and the norm train, 64 rows, 3 epochs, batches of 8, learning rate 1e-4. "
        f"{ADAM}. capotune's computing of the frozen blocks is in its time; a second run (another learning rate, say) "
        "finds them in the cache.",
        "llama",
        "feature-extraction",
        (
            Comparison(AS_IT_COMES, (Contender("Trainer", "trainer"),)),
            Comparison(
                "a second run on the same rows",
                (Contender(OURS, "capotune", {"second_run": True}), Contender("Trainer", "trainer")),
                rounds=1,
            ),
        ),
        learning_rate=1e-4,
        steps=8,
        epochs=3,
        rounds=2,
        whole=True,
        trainable_layers=2,
    ),
    Workload(
        "g",
        "135M Llama, LoRA, 4,096 tokens: memory",
        f"{LLAMA}; one step of one record of 4,096 tokens, all but the first 64 learned; {LORA}.",
        "llama",
        "lora",
        (
            Comparison(AS_IT_COMES, (TRAINER,), batch_size=1),
            Comparison(
                "with gradient checkpointing",
                (
                    Contender(OURS, "capotune", {"gradient_checkpointing": True}),
                    Contender("PEFT + Trainer", "trainer", {"arguments": CHECKPOINTED}),
                    Contender("TRL SFTTrainer", "trl", {"arguments": {"max_length": 4096}}),
                ),
                batch_size=1,
            ),
        ),
        learning_rate=2e-4,
        steps=1,
        rounds=2,
        whole=True,
        tokens=4096,
    ),
)


GPU_TRAINER = Contender("PEFT + Trainer", "trainer", {"arguments": {"logging_strategy": "no"}})
GPU_PEERS = (GPU_TRAINER, Contender("TRL SFTTrainer", "trl", {"arguments": {"gradient_checkpointing": False}}), LIGER)
ON_A_GPU = f"rank 16, alpha 32 on every linear layer, bf16, ids drawn at random; {ADAM.replace('fp32', 'bf16')}"

GPU_WORKLOADS = (
    Workload(
        "8b-lora", "8B Llama, LoRA, 4,096 tokens", f"Llama 3 8B's shape, random weights; LoRA of {ON_A_GPU}.",
        "llama", "lora", (Comparison(AS_IT_COMES, GPU_PEERS, batch_size=2),),
        learning_rate=2e-4, steps=5, rounds=1, tokens=4096, rows=10, shape="8b", rank=16,
    ),
    Workload(
        "8b-qlora", "8B Llama, QLoRA (NF4), 4,096 tokens", f"Llama 3 8B's shape, random weights; QLoRA of {ON_A_GPU}.",
        "llama", "qlora", (Comparison(AS_IT_COMES, GPU_PEERS, batch_size=2),),
        learning_rate=2e-4, steps=5, rounds=1, tokens=4096, rows=10, shape="8b", rank=16,
    ),
    Workload(
        "135m-lora", "135M Llama, LoRA, completions", f"{LLAMA}, {SFT}; LoRA of {ON_A_GPU}.",
        "llama", "lora", (Comparison(AS_IT_COMES, GPU_PEERS, batch_size=8),),
        learning_rate=2e-4, steps=30, rounds=1, rank=16,
    ),
    Workload(
        "8b-lora-lengths", "8B Llama, LoRA, completions", f"Llama 3 8B's shape, {SFT}; LoRA of {ON_A_GPU}.",
        "llama", "lora", (Comparison(GROUPED, GPU_PEERS, batch_size=32, grouped=True),),
        learning_rate=2e-4, steps=5, rounds=1, shape="8b", rank=16,
    ),
    Workload(
        "8b-qlora-memory", "8B Llama, QLoRA (NF4), one row of 2,048 tokens: memory",
        f"Llama 3 8B's shape, random weights; QLoRA of {ON_A_GPU}; gradient checkpointing.",
        "llama", "qlora",
        (
            Comparison(
                "with gradient checkpointing",
                (
                    Contender(OURS, "capotune", {"gradient_checkpointing": True}),
                    Contender("PEFT + Trainer", "trainer", {"arguments": CHECKPOINTED}),
                ),
                batch_size=1,
            ),
        ),
        learning_rate=2e-4, steps=2, rounds=1, tokens=2048, rows=2, shape="8b", rank=16,
    ),
    Workload(
        "1b-lora", "1B Llama, LoRA, 4,096 tokens", f"Llama 3.2 1B's shape, random weights; LoRA of {ON_A_GPU}.",
        "llama", "lora", (Comparison(AS_IT_COMES, GPU_PEERS, batch_size=4),),
        learning_rate=2e-4, steps=8, rounds=1, tokens=4096, rows=32, shape="1b", rank=16,
    ),
)  # fmt: skip
"""What ``scripts/gpu_check.py`` runs, most telling first. Too much for a CPU."""


def workload(letter: str, *, quick: bool = False, steps: int | None = None) -> Workload:
    """The one of that letter; ``quick`` shows that it works and measures nothing worth knowing."""
    found = next(one for one in (*WORKLOADS, *GPU_WORKLOADS) if one.letter == letter)
    if quick and found in GPU_WORKLOADS:
        found = replace(found, steps=2, shape="tiny", tokens=found.tokens and 96)
    elif quick:
        few = None if found.solved else min(found.steps or 3, 3)
        found = replace(found, steps=few, rounds=1, shape="135m-short", epochs=min(found.epochs, 2), rows=770)
    return replace(found, steps=steps) if steps and not found.solved else found
