"""Pretrain capo-tiny, the small language model that Capotune carries for text generation.

Its text is what every Python installation carries: the sources of the standard library and its tests, the language
reference behind ``help()``, and the docstrings of modules written in C. Nothing is downloaded. On two CPU cores it
takes about an hour:

    python scripts/pretrain_capo_tiny.py --work /tmp/capo-tiny --compile
    python scripts/pretrain_capo_tiny.py --work /tmp/capo-tiny --compile --resume               # go on after a stop
    python scripts/pretrain_capo_tiny.py --work /tmp/capo-tiny --compile --resume --minutes 30  # and end in time

What it gives up: knowledge of the world, instructions, any language but English and Python. What it aims at: copying a
name from the text before, and following a comment or docstring with code.

- Words never contain a space, so a name has the same tokens after a bracket and after a word.
- In half of the documents of a pass the local names are exchanged for others, so that a name has to be looked up.
- Files that are mostly numbers or not ASCII are left out: they cost tokens and teach neither.

With glibc, a fifth more tokens per second: keep freed memory, with
``GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184``.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import hashlib
import importlib
import json
import keyword
import math
import platform
import pydoc
import random
import re
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"
CONTEXT = 512
SEED = 0
HELD_OUT_EVERY = 50
WARM_UP = 100
DECAY = 0.4
"""Share of a run in which the learning rate goes down."""
EVALUATED = 64
"""Held-out sequences that are scored while training; the final score uses all of them."""
DESTINATION = Path(__file__).parents[1] / "src" / "capotune" / "models" / "embedded" / "capo-tiny"

LEFT_OUT = ("site-packages/", "encodings/", "lib2to3/tests/data/", "pydoc_data/", "_sysconfigdata", "config-")
DOCSTRING_MODULES = """
builtins array binascii cmath collections datetime errno fcntl functools grp itertools math operator os pwd re select
signal socket statistics string struct sys time unicodedata zlib
"""

# A word and a space are separate tokens, so that `xs` is the same after `in ` and after `(`. Short joining words take
# the spaces around them, which keeps texts short. Digits stand alone.
SPLIT = (
    r" (?:a|an|and|are|as|be|by|else|for|from|if|import|in|is|it|not|of|on|or|that|the|this|to|with) (?:the |not |a )?"
    r"|\p{N}|\p{L}+| ?[^\s\p{L}\p{N}]+ ?|\s+"
)


class Document(NamedTuple):
    """A text, where it came from, and whether it is one of the library's tests."""

    name: str
    text: str
    is_test: bool = False


# --- text -------------------------------------------------------------------------------------------------------------


def library_sources() -> list[Document]:
    """The readable Python files of the standard library, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(LEFT_OUT):
            continue
        try:
            text = path.read_text(encoding="utf-8").replace("\r\n", "\n").strip() + "\n"
        except UnicodeDecodeError:  # the tests hold files that are damaged on purpose
            continue
        if is_worth_reading(text):
            # `unittest` and `doctest` count as tests too: they read like them
            found.append(Document(name, text, "test" in name.split("/")[0] or "/test" in name))
    return found


def is_worth_reading(text: str) -> bool:
    """Whether a file is prose or code, not a table of numbers or of foreign characters, nor almost empty."""
    digits = sum(map(str.isdigit, text)) / len(text)
    foreign = sum(not character.isascii() for character in text) / len(text)
    longest = max(map(len, text.splitlines()))
    return len(text) > 200 and digits < 0.12 and foreign < 0.02 and longest < 1000


def documentation() -> list[Document]:
    """The topics of ``help()`` and what ``pydoc`` says about modules whose sources are not Python."""
    topics = importlib.import_module("pydoc_data.topics").topics
    found = [Document(f"topic/{name}", topics[name].strip() + "\n") for name in sorted(topics)]
    for name in DOCSTRING_MODULES.split():
        text = pydoc.plain(pydoc.plaintext.document(importlib.import_module(name)))
        found.append(Document(f"pydoc/{name}", text.replace(" |  ", "    ").strip() + "\n"))
    return found


def without_copies(documents: list[Document]) -> list[Document]:
    """The documents, each text once; spacing does not make another text."""
    seen: dict[str, Document] = {}
    for document in documents:
        seen.setdefault(hashlib.sha256(" ".join(document.text.split()).encode()).hexdigest(), document)
    return list(seen.values())


def local_names(text: str) -> set[str]:
    """Names that a file assigns or takes as arguments; none where it is not Python."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError):
        return set()
    names = {node.arg for node in nodes if isinstance(node, ast.arg)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    fixed = {"self", "cls", "args", "kwargs", "_", *dir(builtins), *keyword.kwlist}
    return {name for name in names - fixed if not name.startswith("__")}


def with_other_names(text: str, names: set[str], pool: list[str], rng: random.Random) -> str:
    """The text with its local names exchanged for others, in code, comments and docstrings alike; attributes stay."""
    words = set(re.findall(r"\w+", text))
    others = [name for name in rng.sample(pool, min(len(pool), 2 * len(names) + 50)) if name not in words]
    table = dict(zip(sorted(names), others, strict=False))
    return re.sub(r"(?<![\w.])[A-Za-z_]\w*", lambda match: table.get(match[0], match[0]), text)


# --- tokens -----------------------------------------------------------------------------------------------------------


def train_tokenizer(documents: list[Document]) -> Tokenizer:
    """Byte-level BPE over the training text; any UTF-8 goes through it and back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    probe = "naïve  façade\t→ 東京 🎸\r\n\n    x1 = {'a b': 2024}  # é <|x|>"
    assert tokenizer.decode(tokenizer.encode(probe).ids) == probe
    return tokenizer


def packed(texts: list[str], tokenizer: Tokenizer) -> torch.Tensor:
    """The texts one after another, each ended by the end token, cut into rows of one more token than the context."""
    end = tokenizer.token_to_id(END)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch_fast(texts):
        ids += [*encoding.ids, end]
    rows = len(ids) // (CONTEXT + 1)
    return torch.tensor(ids[: rows * (CONTEXT + 1)]).view(rows, CONTEXT + 1)


class Corpus:
    """Training and held-out documents, and the rows of each pass. A pass depends on its number alone."""

    def __init__(self) -> None:
        documents = without_copies(documentation() + library_sources())
        self.held_out = documents[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
        held_out = set(self.held_out)
        self.train = [document for document in documents if document not in held_out]
        self.names = {document.name: local_names(document.text) for document in self.train}
        self.pool = sorted(set().union(*self.names.values()))

    def rows(self, number: int, tokenizer: Tokenizer) -> torch.Tensor:
        """Rows of pass ``number``, shuffled. The tests, more than half of all text, are read in every other pass."""
        rng = random.Random(f"{SEED} {number}")
        documents = [document for document in self.train if number % 2 == 0 or not document.is_test]
        rng.shuffle(documents)
        texts = [
            with_other_names(text, self.names[name], self.pool, rng) if rng.random() < 0.5 else text
            for name, text, _ in documents
        ]
        rows = packed(texts, tokenizer)
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(number))]


# --- model and schedule -----------------------------------------------------------------------------------------------


def new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Four layers of 256, 4.0 M parameters: an hour shows them thirty million tokens, a minute fine-tunes them."""
    torch.manual_seed(SEED)
    end, pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=pad,
    )
    return LlamaForCausalLM(config)


def new_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, which learns more per token, AdamW for embeddings and norms."""
    matrices = [value for name, value in model.named_parameters() if value.ndim == 2 and "embed" not in name]
    others = [value for name, value in model.named_parameters() if value.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def lr_factor(step: int, done: float) -> float:
    """Up in the first steps, flat, then straight down to 2 %; ``done`` is the share of the run that is over."""
    return min(1.0, (step + 1) / WARM_UP, max(0.02, (1 - done) / DECAY))


def loss_of(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token, in bf16 where that is safe."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, rows: torch.Tensor, batch: int) -> float:
    """Loss on held-out rows."""
    losses = [loss_of(model, part).item() * len(part) for part in rows.split(batch)]
    return sum(losses) / len(rows)


# --- training ---------------------------------------------------------------------------------------------------------


def save(state: dict[str, Any], path: Path) -> None:
    """Write beside and move, so that a stop while writing leaves the last checkpoint."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def train(options: argparse.Namespace, corpus: Corpus, tokenizer: Tokenizer) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Train to the last step, from a checkpoint where asked; returns the model and the record of the run."""
    model = new_model(tokenizer)
    optimizers = new_optimizers(model, options.lr)
    checkpoint = options.work / "checkpoint.pt"
    per_step = options.batch * options.accumulate
    record: dict[str, Any] = {"step": 0, "pass": 0, "row": 0, "seconds": 0.0, "curve": []}
    record |= {"lr": options.lr, "per_step": per_step, "decay_from": 0}
    if options.resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        record = state["record"]
        per_step = record["per_step"]
    forward = torch.compile(model) if options.compile else model
    held_out = packed([document.text for document in corpus.held_out], tokenizer)
    few = held_out[:: max(1, len(held_out) // EVALUATED)]
    rows = corpus.rows(record["pass"], tokenizer)
    print(f"{len(corpus.train)} documents; {rows.numel():,} tokens in this pass", flush=True)
    started, first, running = time.perf_counter() - record["seconds"], record["step"], 0.0
    here = time.perf_counter()

    def share_done() -> float:
        if options.minutes:
            return (time.perf_counter() - here) / 60 / options.minutes
        return float(record["step"] / options.steps)

    done = share_done()
    while done < 1:
        if record["row"] + per_step > len(rows):
            record |= {"pass": record["pass"] + 1, "row": 0}
            rows = corpus.rows(record["pass"], tokenizer)
        batch = rows[record["row"] : record["row"] + per_step]
        total = 0.0
        for part in batch.split(options.batch):
            loss = loss_of(forward, part) * len(part) / per_step
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = lr_factor(record["step"], done)
        if done < 1 - DECAY:
            record["decay_from"] = record["step"] + 1
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = record["lr"] * factor
            optimizer.step()
            optimizer.zero_grad()
        running = total if running == 0 else 0.98 * running + 0.02 * total
        record["step"] += 1
        record["row"] += per_step
        record["seconds"] = time.perf_counter() - started
        step, done = record["step"], share_done()
        if step % 20 == 0:
            rate = (step - first) / (time.perf_counter() - here)
            left = options.minutes * (1 - done) if options.minutes else (options.steps - step) / rate / 60
            print(
                f"step {step} pass {record['pass']} loss {running:.3f} lr {record['lr'] * factor:.5f} "
                f"{rate * per_step * CONTEXT:,.0f} tokens/s, {left:.0f} min to go",
                flush=True,
            )
        if step % options.every == 0 or done >= 1:
            record["curve"].append([step, running, evaluate(model, few, options.batch)])
            print(f"step {step} held-out loss {record['curve'][-1][2]:.4f}", flush=True)
            states = [optimizer.state_dict() for optimizer in optimizers]
            save({"model": model.state_dict(), "optimizers": states, "record": record}, checkpoint)
    record["held_out_loss"] = evaluate(model, held_out, options.batch)
    record["held_out_tokens"] = held_out.numel()
    return model, record


# --- the folder -------------------------------------------------------------------------------------------------------

CARD = """---
license: apache-2.0
language: [en]
pipeline_tag: text-generation
library_name: transformers
---

# capo-tiny

A language model of {parameters:.1f} M parameters that comes with Capotune, so that text generation can be tried, taught
and tested without a download. Transformers' own `LlamaForCausalLM`, made by `scripts/pretrain_capo_tiny.py`; this page
is by the same script, from what it measured.

**What it cannot do.** It does not know the world. It does not follow instructions. At best it writes plausible-looking
Python and copies names from the text before. It is a base to fine-tune on something small and regular, not a model to
ask. There is no chat template.

## Text

What the installation of Python {python} carries, nothing else: sources of the standard library and of its tests, the
topics of `help()`, docstrings of modules written in C. Left out: `site-packages`, tables of numbers, files with many
characters beyond ASCII, copies.

| | documents | bytes | tokens |
| --- | --- | --- | --- |
| library and documentation | {library_documents:,} | {library_bytes:,} | {library_tokens:,} |
| the library's tests | {test_documents:,} | {test_bytes:,} | {test_tokens:,} |
| held out, every {held_out_every}th document | {held_out_documents:,} | {held_out_bytes:,} | {held_out_tokens:,} |

Read: {tokens_read:,} tokens in {passes:.2f} passes; the tests are read in every other pass. In half of the documents of
a pass, drawn anew, the local names are exchanged for others, so that a name has to be looked up in the text before.

## Tokens

Byte-level BPE, {vocabulary:,} tokens; any UTF-8 goes through it and back. A word never contains a space, so a name has
the same tokens wherever it stands. Digits stand alone. `<|endoftext|>` ends a document and `<|pad|>` fills up.

## Settings

{layers} layers, width {hidden}, {heads} heads over {kv_heads} key-value heads, MLP {mlp}, tied embeddings, context
{context}. {steps:,} steps of {per_step} × {context} tokens; Muon for the matrices (weight decay 0.1), AdamW for the
rest, learning rate {lr}, {warm_up} steps of warm-up, flat, and straight down from step {decay_from:,}; gradients
clipped at norm 1; bf16 autocast; weights stored in bf16. {minutes:.0f} minutes on {threads} threads of a CPU shared
with other work; torch {torch}.

## Loss

Nats per token; training loss as a running mean, held-out loss on one row in {stride} of the held-out text. At the end,
on all of it: **{held_out_loss:.3f}** ({bits_per_byte:.3f} bits per byte).

| step | training | held out |
| --- | --- | --- |
{curve}

## Licence

The weights are under Capotune's licence, Apache-2.0. The text they were trained on is Python's own, © Python Software
Foundation, under the PSF License Version 2 (<https://docs.python.org/3/license.html>); see `NOTICE`.
"""

NOTICE = """capo-tiny was trained on the sources and documentation that come with Python {python}.

Copyright © 2001 Python Software Foundation; All Rights Reserved. The text is used under the PSF License Version 2,
https://docs.python.org/3/license.html. This folder contains weights computed from that text and a tokenizer whose
vocabulary was counted in it; it does not contain the text.

The weights, the tokenizer and the script that made them are licensed under the Apache License, Version 2.0.
"""


def size_of(documents: list[Document], tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Documents, bytes and tokens."""
    tokens = sum(len(encoding.ids) + 1 for encoding in tokenizer.encode_batch_fast([text for _, text, _ in documents]))
    return len(documents), sum(len(document.text.encode()) for document in documents), tokens


def card(model: LlamaForCausalLM, corpus: Corpus, tokenizer: Tokenizer, record: dict[str, Any]) -> str:
    """The model card, from measured numbers."""
    config = model.config
    library = size_of([document for document in corpus.train if not document.is_test], tokenizer)
    tests = size_of([document for document in corpus.train if document.is_test], tokenizer)
    held_out = size_of(corpus.held_out, tokenizer)
    in_pass = library[2] + (tests[2] if record["pass"] % 2 == 0 else 0)
    stride = max(1, len(record["curve"]) // 12)
    shown = record["curve"][:-1:stride] + record["curve"][-1:]
    return CARD.format(
        parameters=sum(value.numel() for value in model.parameters()) / 1e6,
        python=platform.python_version(),
        library_documents=library[0],
        library_bytes=library[1],
        library_tokens=library[2],
        test_documents=tests[0],
        test_bytes=tests[1],
        test_tokens=tests[2],
        held_out_documents=held_out[0],
        held_out_bytes=held_out[1],
        held_out_tokens=held_out[2],
        held_out_every=HELD_OUT_EVERY,
        tokens_read=record["step"] * record["per_step"] * CONTEXT,
        passes=record["pass"] + record["row"] * CONTEXT / in_pass,
        vocabulary=config.vocab_size,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        mlp=config.intermediate_size,
        context=CONTEXT,
        steps=record["step"],
        per_step=record["per_step"],
        lr=record["lr"],
        warm_up=WARM_UP,
        decay_from=record["decay_from"],
        minutes=record["seconds"] / 60,
        threads=torch.get_num_threads(),
        torch=torch.__version__.split("+")[0],
        stride=max(1, record["held_out_tokens"] // (CONTEXT + 1) // EVALUATED),
        held_out_loss=record["held_out_loss"],
        bits_per_byte=record["held_out_loss"] / math.log(2) * held_out[2] / held_out[1],
        curve="\n".join(f"| {step:,} | {training:.3f} | {held:.3f} |" for step, training, held in shown),
    )


def write_folder(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, texts: dict[str, str]) -> None:
    """Everything that Transformers needs, and the texts beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    end, pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    model.to(torch.bfloat16).save_pretrained(folder)
    GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=pad, do_sample=False).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the tokenizer, checkpoint and curve")
    parser.add_argument("--out", type=Path, default=DESTINATION, help="folder for the finished model")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch", type=int, default=8, help="sequences that go through the model at once")
    parser.add_argument("--accumulate", type=int, default=2, help="batches in a step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="fuse the model's operations; needs a C++ compiler")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--minutes", type=float, help="end after these minutes from now, whatever the steps")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    corpus = Corpus()
    vocabulary = options.work / "tokenizer.json"
    if not (options.resume and vocabulary.is_file()):
        train_tokenizer(corpus.train).save(str(vocabulary))
    tokenizer = Tokenizer.from_file(str(vocabulary))
    model, record = train(options, corpus, tokenizer)
    (options.work / "record.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    python = platform.python_version()
    texts = {"README.md": card(model, corpus, tokenizer, record), "NOTICE": NOTICE.format(python=python)}
    write_folder(options.out, model, tokenizer, texts)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
