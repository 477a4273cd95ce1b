"""A model with a head for labels or tags as one ONNX graph: base, adapter and head, and a soft prompt as constants.

    model.onnx       input_ids, attention_mask (rows, tokens) int64, padded on the right → logits (rows, labels),
                     or (rows, tokens, tags); any number of rows, any length that the base takes. Of pairs of texts
                     also token_type_ids (rows, tokens) int64, where the base reads them
    tokenizer.json   for the library tokenizers: it cuts to the trained length and pads
    config.json      the base's, with the labels as ``id2label`` and what else tells how logits are read: problem_type,
                     thresholds of several labels, margins of numbers

PyTorch's exporter by ``torch.export`` writes it. The older one, by TorchScript, is five times as fast and gives the
same logits, but it is deprecated since PyTorch 2.9, and what it traced for one shape it may have fixed for all.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from capotune.adapters.assemble import Assembled
from capotune.data.batches import collate
from capotune.errors import AdapterError, needs_extra
from capotune.events import nothing
from capotune.files import write_atomic
from capotune.methods.base import Untouched
from capotune.models.base import Base, first_line
from capotune.tasks.loading import dequantize_layers

MODEL, TOKENIZER, CONFIG = "model.onnx", "tokenizer.json", "config.json"
LARGEST_DIFFERENCE = 1e-4
"""Of a logit, beside the largest one; more is refused."""
_ONE_FILE = 1_800_000_000
"""Bytes of weights from which on they stand in a file of their own: protobuf ends at 2 GiB."""
_ROWS = 8
"""Rows of a batch that is compared: such as differ in length, so that padding is tested."""
_NOT_CARRIED = ("quantization_config", "auto_map", "_name_or_path")


class Graph(nn.Module):
    """What is written: ids and mask → logits. ``prompt`` are ids of virtual tokens before each row."""

    def __init__(self, model: Any, prompt: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.prompt = torch.tensor([list(prompt)], dtype=torch.long)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """(rows, tokens) each → (rows, labels), or (rows, tokens, tags)."""
        count = self.prompt.shape[1]
        typed = {} if token_type_ids is None else {"token_type_ids": functional.pad(token_type_ids, (count, 0))}
        if count:
            prompt = self.prompt.expand(input_ids.shape[0], -1)
            input_ids = torch.cat([prompt, input_ids], 1)
            attention_mask = torch.cat([torch.ones_like(prompt), attention_mask], 1)
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **typed).logits
        return logits if logits.dim() == 2 else logits[:, count:]


def check_libraries() -> None:
    """``MissingLibraryError`` unless what writes and runs a graph is there."""
    with needs_extra("onnx"):
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    assert onnxruntime.InferenceSession


def write_onnx(assembled: Assembled, folder: Path) -> None:
    """Write an adapter that is on its base into ``folder``. It is merged in memory for that, and stays so."""
    assembled.method.merge()
    dequantize_layers(assembled)
    graph = Graph(assembled.model.float().cpu(), assembled.method.virtual_token_ids).eval()
    try:
        _trace(graph, folder / MODEL, typed=assembled.task.reads_token_types)
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise AdapterError(
            f"PyTorch cannot write a {type(assembled.model).__name__} on this base as a graph: {first_line(cause)}",
            where=assembled.base.name,
            advice="Give `loader=transformers`: the merged base, with the head as an adapter of it.",
        ) from error
    _write_tokenizer(assembled, folder)
    _write_config(assembled.base, assembled.task, folder)


def _trace(graph: Graph, path: Path, *, typed: bool) -> None:
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    weights = sum(one.nbytes for one in graph.parameters())
    same = torch.export.Dim.DYNAMIC  # the mask's axes are those of the ids: named once
    names = ["input_ids", "attention_mask", *["token_type_ids"] * typed]
    with torch.no_grad(), _without_chatter():
        torch.onnx.export(
            graph,
            (ids, (ids > 0).long(), (ids > 2).long())[: len(names)],
            str(path),
            dynamo=True,
            input_names=names,
            output_names=["logits"],
            dynamic_shapes={name: {0: same, 1: same} for name in names} | {"input_ids": {0: "rows", 1: "tokens"}},
            external_data=weights > _ONE_FILE,
            verbose=False,
        )


@contextlib.contextmanager
def _without_chatter() -> Any:
    """PyTorch's exporter prints, logs and warns of its own parts."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [one.level for one in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for one in loggers:
            one.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for one, level in zip(loggers, before, strict=True):
                one.setLevel(level)


def _write_tokenizer(assembled: Assembled, folder: Path) -> None:
    """The tokenizer with the trained length and padding. ``ModelError`` for one that is written in Python."""
    from tokenizers import Tokenizer

    task, base = assembled.task, assembled.base
    fast = getattr(base.tokenizer, "backend_tokenizer", None)
    if fast is None:
        raise base.error(f"its tokenizer ({type(base.tokenizer).__name__}) is written in Python.")
    own = Tokenizer.from_str(fast.to_str())
    own.enable_truncation(task.max_length)
    own.enable_padding(pad_id=task.pad_id, pad_token=own.id_to_token(task.pad_id) or "")
    own.save(str(folder / TOKENIZER))


def _write_config(base: Base, task: Any, folder: Path) -> None:
    values = {name: value for name, value in base.config_values.items() if name not in _NOT_CARRIED}
    values["id2label"] = {str(at): label for at, label in enumerate(task.labels)}
    values["label2id"] = {label: at for at, label in enumerate(task.labels)}
    values |= task.graph_facts()
    write_atomic(folder / CONFIG, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def answers_of_base(assembled: Assembled, sequences: list[list[int]]) -> Tensor:
    """Logits of the head on the base alone, as ``logits_of_ids`` gives them. The adapter is taken off."""
    assembled.method.detach()
    assembled.task.prompt_attached(assembled.model, 0)
    alone = replace(assembled, method=Untouched(assembled.method.quantization))
    logits: Tensor = alone.task.logits_of_ids(alone, sequences)
    return logits


def read_onnx(folder: Path, sequences: list[list[int]], pad_id: int, alive: Callable[[], object] = nothing) -> Tensor:
    """Logits of ONNX Runtime for token ids, in batches that are padded: as ``logits_of_ids`` gives them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])
    found = []
    for start in range(0, len(sequences), _ROWS):
        alive()
        rows = np.arange(start, min(start + _ROWS, len(sequences)))
        batch = collate(sequences, rows, pad_id)
        assert batch.attention_mask is not None
        given = {name: values.numpy() for name, values in batch.inputs.items()}
        logits = torch.from_numpy(session.run(["logits"], given)[0])
        found.append(logits if logits.dim() == 2 else batch.flat(logits))
    return torch.cat(found)


def check_tokens(folder: Path, base: Base, texts: Sequence[str]) -> None:
    """``AdapterError`` unless the written tokenizer makes the tokens of the base's own."""
    from tokenizers import Tokenizer

    written = Tokenizer.from_file(str(folder / TOKENIZER))
    written.no_truncation()
    written.no_padding()
    for text in texts:
        alone = written.encode(text).ids != base.tokenizer(text, verbose=False)["input_ids"]
        if alone or written.encode(text, text).ids != base.tokenizer(text, text, verbose=False)["input_ids"]:
            raise AdapterError(f"the written {TOKENIZER} makes other tokens of {text!r} than the base's tokenizer.")


def check_logits(expected: Tensor, found: Tensor) -> float:
    """Largest difference, beside the largest logit where that is above 1. ``AdapterError`` where it is no rounding."""
    difference = float((expected - found).abs().max() / expected.abs().max().clamp(min=1))
    if not difference <= LARGEST_DIFFERENCE:
        raise AdapterError(
            f"ONNX Runtime's logits differ from the adapter's by {difference:.3g}, where {LARGEST_DIFFERENCE:g} would "
            "be rounding.",
            advice="It was not written. Please report this, with the base's name and the command.",
        )
    return difference
