"""What of an adapter leaves this machine when it is pushed: a copy that holds what is needed to use it, and no more.

Settings, the task's own fields, scores and other numbers of the run leave. Names of folders, the data's hash, prompts
that were tried, the name of a text of the user's and golden answers to texts of the user's stay. A copy that names a
home folder or a token all the same, say in a prompt or a chat template, is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
from safetensors.torch import save

from capotune.adapters.card import card
from capotune.adapters.checksums import signed
from capotune.adapters.files import CONFIG, RECORD, WEIGHTS, read_json, read_tensors
from capotune.adapters.store import CARD, FORMAT, StoredAdapter
from capotune.errors import AdapterError, SettingError, quoted
from capotune.models.base import EMBEDDED, existing
from capotune.models.hub import hub_name, peft_base
from capotune.tasks.golden import TEXTS
from capotune.tasks.loading import task_class

_IN_CACHE = re.compile(r"models--([\w.-]+)--([\w.-]+)[/\\]snapshots[/\\](\w+)[/\\]?$")
_OUR_WORDS = {"metric", "held_out_metric", "dtype", "sequences", "blocks", "words"}
"""Texts about a run that this package made."""
_SECRETS = {
    "a token of the hub": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "a home folder": re.compile(r"(?<![\w.])(?:(?:/home/|/Users/|[A-Za-z]:\\Users\\)\w+|/root/\w)"),
}


@dataclass(frozen=True)
class Published:
    """The copy."""

    files: dict[str, bytes]
    """By name."""
    record: dict[str, Any]
    left_out: list[str]
    """What the folder here holds and the copy does not, a few words each."""


def public_base(stored: StoredAdapter, model: str | None) -> str:
    """The name by which others find the adapter's base: ``model``, else what it was trained on.

    Raises ``SettingError`` for a folder, whose name means nothing elsewhere, unless it is one of the hub's cache.
    """
    name = model or str(stored.record["base"]["name"])
    cached = _IN_CACHE.search(name)
    if cached:
        return f"{cached[1]}/{cached[2]}@{cached[3]}"
    if name in EMBEDDED or (hub_name(name) is not None and existing(name) is None):
        return name
    whose = "the adapter's base is" if model is None else ""
    raise SettingError(
        f"{whose} a folder of this machine, which others cannot find.".strip(),
        setting="model",
        given=model,
        advice="Name it as it is on the hub: OWNER/NAME.",
    )


def publish(stored: StoredAdapter, repo: str, base: str, licence: str | None) -> Published:
    """The copy for ``repo``, of an adapter whose base others find as ``base``.

    Raises ``AdapterError`` for one that another program wrote, and for a copy that would name a home folder or a token.
    """
    if stored.is_foreign:
        raise AdapterError(
            "PEFT wrote it, and there is no record to make a card of.",
            where=str(stored.folder),
            advice=f"Upload it as it is: hf upload {repo} {stored.folder}",
        )
    left_out: list[str] = []
    record = _record(stored, base, left_out)
    config = _config(stored, base)
    parameters = sum(tensor.numel() for tensor in stored.tensors.values())
    words = task_class(stored).card(record)
    weights, config_text = _weights(stored), json.dumps(config, indent=2) + "\n"
    record = signed(record, {WEIGHTS: weights, CONFIG: config_text.encode()})
    texts = {
        CONFIG: config_text,
        RECORD: json.dumps(record, indent=2, ensure_ascii=False) + "\n",
        CARD: card(record, words, parameters, config, repo=repo, licence=licence),
    }
    for name, text in texts.items():
        _check_secrets(stored, name, text)
    files = {name: text.encode() for name, text in texts.items()}
    return Published({**files, WEIGHTS: weights}, record, left_out)


def _weights(stored: StoredAdapter) -> bytes:
    """The stored tensors as they are in the file, without what else its header says."""
    return save(read_tensors(stored.folder), metadata={"format": "pt"})


def _record(stored: StoredAdapter, base: str, left_out: list[str]) -> dict[str, Any]:
    known: type[pydantic.BaseModel] = task_class(stored).Record
    ours = [one for one in stored.record.get("golden", []) if one["text"] in TEXTS]
    settings = stored.settings.model_dump(mode="json")
    if settings.get("candidates"):
        settings["candidates"] = None
        left_out.append("the file of candidate prompts")
    if base != stored.record["base"]["name"]:
        left_out.append("the base's folder")
    more = sorted({"data_sha256", "candidates", "adapter"} & stored.record["trained"].keys())
    names = {
        "data_sha256": "the data's hash",
        "candidates": "the prompts that were tried",
        "adapter": "the adapter's folder",
    }
    left_out += [names[name] for name in more]
    golden = len(stored.record.get("golden", [])) - len(ours)
    if golden:
        left_out.append(f"golden answers to {golden} texts that are not capotune's")
    values = {
        **{name: value for name, value in stored.record.items() if name in known.model_fields and name != "sha256"},
        "settings": settings,
        "base": {"name": base, "fingerprint": stored.record["base"]["fingerprint"]},
        "trained": {**dict(_public(stored.record["trained"])), **_combined(stored.record["trained"], left_out)},
        "golden": ours,
        "left_out": left_out,
    }
    return {"format": FORMAT, **values}


def _combined(trained: dict[str, Any], left_out: list[str]) -> dict[str, Any]:
    """How it was combined of other adapters, if it was, without their folders' names and their own records."""
    combined = trained.get("combined")
    if combined is None:
        return {}
    left_out.append("names and records of the adapters that it was combined of")
    weights = [one["weight"] for one in combined["adapters"]]
    named = [{"name": f"adapter {number}", "weight": weight} for number, weight in enumerate(weights, start=1)]
    return {"combined": {**dict(_public(combined)), "method": combined["method"], "adapters": named}}


def _config(stored: StoredAdapter, base: str) -> dict[str, Any]:
    """``adapter_config.json``, which names the base as PEFT finds it."""
    values = read_json(stored.folder, CONFIG)
    own = {name: value for name, value in values.items() if not name.endswith("_path") and name != "revision"}
    return {**own, **peft_base(EMBEDDED[base].hub or base if base in EMBEDDED else base)}


def _public(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Numbers, and numbers in lists and objects; of texts those that this package made."""
    for name, value in values.items():
        if isinstance(value, dict):
            if not value.get("text"):  # else it was measured on a text of the user's, and says its name
                yield name, dict(_public(value))
        elif isinstance(value, str):
            if name in _OUR_WORDS:
                yield name, value
        elif not isinstance(value, list) or all(isinstance(one, (int, float)) for one in value):
            yield name, value


def _check_secrets(stored: StoredAdapter, file: str, text: str) -> None:
    home = str(Path.home())
    own = {"your home folder": re.compile(rf"(?<![\w.]){re.escape(home)}\b")} if len(home) > 1 else {}
    lines = ((f"line {number}", line) for number, line in enumerate(text.splitlines(), start=1))
    places = [*(_texts(json.loads(text), "") if file.endswith(".json") else lines)]
    for what, pattern in {**_SECRETS, **own}.items():
        place = next((place for place, one in places if pattern.search(one)), None)
        if place is not None:
            raise AdapterError(
                f"{what} stands in {place} of the {file} that would be pushed; nothing was.",
                where=str(stored.folder),
                advice="Look for it among labels, prompts and the chat template, and train without it.",
            )


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Every text in a JSON value, names included, as it is without JSON's escapes, each with its place."""
    if isinstance(value, str):
        yield quoted(place), value
    elif isinstance(value, dict):
        for name, one in value.items():
            inside = f"{place}.{name}" if place else name
            yield quoted(inside), name
            yield from _texts(one, inside)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one, place)
