"""Several adapters of one base made into one (``adapters.combine``), and written as any other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from capotune import methods
from capotune.adapters.assemble import Assembled, assemble
from capotune.adapters.combine import Combined, Deltas, combine
from capotune.adapters.files import WEIGHTS
from capotune.adapters.store import StoredAdapter, check_base, find_base, put_on, read_adapter, save_adapter
from capotune.conversion_settings import CombineSettings
from capotune.data.wording import shorten
from capotune.device import pick_device
from capotune.errors import AdapterError, SettingError
from capotune.events import Reporter, Stage, Warned, alive
from capotune.files import check_free
from capotune.methods.base import Method
from capotune.methods.lora.settings import LoraSettings
from capotune.tasks.golden import golden_answers
from capotune.tasks.loading import task_class, task_on
from capotune.text import words

_SCORED = ("train_rows", "metric", "score")
"""What is stored of how each of the adapters was trained."""
MOST_PORTABLE_RANK = 64
"""Above it some of the programs that serve adapters have to be told, or do not take one."""


def combine_adapters(settings: CombineSettings, report: Reporter) -> dict[str, Any]:
    """Write the adapters of ``settings`` as one into ``settings.out``; returns what was done.

    Raises ``AdapterError`` for adapters that cannot be combined, and says why; ``SettingError`` for settings that do
    not fit them.
    """
    _check_settings(settings)
    check_free(settings.out)
    adapters = [read_adapter(folder) for folder in settings.adapters]
    deltas = [_deltas(one) for one in adapters]
    first = next((one for one in adapters if not one.is_foreign), adapters[0])
    notices = [*(text for one in adapters for text in one.notices)]
    notices += [text for one in adapters if one is not first for text in _check_fit(first, one)]
    for text in dict.fromkeys(notices):
        report(Warned(text=text))
    report(Stage(text="combining"))
    combined = combine(deltas, settings, alive(report))
    assembled = _assembled(first, adapters, combined, settings, report)
    trained = _trained(first, adapters, combined, settings)
    report(Stage(text="writing"))
    save_adapter(settings.out, assembled, trained, golden_answers(assembled))
    if combined.rank > MOST_PORTABLE_RANK:
        report(Warned(text=_too_wide(combined.rank)))
    return {
        "out": str(settings.out),
        "base": assembled.base.name,
        "layers": len(combined.layers),
        **trained["combined"],
    }


def _check_settings(settings: CombineSettings) -> None:
    count = len(settings.adapters)
    if count < 2:
        given = settings.adapters[0] if settings.adapters else "none"
        raise SettingError(f"two adapters or more are combined, and {given} was given.")
    if settings.weights and len(settings.weights) != count:
        given = " ".join(f"{weight:g}" for weight in settings.weights)
        raise SettingError(
            f"there are {count} adapters.", setting="weights", given=given, allowed=f"{count} numbers, in their order"
        )
    if settings.rank is not None and settings.method == "linear":
        raise SettingError(
            "linear writes the exact sum, whose rank is the sum of the ranks.",
            setting="rank",
            given=settings.rank,
            advice="Give `method=svd`, which rounds the sum to a rank.",
        )


def _deltas(stored: StoredAdapter) -> Deltas:
    """``AdapterError`` for an adapter that is more than LoRA deltas, and a head."""
    method, where = methods.get(stored.settings.method), str(stored.folder)
    try:
        found = method.low_rank(stored.settings, stored.tensors)
    except AdapterError as error:
        raise AdapterError(error.problem, where=where, advice=error.advice) from None
    if found is None:
        holds = "it holds more than" if stored.is_foreign else f"{stored.settings.method} has no"
        raise AdapterError(
            f"{holds} LoRA deltas of linear layers, which alone can be added up.",
            where=where,
            advice="Combine adapters of lora or qlora; `capotune.load_adapters` holds any kinds side by side.",
        )
    if any(one.magnitude is not None for one in found.values()):
        raise AdapterError(
            "it was trained with dora, which rescales whole rows of its base's weights: that is no LoRA delta.",
            where=where,
            advice="Train it without `dora`; or write it into its base with `capo merge`.",
        )
    return found


def _check_fit(first: StoredAdapter, other: StoredAdapter) -> list[str]:
    """What the user should know of how the two differ. ``AdapterError`` where they cannot be one adapter."""
    where = str(other.folder)
    one, two = (stored.record["base"]["fingerprint"] for stored in (first, other))
    if not other.is_foreign and one != two:
        raise AdapterError(
            f"it belongs to another base than {first.folder}: '{other.base}' (fingerprint {two[:12]}…), not "
            f"'{first.base}' ({one[:12]}…). A change of one base's weights means nothing on another's.",
            where=where,
            advice="Combine adapters of one base.",
        )
    task = task_class(first)
    if other.task != first.task:
        raise AdapterError(
            f"this adapter {task_class(other).gives}, and {first.folder} {task.gives}.",
            where=where,
            advice="Combine adapters of one task.",
        )
    try:
        differing = [] if other.is_foreign else task.check_combines(first.record, other.record)
    except AdapterError as error:
        raise AdapterError(error.problem, where=where, advice=error.advice) from None
    notices = [f"{words(name)} differs: the combined adapter has that of {first.folder}." for name in differing]
    quantized = [methods.make(stored.settings).quantization or "full precision" for stored in (first, other)]
    if quantized[0] != quantized[1]:
        notices.append(
            f"{other.folder} was trained over {quantized[1]}, and the combined adapter is for a base in "
            f"{quantized[0]}, as {first.folder}."
        )
    return notices


def _assembled(
    first: StoredAdapter,
    adapters: Sequence[StoredAdapter],
    combined: Combined,
    settings: CombineSettings,
    report: Reporter,
) -> Assembled:
    """The base with the combined adapter on it, which is asked as the ``first`` one."""
    base = find_base(first, settings.model, trust_remote_code=settings.trust_remote_code, report=report)
    check_base(first, base, report)
    task = task_on(first, base)
    made = _made(first.settings, combined.rank)
    assembled = assemble(task, made, device=pick_device(), dtype=first.dtype)
    architecture = assembled.architecture
    lacking = sorted(combined.layers.keys() - set(architecture.linears))
    if lacking:
        raise AdapterError(
            f"'{base.name}' has no linear layer {shorten(lacking, 3)} that an adapter of them changes.",
            advice="Combine adapters of one base.",
        )
    everywhere = combined.layers.keys() == set(architecture.linears)
    targets = ["all-linear"] if everywhere else architecture.short_names(combined.layers)
    made = made.model_copy(update={"target_modules": tuple(targets)})
    assembled = replace(assembled, method=methods.make(made))
    tensors = {f"{Method.key_prefix}{path}.lora_{side}.weight": tensor for path, one in combined.layers.items()
               for side, tensor in (("A", one.a), ("B", one.b))}  # fmt: skip
    heads = _heads(adapters, settings.factors, assembled)
    put_on(StoredAdapter(settings.out, made, first.record, tensors | heads), assembled)
    return assembled


def _made(first: Any, rank: int) -> LoraSettings:
    """LoRA of that rank with alpha/rank 1, over what the first adapter was trained over."""
    kind = type(first) if isinstance(first, LoraSettings) else LoraSettings
    over = {name: getattr(first, name) for name in kind.model_fields.keys() - LoraSettings.model_fields.keys()}
    return kind(rank=rank, alpha=float(rank), **over)


def _heads(
    adapters: Sequence[StoredAdapter], weights: Sequence[float], assembled: Assembled
) -> dict[str, torch.Tensor]:
    """The weighted mean of the adapters' heads, each label's row with the others of that label.

    A head is no change of the base that could be added: twice the same head would give twice as large logits.
    """
    task, total = assembled.task, sum(weights)
    if not task.has_head:
        return {}
    if total <= 0:
        raise SettingError(
            "heads for labels are averaged by them, so their sum must be above 0.",
            setting="weights",
            given=" ".join(f"{weight:g}" for weight in weights),
        )
    rows = [task.rows_of_labels(one.record) for one in adapters]
    found = {}
    for path in task.head_parameters(assembled.model):
        own = [one.tensors[Method.key_prefix + path][row] for one, row in zip(adapters, rows, strict=True)]
        shares = torch.tensor(weights).div(total).view(-1, *[1] * own[0].dim())
        found[Method.key_prefix + path] = (shares * torch.stack(own)).sum(0)
    return found


def _trained(
    first: StoredAdapter, adapters: Sequence[StoredAdapter], combined: Combined, settings: CombineSettings
) -> dict[str, Any]:
    """What the record says in place of a training."""
    randomly = settings.method.startswith("dare")
    return {
        "train_rows": sum(one.record["trained"].get("train_rows", 0) for one in adapters),
        "train_seconds": sum(one.record["trained"].get("train_seconds") or 0.0 for one in adapters),
        "test_rows": 0,
        "dtype": first.record["trained"].get("dtype", "float32"),
        "combined": {
            "method": settings.method,
            "rank": combined.rank,
            "held": combined.held,
            **({} if settings.method in ("linear", "svd") else {"density": settings.density}),
            **({"seed": settings.seed} if randomly else {}),
            "adapters": [_named(one, weight) for one, weight in zip(adapters, settings.factors, strict=True)],
        },
    }


def _named(stored: StoredAdapter, weight: float) -> dict[str, Any]:
    """One of the adapters, by its folder's name, not its place, and by content."""
    folder = stored.folder.resolve()
    return {
        "name": folder.parent.name if folder.name == "adapter" else folder.name,
        "weight": weight,
        "sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        "method": stored.settings.method,
        "settings": {} if stored.is_foreign else stored.record["settings"],
        "trained": {name: value for name, value in stored.record["trained"].items() if name in _SCORED},
    }


def _too_wide(rank: int) -> str:
    return (
        f"its rank is {rank}, and not every program that serves adapters takes more than {MOST_PORTABLE_RANK}; "
        "method svd with a rank makes it less."
    )
