"""The checksums in an adapter's record: of its weights, of PEFT's configuration, and of the record itself.

Weights that are not those that were written are refused. The two JSON files are small and people edit them (the base's
place, a label's name): that they are not as they were written is said, and they are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capotune.adapters.files import CONFIG, RECORD, WEIGHTS
from capotune.errors import AdapterError
from capotune.models.content import hashed

_KEY = "sha256"


def signed(record: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    """The record with the checksums of the ``files`` by their names, and of itself."""
    known = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return {**record, _KEY: {**known, RECORD: _of_record(record)}}


def signed_again(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record after a change; the other files stay as they are. One without checksums gets none."""
    return {**record, _KEY: {**record[_KEY], RECORD: _of_record(record)}} if _KEY in record else dict(record)


def check(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """What of ``folder`` is not as it was written, a sentence each. ``AdapterError`` where it is the weights. Adapters
    that were written before there were checksums are believed."""
    known: Mapping[str, str] = record.get(_KEY, {})
    if WEIGHTS in known and (found := hashed(folder / WEIGHTS)) != known[WEIGHTS]:
        raise AdapterError(
            f"damaged or incomplete: its SHA-256 is {found[:12]}…, and {known[WEIGHTS][:12]}… was written.",
            where=str(folder / WEIGHTS),
            advice=f"Copy or train the adapter again. Where it was changed on purpose, remove {_KEY!r} from {RECORD}.",
        )
    found_now = {RECORD: _of_record(record)}
    if (folder / CONFIG).is_file():
        found_now[CONFIG] = hashed(folder / CONFIG)
    changed = [name for name, value in found_now.items() if name in known and known[name] != value]
    return [f"{folder / name} is not as it was written: it was edited, or is damaged." for name in changed]


def _of_record(record: Mapping[str, Any]) -> str:
    """Of all that it says but the checksums, however the file is laid out."""
    content = {name: value for name, value in record.items() if name != _KEY}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
