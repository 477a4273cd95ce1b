"""A merged model, whatever the adapter: written into a folder, and read back to be asked.

A LoRA delta or a trained block is put into the base's tensors as they go from file to file (``adapters.merge``). What
else PEFT trains, a classifier of Transformers among it, is put into the model in memory, which Transformers then saves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from capotune import methods
from capotune.adapters.assemble import assemble, attach
from capotune.adapters.merge import check_mergeable, write_merged
from capotune.adapters.store import StoredAdapter, check_base, put_on, read_adapter, save_adapter
from capotune.device import pick_device
from capotune.errors import AdapterError, SettingError
from capotune.events import Reporter, bytes_as_progress, ignore
from capotune.methods.base import Start
from capotune.methods.peft.method import Peft
from capotune.models.base import Base, quiet
from capotune.models.load import load_causal_lm, load_classifier
from capotune.models.quantize import copy_other_files, write_config
from capotune.models.shards import DTYPES
from capotune.settings import Context
from capotune.tasks.loading import load_adapter, task_class, task_on

HEAD = "adapter"
"""Folder of a merged model's head."""


def check_can_merge(stored: StoredAdapter, base: Base, requantize: bool, report: Reporter = ignore) -> None:
    """Raises ``SettingError`` when it cannot be merged so, ``AdapterError`` when the base is another one."""
    if not _in_memory(stored):
        check_mergeable(stored, base, requantize, report)
        return
    check_base(stored, base, report)
    if stored.settings.virtual_tokens:
        raise SettingError(
            "it puts vectors before a text, which no weights of the base can stand for.",
            where=str(stored.folder),
            advice="Use it as it is.",
        )
    if requantize or base.is_quantized:
        raise SettingError(
            "it changes more than linear layers, and is merged into a base in full precision alone.",
            where=str(stored.folder),
            advice="Give such a base with `model`, and no `requantize`; `capo quantize` quantizes the merged model.",
        )


def write_merged_model(
    stored: StoredAdapter, base: Base, merged: Base, *, requantize: bool, report: Reporter
) -> tuple[int, list[str]]:
    """Write the model into the existing folder of ``merged``, a head of ours into an adapter inside it.

    Returns how many layers changed, and what the user should know, a sentence each. Raises as ``check_can_merge``.
    """
    check_can_merge(stored, base, requantize)
    if _in_memory(stored):
        changed = _write_from_memory(stored, base, merged)
    else:
        changed = write_merged(stored, base, merged.folder, requantize=requantize, progress=bytes_as_progress(report))
    notices = task_on(stored, base).write_merged_files(merged.folder)
    if task_class(stored).has_head and not stored.is_foreign:
        _save_head(stored, merged)
    return changed, notices


def on_merged_weights(stored: StoredAdapter, base: Base, requantize: bool) -> StoredAdapter:
    """The adapter as it answers on the weights that it is merged into: one that was trained over 4 bits does so over
    full precision, unless the sum is quantized again."""
    if requantize or base.is_quantized:
        return stored
    return replace(stored, settings=stored.settings.over_full_precision)


def load_merged_model(stored: StoredAdapter, merged: Base) -> Any:
    """The model that was written, read back from disk, with its head."""
    if not task_class(stored).has_head:
        return load_causal_lm(merged, dtype=stored.dtype)
    if stored.is_foreign:
        return load_classifier(merged, merged.config, frozenset(), dtype=stored.dtype)
    return load_adapter(read_adapter(merged.folder / HEAD), model=str(merged.folder), device=pick_device()).model


def _in_memory(stored: StoredAdapter) -> bool:
    deltas = methods.get(stored.settings.method).low_rank(stored.settings, stored.tensors)
    return stored.is_foreign and (deltas is None or task_class(stored).has_head)


def _write_from_memory(stored: StoredAdapter, base: Base, merged: Base) -> int:
    """By Transformers' own ``save_pretrained``, in the dtype that the base is stored in."""
    task = task_on(stored, base)
    assembled = assemble(task, stored.settings, device=torch.device("cpu"))
    put_on(stored, assembled)
    model, method = assembled.model, assembled.method
    assert isinstance(method, Peft)
    try:
        changed = method.write_into_base()
    except AdapterError as error:
        raise AdapterError(error.problem, where=str(stored.folder), advice="Use it as it is.") from None
    model.to(DTYPES[max(base.tensors, key=lambda one: one.nbytes).dtype])
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise AdapterError(
                f"{name} would hold values that are NaN or infinite in {str(weight.dtype).removeprefix('torch.')}.",
                where=str(stored.folder),
                advice="Merge into a copy of the base in float32.",
            )
    stated = {"architectures": [type(model).__name__], **_as_tied(model)}
    if task.has_head:
        stated |= {"id2label": model.config.id2label, "label2id": model.config.label2id}
    with quiet():
        model.save_pretrained(merged.folder)
    copy_other_files(base, merged.folder)
    write_config(merged.folder, base, None, **stated)
    return changed


def _as_tied(model: Any) -> dict[str, bool]:
    """What the configuration must say where the output layer no longer has the embedding's weight."""
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if output is None or not model.config.tie_word_embeddings or output.weight is embedding.weight:
        return {}
    if torch.equal(output.weight, embedding.weight):
        output.weight = embedding.weight
        return {}
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    return {"tie_word_embeddings": False}


def _save_head(stored: StoredAdapter, merged: Base) -> None:
    """A task's head as an adapter of the ``merged`` base.

    The head was trained on the last layer; the stored one reads every layer and weighs all but the last with zero.
    """
    task = task_class(stored).restore(merged, stored.record)
    context = Context(merged.hidden_size, has_head=True)
    settings = methods.get("feature-extraction").Settings(trainable_layers=0).completed(context)  # type: ignore[call-arg]
    assembled = assemble(task, settings, device=torch.device("cpu"))
    prefix = methods.get(stored.settings.method).key_prefix
    with torch.no_grad():
        for path, weight in task.head_parameters(assembled.model).items():
            trained = stored.tensors[prefix + path]
            weight.zero_()
            weight[..., -trained.shape[-1] :] = trained
    attach(assembled, Start(torch.Generator()))
    save_adapter(merged.folder / HEAD, assembled, stored.record["trained"])
