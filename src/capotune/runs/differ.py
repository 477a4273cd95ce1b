"""What differs between two adapters: settings, sizes, their changes of the base, and their answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from capotune import methods
from capotune.adapters.deltas import Norms, compare, compare_blocks
from capotune.adapters.store import StoredAdapter, read_adapter
from capotune.conversion_settings import DiffSettings
from capotune.device import pick_device
from capotune.errors import SettingError
from capotune.evaluation.agreement import loss_of
from capotune.evaluation.divergence import compare_logits
from capotune.events import Reporter, Stage
from capotune.methods.base import LowRank
from capotune.runs.asking import ask, ask_with_and_without, rows_to_ask
from capotune.tasks.loading import load_adapter, task_class

_Found = Mapping[str, LowRank] | None
"""Of an adapter, its deltas by their layers' paths."""


def diff(settings: DiffSettings, report: Reporter) -> dict[str, Any]:
    """Compare two adapters. Raises ``SettingError`` for rows that cannot be asked of both."""
    one, other = (
        read_adapter(folder, allow_different_base=settings.allow_different_base)
        for folder in (settings.adapter, settings.other)
    )
    deltas = [methods.get(stored.settings.method).low_rank(stored.settings, stored.tensors) for stored in (one, other)]
    same = _same_base(one, other, settings.model) and _same_shapes(*deltas)
    found: dict[str, Any] = {
        "adapters": [str(settings.adapter), str(settings.other)],
        "bases": [{**stored.record["base"], "name": stored.base} for stored in (one, other)],
        "same_base": same,
        "differing": _differing(one, other),
        "trained_weights": [_weights(stored) for stored in (one, other)],
        "bytes": [stored.nbytes for stored in (one, other)],
        "deltas": _deltas(*deltas) if same else None,
    }
    if settings.data is not None:
        _check_comparable(one, other, same)
        found["answers"] = _answers(one, other, settings, report)
    return found


def _differing(one: StoredAdapter, other: StoredAdapter) -> dict[str, list[Any]]:
    """Of what the records say of task, method and settings, and of how the task is asked, that which is not equal."""
    first, second = (_said(stored) for stored in (one, other))
    return {
        name: [first.get(name), second.get(name)] for name in {**first, **second} if first.get(name) != second.get(name)
    }


def _said(stored: StoredAdapter) -> dict[str, Any]:
    facts = {} if stored.is_foreign else task_class(stored).facts(stored.record)
    return {"task": stored.task, "method": stored.settings.method, **facts, **stored.record["settings"]}


def _weights(stored: StoredAdapter) -> int:
    return methods.get(stored.settings.method).trained_count(stored.settings, stored.tensors)


def _same_base(one: StoredAdapter, other: StoredAdapter, model: str | None) -> bool:
    """By content; where another program wrote one of them and noted none, by name, or both are of the ``model`` that
    the user names."""
    if one.is_foreign or other.is_foreign:
        return model is not None or one.base == other.base
    return bool(one.record["base"]["fingerprint"] == other.record["base"]["fingerprint"])


def _same_shapes(first: _Found, second: _Found) -> bool:
    """Of the layers that both change."""
    if first is None or second is None:
        return True
    return all(first[path].shape == second[path].shape for path in first.keys() & second.keys())


def _deltas(first: _Found, second: _Found) -> dict[str, Any] | None:
    """Norms and angles; None where one of them has no LoRA deltas."""
    if first is None or second is None:
        return None
    blocks = compare_blocks(first, second)
    magnitudes = any(delta.magnitude is not None for deltas in (first, second) for delta in deltas.values())
    return {
        **_described(compare(first, second)),
        "blocks": [{"block": block, **_described(norms)} for block, norms in blocks.items()],
        "magnitudes": magnitudes,
    }


def _described(norms: Norms) -> dict[str, Any]:
    return {"norms": [norms.one, norms.other], "cosine": norms.cosine, "degrees": norms.degrees}


def _answers(one: StoredAdapter, other: StoredAdapter, settings: DiffSettings, report: Reporter) -> dict[str, Any]:
    """How far the distributions of both are apart on the rows, as the first one's task reads them."""
    report(Stage(text="asking the first adapter and the base"))
    on_base = load_adapter(one, model=settings.model, device=pick_device(), report=report)
    rows = rows_to_ask(on_base.task, settings.data)
    first, alone = ask_with_and_without(on_base, rows, report)
    report(Stage(text="asking the second adapter"))
    task = on_base.task
    del on_base
    there = load_adapter(other, model=settings.model, device=pick_device(), report=report).model
    second = ask(task, there, rows, report)
    near = compare_logits(first, second)
    return {
        "data": str(settings.data),
        "rows": len(rows),
        **asdict(near),
        "to_base": [compare_logits(alone, answers).kl_divergence for answers in (first, second)],
        "losses": [loss_of(rows, answers) for answers in (alone, first, second)],
    }


def _check_comparable(one: StoredAdapter, other: StoredAdapter, same_base: bool) -> None:
    """``SettingError`` where the answers are not to one question."""
    problem = None
    if one.task != other.task:
        problem = f"one {task_class(one).gives}, the other {task_class(other).gives}"
    elif not same_base:
        problem = "they are of different bases"
    elif one.record.get("labels") != other.record.get("labels"):
        problem = "their labels differ"
    elif one.settings.virtual_tokens or other.settings.virtual_tokens:
        problem = "vectors before a text give it other positions"
    if problem is not None:
        raise SettingError(
            f"the answers cannot be compared: {problem}.",
            setting="data",
            given=None,
            advice="Leave it out; `capo evaluate` scores each of them.",
        )
