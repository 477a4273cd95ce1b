"""Shared by the tests of generation: a tokenizer made here, small data, a base with a method on it, and its logits."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from capotune.adapters.assemble import Assembled, assemble, attach
from capotune.data.batches import Encoded, TokenRows, sorted_order
from capotune.data.samples import Conversation, Pair, Sample, Samples
from capotune.data.table import Origin
from capotune.evaluation.forward import Examples
from capotune.methods.base import Start
from capotune.models.base import find
from capotune.settings import Context, TrainingSettings
from capotune.tasks.generation import Generation

CHATML = (
    "{% if tools %}{{ '<|im_start|>system\\nTools:' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""As many models write a conversation."""
THINKING = (
    "{% set asked = namespace(at=0) %}"
    "{% for one in messages %}{% if one.role == 'user' %}{% set asked.at = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' and loop.index0 < asked.at %}{{ message.content.split('</think>')[-1] }}"
    "{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The same, but what the model thought is left out of answers that a question follows."""

END, PAD, BOS, TURN, TURN_END = "<|endoftext|>", "<|pad|>", "<|start|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END, PAD, BOS, TURN, TURN_END)
COLOURS = {"grass": "green", "snow": "white", "the sun at noon": "yellow", "a ripe tomato": "a deep dark red"}
CORPUS = [f"What colour is {thing}? It is {colour}." for thing, colour in COLOURS.items()] + [
    "system user assistant please tell me now my friend",
    "Once upon a time there was a parcel. It was late, and nobody knew where it was.\n\n",
]


def make_tokenizer(
    *, pad: str | None = PAD, eos: str | None = END, chat_template: str | None = None, bos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 350 tokens; with ``bos`` it puts one before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=352, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL.index(BOS))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, bos_token=BOS if bos else None, model_max_length=96
    )
    made.chat_template = chat_template
    return made


def with_tokenizer(base: Path, folder: Path, **options: Any) -> Path:
    """A copy of ``base`` with another tokenizer, made by ``make_tokenizer``."""
    shutil.copytree(base, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    make_tokenizer(**options).save_pretrained(folder)
    return folder


def change_config(folder: Path, **values: Any) -> None:
    """Set values in ``config.json``, and where it is there in ``generation_config.json``."""
    for path in (folder / "config.json", folder / "generation_config.json"):
        if path.is_file():
            path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


# Samples and what they become


def turn(role: str, content: str, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def samples_of(*samples: Sample) -> Samples:
    """As read from a file, a line each."""
    return Samples(list(samples), list(range(1, len(samples) + 1)), Origin("data.jsonl"), "messages", ("messages",))


def make_task(base: Path, max_length: int | None = None, **options: Any) -> Generation:
    """The task on a base; ``options`` as ``generation_task`` takes them."""
    return Generation.on(find(str(base)), max_length, 0, **options)


def encode(task: Generation, sample: Sample) -> list[Encoded]:
    return task.encode(samples_of(sample))[0]


def encode_one(task: Generation, sample: Sample) -> Encoded:
    """For samples that become one sequence."""
    (one,) = encode(task, sample)
    return one


def learned_parts(task: Generation, one: Encoded) -> list[str]:
    """The text of each run of learned tokens, special tokens shown."""
    parts: list[list[int]] = []
    before = -100
    for label in one.labels:
        if label != -100:
            parts = [*parts, []] if before == -100 else parts
            parts[-1].append(label)
        before = label
    return [task.tokenizer.decode(part) for part in parts]


def pairs(count: int, seed: int = 0) -> list[Pair]:
    """Questions with a sentence of varied length before them; the thing they ask for decides the answer."""
    chooser = random.Random(seed)
    things = list(COLOURS)
    return [
        Pair(
            f"{' '.join(chooser.choices(['please', 'tell', 'me', 'now', 'my', 'friend'], k=chooser.randint(0, 6)))} "
            f"What colour is {things[number % len(things)]}?\n",
            COLOURS[things[number % len(things)]],
        )
        for number in range(count)
    ]


def conversation(number: int, turns: int = 1) -> Conversation:
    """Questions about things, from the ``number``-th on, each with its answer."""
    things = [list(COLOURS)[(number + at) % len(COLOURS)] for at in range(turns)]
    asked = [(turn("user", f"What colour is {thing}?"), turn("assistant", COLOURS[thing])) for thing in things]
    return Conversation((turn("system", f"You are friend {number}."), *(one for both in asked for one in both)))


# A base with a method on it


def on_base(
    base: Path,
    settings: TrainingSettings | None,
    *,
    seed: int = 0,
    attached: bool = True,
    dtype: torch.dtype = torch.float32,
    words: str = "my friend, what colour is it?",
    max_length: int | None = None,
) -> Assembled:
    """A fresh copy of ``base`` with the method on it."""
    source = find(str(base))
    complete = None if settings is None else settings.completed(Context(source.hidden_size, has_head=False))
    virtual = 0 if complete is None else complete.virtual_tokens
    task = Generation.on(source, max_length, virtual)
    assembled = assemble(task, complete, device=torch.device("cpu"), dtype=dtype)
    if attached:
        tokens = task.tokenizer(words, add_special_tokens=False)["input_ids"]
        attach(assembled, Start(torch.Generator().manual_seed(seed), tokens))
    return assembled


def examples(assembled: Assembled, count: int = 40, seed: int = 0) -> Examples:
    """Pairs as they are trained on."""
    return as_examples(assembled, pairs(count, seed))


def as_examples(assembled: Assembled, samples: Sequence[Sample]) -> Examples:
    """Samples as they are trained on, after the method's virtual tokens."""
    task = assembled.task
    encoded = [one for of_sample in task.encode(samples_of(*samples)) for one in of_sample]
    rows = TokenRows([one.ids for one in encoded], task.pad_id, assembled.method.virtual_token_ids)
    return Examples(rows, [one.labels for one in encoded])


def sequences(count: int, seed: int = 0, longest: int = 20) -> list[list[int]]:
    """Random tokens that are not special, of many lengths."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, longest, (count,), generator=generator).tolist()
    return [torch.randint(len(SPECIAL), 350, (size,), generator=generator).tolist() for size in sizes]


@torch.no_grad()
def logits(assembled: Assembled, rows: list[list[int]] | None = None) -> torch.Tensor:
    """Logits (tokens of all rows, vocabulary) from padded batches; those at a soft prompt's tokens are left out."""
    chosen = TokenRows(rows or sequences(9, seed=3), assembled.task.pad_id, assembled.method.virtual_token_ids)
    skipped = len(chosen.prefix)
    found: dict[int, torch.Tensor] = {}
    for numbers in sorted_order(chosen.lengths, token_budget=100):
        batch = chosen.batch(numbers)
        out = assembled.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        found |= {row: one[skipped : chosen.lengths[row]] for row, one in zip(numbers.tolist(), out, strict=True)}
    return torch.cat([found[row] for row in sorted(found)])


def with_plain_head(assembled: Assembled, plain: bool) -> Assembled:
    """The same with or without the short way from states to losses."""
    return replace(
        assembled, task=replace(assembled.task, objective=replace(assembled.task.objective, plain_head=plain))
    )


# Files


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def document(path: Path, sentences: int = 140) -> Path:
    """A plain text of sentences that differ in a number."""
    things = list(COLOURS)
    lines = [(number, things[number % len(things)]) for number in range(sentences)]
    text = "".join(f"Once upon a time, on day {number}, {thing} was {COLOURS[thing]}.\n" for number, thing in lines)
    path.write_text(text, encoding="utf-8")
    return path
