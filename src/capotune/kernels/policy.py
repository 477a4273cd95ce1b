"""Every threshold of the engine, with its evidence: when which way is taken, and how much is done at once.

None changes what is computed, but for the last bits. Most were measured, on two cores ("log" is docs/log.md). Read
them as ``policy.NAME``, so that one place says what holds. Sizes that the kernels' code is built of (tiles, lanes, the
ranks that registers hold) stand with that code, in C and in the Triton modules.
"""

from __future__ import annotations

__all__ = [
    "ABSMAX_PER_THREAD", "BF16_HIDDEN_SIZE", "DEQUANTIZE_PER_THREAD", "ELEMENTS_PER_THREAD", "FEW_ROWS",
    "GENERATE_TOKENS_AT_ONCE", "HEAD_FEATURES", "HUGE_PAGES_FROM_BYTES", "INFERENCE_TOKENS_AT_ONCE",
    "INFERENCE_TOKENS_AT_ONCE_ON_GPU", "LEAVING_FROM_ROWS", "LOGITS_AT_ONCE", "LOGITS_AT_ONCE_IN_LENT_MEMORY",
    "PREPACKED_BYTES",
    "PREPACKED_BYTES_WITH_AMX", "PREPACKED_FP32_LEVELS", "PREPARED_STRIPS_OUTPUTS", "QUANTIZE_AT_ONCE",
    "QUANTIZE_PER_THREAD", "QUANTIZE_SAVED_FROM_ELEMENTS", "QUANTIZE_SAVED_FROM_TOKENS", "REDUCED_PRECISION_ROWS",
    "SHORT_ATTENTION_HEAD_SIZE", "SHORT_ATTENTION_LENGTH",
]  # fmt: skip

# ------------------------------------------------------------------------------------------------------------- threads

ELEMENTS_PER_THREAD = 2**15
"""Elements that are worth a thread of PyTorch's pool: 10 to 30 µs of work, where waking one that waits for work costs
some 5. log: from 2¹⁸ on twice the time for a small model's; 2¹³ and 2¹⁴ no difference."""
QUANTIZE_PER_THREAD, ABSMAX_PER_THREAD, DEQUANTIZE_PER_THREAD = 2**18, 2**16, 2**22
"""Elements that are worth a new thread in 4-bit conversion: about a millisecond's work, where starting one costs some
50 µs."""

# ---------------------------------------------------------------------------------------------------------- precision

REDUCED_PRECISION_ROWS = 48
"""Rows of activations from which products run on AMX or with prepacked weights. log: below, a product waits for the
weight, and PyTorch's reads it as fast."""
FEW_ROWS = 64
"""Rows up to which a LoRA layer that only computes forward takes PyTorch's products for its delta too. log: a delta of
one row takes 13 µs instead of 46, of 64 rows half."""
PREPARED_STRIPS_OUTPUTS = 1536
"""Outputs up to which a gradient is split for AMX once for all of them: MiniLM's widest layer. Beyond, as in a
vocabulary, a part of them at a time. The log has no measurement between the two."""
QUANTIZE_SAVED_FROM_TOKENS = 2048
"""Tokens in one backward pass from which saved activations are quantised. log: at 4,096 tokens 3.07 GB instead of 4.20
and no slower (135M Llama); from 512 on 3 to 20 % slower for 5 % less memory."""
QUANTIZE_SAVED_FROM_ELEMENTS = 2**16
"""Elements of a saved activation below which there is little to save: 128 KiB."""
BF16_HIDDEN_SIZE = 1024
"""Hidden size from which a model in 4 bits computes in bf16 on a CPU that has it. log: at 64 to 256 no faster, and
oneDNN keeps about a gigabyte of code for all the shapes it meets."""

# ------------------------------------------------------------------------------------------------------------- memory

PREPACKED_BYTES = 2**28
"""Most bytes of all prepacked weights of a model, without AMX: two layouts of fp32, 33 million weights. log: a fifth
less of a step of MiniLM."""
PREPACKED_BYTES_WITH_AMX = 2**30
"""The same with AMX, where a weight takes 2 bytes: BERT-base fits. Such machines are servers. log: BERT-base with LoRA
117 ms a step instead of 211, for 0.3 GB more."""
PREPACKED_FP32_LEVELS = ("avx2",)
"""CPU levels at which products of prepacked fp32 weights beat PyTorch's. log, "AVX2": a fifth less of a step of MiniLM
on Zen 3. Measured for no other level."""
LOGITS_AT_ONCE = 2**23
"""Logits in one chunk of the output layer's cross-entropy: 32 MiB in fp32. log: 2²⁴ and 2²⁵ no difference, since new
pages cost what fewer passes over the weight save."""
LOGITS_AT_ONCE_IN_LENT_MEMORY = 2**25
"""The same where memory is lent again and again. log: the output layer's two products of 680 tokens take 119 ms instead
of 167."""
MAPPED_FROM_BYTES, MAPPED_FROM_BYTES_SPARING = 2**23, 2**20
"""Size of a tensor from which glibc maps its memory and gives it back at once, the second with gradient checkpointing.
``execution.reusing_memory`` says what was measured: 5 to 10 % of a step, half the memory."""
QUANTIZE_AT_ONCE = 2**22
"""Elements that 4-bit conversion in plain PyTorch works on at once: its temporaries are a few times 16 MB."""
HUGE_PAGES_FROM_BYTES = 2**25
"""Size of a new buffer from which 2 MiB pages are asked for: glibc maps such a request anew each time, so that every
page of it faults on first use, most of the time of a dequantisation of 180 MB (``nf4_cpu.c``)."""
HEAD_FEATURES = 8192
"""Most features a row that a linear head reads: those of all rows are in memory at once, 320 MB for 10,000 rows."""

# ------------------------------------------------------------------------------------------------------- tokens at once

INFERENCE_TOKENS_AT_ONCE = 768
"""Tokens in one batch where nothing trains, on a CPU: what a layer writes is still in its caches when the next reads
it. log: features of 31,500 tokens in 1.75 s instead of 3.4 with 4,096; 1,024 and 1,300 no difference."""
INFERENCE_TOKENS_AT_ONCE_ON_GPU = 4096
"""The same on a GPU, which needs much work at once to be busy. Not measured in steps."""
GENERATE_TOKENS_AT_ONCE = 8192
"""Tokens of one batch of generated text, prompts and beams included: bounds the memory of keys and values, 0.6 GB for a
Llama of 1B in bf16. Not measured in steps."""
LEAVING_FROM_ROWS = 8
"""Prompts from which rows leave their batch when they are done, for which the model is tried on six tokens first."""
SHORT_ATTENTION_LENGTH = 512
"""Tokens of a sequence up to which the attention in C is used. log: half of PyTorch's time up to 512."""
SHORT_ATTENTION_HEAD_SIZE = 128
"""Head size up to which it is used; larger ones were not measured."""
