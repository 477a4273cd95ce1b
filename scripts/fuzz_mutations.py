"""Changes that a fuzzer makes to JSON and to safetensors files, so that more of them are read beyond their start."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 64, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "..", "../../x", "/etc/passwd", "\u0000", "\ud800", "a" * 300, "(a+)+$", "[", ".*", "{{ 1 }}", "{% for %}",
    [], [[]], [0], [1, 2], ["a"], {}, {"a": 1}, {"": {}}, [None], "lora", "LORA", "IA3", "qlora", "float16", "load",
    "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "TRAINABLE_TOKENS", "SEQ_CLS", "token-classification", "default",
]  # fmt: skip
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "F3",
    "C64",
    "",
]


def odd_value(chooser: random.Random) -> Any:
    """One of ``ODD``, of its own: what is put into it stays out of the next."""
    return copy.deepcopy(chooser.choice(ODD))


def mutate_json(data: bytes, seed: int) -> bytes:
    """JSON with one to three values changed, moved, doubled, removed or wrapped; other bytes as they are."""
    chooser = random.Random(seed)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return data
    for _ in range(chooser.choice([1, 1, 1, 2, 3])):
        values = _changed(values, chooser)
    try:
        text = json.dumps(values)
    except (ValueError, RecursionError):
        return data
    if chooser.random() < 0.02 and isinstance(values, dict) and values:  # a name twice
        text = f"{text[:-1]}, {text[1:]}"
    return text.encode(errors="surrogatepass")


def mutate_safetensors(data: bytes, seed: int) -> bytes:
    """A safetensors file with its header changed, its tensors' bytes, or what the header says of its length."""
    chooser = random.Random(seed)
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], bytearray(data[8 + length :])
    kind = chooser.random()
    if kind < 0.1:
        lie = chooser.choice([0, 1, max(0, length - 1), 2**31, 2**63])
        return lie.to_bytes(8, "little") + data[8:]
    if kind < 0.25 and rest:
        at = chooser.randrange(len(rest))
        rest[at : at + 4] = chooser.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff" * 4, b""])
    elif kind < 0.65:
        header = _tensor_changed(header, chooser)
    else:
        header = mutate_json(header, seed)
    return len(header).to_bytes(8, "little") + header + bytes(rest)


def _tensor_changed(header: bytes, chooser: random.Random) -> bytes:
    """The header with one tensor's dtype, shape, place or name changed."""
    try:
        values = json.loads(header)
        name = chooser.choice([name for name in values if name != "__metadata__"])
        one = values[name]
        kind = chooser.randrange(6)
        if kind == 0:
            one["dtype"] = chooser.choice(DTYPES)
        elif kind == 1:
            at = chooser.randrange(max(1, len(one["shape"])))
            one["shape"][at : at + 1] = [chooser.choice([0, 1, 2, -1, 2**31, 2**62, 2**63, 0.5, "1"])] * chooser.choice(
                [0, 1, 2]
            )
        elif kind == 2:
            at = chooser.randrange(2)
            one["data_offsets"][at] += chooser.choice([1, -1, 4, -4, 64, 2**31, 2**63])
        elif kind == 3:
            values["_".join(chooser.choice([[name, "x"], ["x"], [".."], [name.replace("lora_A", "lora_B")]]))] = one
        elif kind == 4:
            new = name.replace("layers.3", chooser.choice(["layers.9", "layers.2", "..", "layers.3.base_layer"]))
            values[new.replace("lora_A", chooser.choice(["lora_A", "lora_B", "lora_magnitude_vector", "ia3_l"]))] = (
                values.pop(name)
            )
        else:
            del values[name]
        return json.dumps(values).encode()
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return header


def _changed(values: Any, chooser: random.Random) -> Any:
    """The values with one of them, at any depth, changed."""
    places = list(_places(values))
    if not places:
        return odd_value(chooser)
    holder, key = chooser.choice(places)
    kind = chooser.randrange(8)
    if kind <= 3:
        holder[key] = odd_value(chooser)
    elif kind == 4:
        del holder[key]
    elif kind == 5:
        other, name = chooser.choice(places)
        holder[key] = other[name]
    elif kind == 6:
        holder[key] = _wrapped(holder[key], chooser)
    elif isinstance(holder, dict):
        holder[str(chooser.choice([key, "x", "", "rank", "labels", "base", "format", "r", "bias"]))] = odd_value(
            chooser
        )
    else:
        holder += holder[:64]
    return values


def _wrapped(value: Any, chooser: random.Random) -> Any:
    for _ in range(chooser.choice([1, 1, 2, 200])):
        value = [value] if chooser.random() < 0.5 else {"a": value}
    return value


def _places(values: Any) -> list[tuple[Any, Any]]:
    """Every holder with each of its keys."""
    found: list[tuple[Any, Any]] = []
    waiting = [values]
    while waiting and len(found) < 5000:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        found += [(one, key) for key in keys]
        waiting += [one[key] for key in keys]
    return found
