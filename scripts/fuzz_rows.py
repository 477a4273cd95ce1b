"""Changes that a fuzzer makes to files of records, to settings in YAML and to the texts of a record."""

from __future__ import annotations

import csv
import io
import json
import random
from typing import Any

import pyarrow
import pyarrow.parquet
from fuzz_mutations import ODD, mutate_json, odd_value

COLUMNS = [
    "text", "label", "split", "messages", "conversations", "prompt", "completion", "instruction", "input", "output",
    "question", "answer", "context", "system", "tools", "tokens", "tags", "ner_tags", "words", "chosen", "rejected", "",
    "Text ", "LABEL", "\ufefftext", "a", "b", "0", "text_a", "premise", "hypothesis", "column 2", "<b>", "\x1b[31m",
]  # fmt: skip
TEXTS = [
    "", " ", "late", "where is my parcel", "a,b", 'a "quoted" word', "line\nbreak", "line\r\nbreak", "tab\there", "é",
    "日本語", "🙂",
    "\u202eright to left", "\x00", "\x1b[31mred", "\ufeff", "nan", "N/A", "1", "1.0", "-0", "1e999", "true", "True",
    "[1, 2]", "['a', 'b']", "train", "test", "validation", "<script>", "{question}", "{{", "<|endoftext|>",
    "<|im_end|>", "a" * 5000,
    "e\u0301" * 50, "\ud800", "ß", "ﬁ", "\u2028", "\x85", "\x0b", "|", ";", "=1+1",
]  # fmt: skip
TURNS: list[Any] = [
    {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"},
    {"role": "system", "content": "be kind"},
    {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}, {"role": "tool", "content": "3"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
    {"role": "assistant", "content": [{"type": "text", "text": "part"}], "weight": 0}, {"role": "user"}, {}, None, "hi",
    {"role": "assistant", "content": "x", "reasoning_content": "y", "train": False},
]  # fmt: skip
OURS = ("train_seconds", "epochs", "tolerance")
"""Numbers of a comparison that are finite and not below 0, whatever the data and the models."""
_TICKETS = "".join(
    f"my parcel {n} is late,{('late', 'lost')[n % 2]},{('train', 'test')[n % 3 == 2]}\n" for n in range(12)
)
_CHATS = [{"messages": [TURNS[0], {"role": "assistant", "content": f"hello {n}"}]} for n in range(6)]
_PAIRS = [{"prompt": f"Q {n}: ", "completion": f"A {n}", "split": "train"} for n in range(6)]
_TAGGED = [{"tokens": ["Ann", "lives", f"at {n}"], "ner_tags": ["B-PER", "O", "B-LOC"]} for n in range(6)]
_ROWS = [_CHATS, _PAIRS, _TAGGED, [{"text": f"a text {n}", "label": n % 2} for n in range(8)]]


def parquet_of(rows: list[dict[str, Any]]) -> bytes:
    """Rows as a parquet file."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


SEEDS: dict[str, list[bytes]] = {
    "csv": [f"text,label,split\n{_TICKETS}".encode(), f"prompt;completion\n{_TICKETS.replace(',', ';', 1)}".encode(),
            ("\ufeffsep=;\n" + "text;label\n" + "hi there;a\n" * 3 + '"a ""b""\nc";b\n' * 3).encode("utf-16")],
    "tsv": [f"text\tlabel\n{_TICKETS.replace(',', chr(9))}".replace("\ttrain", "").replace("\ttest", "").encode()],
    "jsonl": [_lines(rows) for rows in _ROWS],
    "json": [json.dumps(rows).encode() for rows in _ROWS],
    "parquet": [parquet_of(rows) for rows in _ROWS],
    "text": [b"Once upon a time there was a parcel.\n" * 40 + b"<|endoftext|>\nThe end.\n" * 3,
             b"Ann B-PER\nlives O\nhere O\n\nBob B-PER\nis O\nin O\nRome B-LOC\n\n" * 4],
    "yaml": [b"model: minilm\nseed: 3\nlora:\n  rank: 4\n  layers: [1, 2]\n  target_modules: [q_proj]\n\n",
             b"#\nrank: 8\nlearning-rate: 1e-3\nepochs: 2\nlayers: [0]\ndropout: 0.1\nout: there\n",
             b"test-fraction: 0.5\nqlora: {rank: 2, double_quant: false}\nprompt_tuning: {num_virtual_tokens: 4}\n"],
}  # fmt: skip


def mutate_delimited(data: bytes, seed: int) -> bytes:
    """A csv or tsv file anew with odd columns and values, or with a piece put in, doubled or taken away."""
    chooser = random.Random(seed)
    if chooser.random() < 0.4:
        names = _names(chooser)
        text = io.StringIO()
        writer = csv.writer(
            text, delimiter=chooser.choice(",,;\t|"), lineterminator=chooser.choice(["\n", "\r\n", "\r"])
        )
        writer.writerow(names)
        for row in _rows(chooser, names):
            cells = [value if isinstance(value, str) else json.dumps(value) for value in row.values()]
            writer.writerow(cells[: chooser.choice([len(cells)] * 20 + [1])])
        return text.getvalue().encode(chooser.choice(["utf-8"] * 6 + ["utf-16", "utf-8-sig", "cp1252"]), "replace")
    return _piece_changed(data, chooser)


def mutate_lines(data: bytes, seed: int) -> bytes:
    """A file of JSON with values changed in one of its lines or anew with odd rows; or with a piece changed."""
    chooser = random.Random(seed)
    kind = chooser.random()
    if kind < 0.35:
        rows = list(_rows(chooser, _names(chooser)))
        if chooser.random() < 0.3:
            return json.dumps(rows).encode()
        return _lines(rows)
    if kind < 0.7:
        lines = data.split(b"\n")
        at = chooser.randrange(len(lines))
        lines[at] = mutate_json(lines[at], seed)
        return b"\n".join(lines)
    return _piece_changed(data, chooser)


def mutate_parquet(data: bytes, seed: int) -> bytes:
    """A parquet file anew with columns of odd types; or with a few bytes changed."""
    chooser = random.Random(seed)
    if chooser.random() < 0.6:
        try:
            names = list(dict.fromkeys(_names(chooser)))
            table = pyarrow.Table.from_pylist(list(_rows(chooser, names)))
            if chooser.random() < 0.3 and table.num_columns:
                table = table.set_column(0, table.column_names[0], _odd_column(chooser, table.num_rows))
            if chooser.random() < 0.2:
                features = {"info": {"features": {names[0]: {"_type": "ClassLabel", "names": ["a", "b"]}}}}
                odd = chooser.choice(
                    [json.dumps(features), "{", "[]", "null", json.dumps({"info": chooser.choice(ODD)})]
                )
                table = table.replace_schema_metadata({"huggingface": odd.encode(errors="replace")})
            file = io.BytesIO()
            pyarrow.parquet.write_table(table, file)
            return file.getvalue()
        except (pyarrow.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):
            return data
    changed = bytearray(data)
    for _ in range(chooser.choice([1, 1, 2, 8])):
        if changed:
            changed[chooser.randrange(len(changed))] = chooser.choice([0, 1, 0x7F, 0x80, 0xFF, chooser.randrange(256)])
    return bytes(changed)


def mutate_yaml(data: bytes, seed: int) -> bytes:
    """YAML with a piece or a value changed."""
    chooser = random.Random(seed)
    text = data.decode(errors="replace")
    if chooser.random() < 0.6 and ":" in text:
        lines = text.splitlines()
        at = chooser.randrange(len(lines))
        name = (
            lines[at].split(":")[0]
            if chooser.random() < 0.7
            else chooser.choice(["x", "- a", "? ", "lora", "&a b", "1"])
        )
        odd = chooser.choice(
            [
                *map(json.dumps, ODD),
                "&a [*a]",
                "!!python/object/apply:os.system [ls]",
                "2020-01-01",
                "~",
                "0x1f",
                "1_000",
                "!!binary aGk=",
                "*a",
                "|",
                ">",
                "{",
                "'",
                "1e5",
                ".inf",
                "0777",
            ]
        )
        lines[at] = f"{name}: {odd}"
        return "\n".join(lines).encode(errors="replace")
    return _piece_changed(data, chooser)


def mutate_texts(data: bytes, seed: int) -> bytes:
    """A JSON record with some of its texts and numbers others of the same type, and lists shorter or doubled."""
    chooser = random.Random(seed)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return data
    for _ in range(chooser.choice([1, 2, 5, 30])):
        _value_replaced(values, chooser)
    return json.dumps(values).encode()


def _value_replaced(values: Any, chooser: random.Random) -> None:
    """One leaf, reached by a random way down."""
    holder = values
    while isinstance(holder, dict | list) and holder:
        keys = (
            [key for key in holder if key not in ("kind", "metric", "task", "higher_is_better")]
            if isinstance(holder, dict)
            else range(len(holder))
        )
        if not keys:
            return
        key = chooser.choice(list(keys))
        value = holder[key]
        if isinstance(value, str):
            holder[key] = chooser.choice(TEXTS).replace("\ud800", "?") + chooser.choice(
                ["", "</style><script>x()</script>", '" onload=x() a="', "&lt;"]
            )
            return
        if isinstance(value, bool):
            holder[key] = not value
            return
        if isinstance(value, int):
            holder[key] = chooser.choice([0, 1, 7, 10**6, 10**15])
            return
        if isinstance(value, float):
            scores = [] if key in OURS else [-1.0, float("nan"), float("inf")]
            holder[key] = chooser.choice([0.0, 1.0, 0.5, 1e-9, 1e12, *scores])
            return
        holder = value


def _names(chooser: random.Random) -> list[str]:
    usual = [
        ["text", "label"],
        ["prompt", "completion"],
        ["messages"],
        ["tokens", "ner_tags"],
        ["question", "answer"],
        ["instruction", "input", "output"],
        ["text"],
        ["conversations"],
        ["text", "label", "split"],
    ]
    names = list(chooser.choice(usual))
    for _ in range(chooser.choice([0, 0, 1, 2])):
        names.insert(chooser.randrange(len(names) + 1), chooser.choice(COLUMNS))
    return names


def _rows(chooser: random.Random, names: list[str]) -> Any:
    """Some rows; most values are what the column is for."""
    odd = chooser.choice([0.0, 0.02, 0.2])
    for number in range(chooser.choice([0, 1, 2, 6, 12, 40])):
        row = {}
        for name in names:
            value: Any = f"some words {number}"
            if name in ("messages", "conversations"):
                value = [
                    chooser.choice(TURNS[: 2 + len(TURNS) * (chooser.random() < odd)])
                    for _ in range(chooser.randrange(1, 4))
                ]
            elif name in ("tokens", "words"):
                value = ["Ann", "is", "here"][: chooser.choice([3, 3, 3, 2, 0])]
            elif name in ("ner_tags", "tags"):
                value = chooser.choice([["B-PER", "O", "O"], [1, 0, 0], ["I-PER", "X", ""]])
            elif name in ("label", "LABEL"):
                value = chooser.choice(["late", "lost", 0, 1, 1.0, True])
            elif name == "split":
                value = chooser.choice(["train", "test", "validation"])
            if chooser.random() < odd:
                value = chooser.choice(TEXTS) if chooser.random() < 0.5 else odd_value(chooser)
            row[name] = value
        if chooser.random() > odd / 2:
            yield row
        else:
            yield {name: row[name] for name in chooser.sample(list(row), chooser.randrange(len(row) + 1))}


def _odd_column(chooser: random.Random, rows: int) -> pyarrow.Array:
    kinds = [
        pyarrow.binary(),
        pyarrow.timestamp("ns"),
        pyarrow.date32(),
        pyarrow.decimal128(38, 10),
        pyarrow.float16(),
        pyarrow.duration("s"),
        pyarrow.null(),
        pyarrow.list_(pyarrow.list_(pyarrow.int8())),
        pyarrow.uint64(),
        pyarrow.map_(pyarrow.string(), pyarrow.int8()),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    ]
    return pyarrow.nulls(rows, chooser.choice(kinds))


def _piece_changed(data: bytes, chooser: random.Random) -> bytes:
    """A piece put in, doubled or taken away."""
    at = chooser.randrange(len(data) + 1)
    end = min(len(data), at + chooser.choice([1, 3, 20, 200]))
    kind = chooser.randrange(3)
    if kind == 0:
        pieces = [
            b'"',
            b"\n",
            b"\r",
            b"\n\n",
            b",",
            b"\t",
            b"\0",
            b"\xff",
            b"\xef\xbb\xbf",
            b"{",
            b"}",
            b"[",
            b"]",
            b":",
            b"\\ud800",
        ]
        piece = chooser.choice(pieces) if chooser.random() < 0.5 else chooser.choice(TEXTS).encode(errors="replace")
        return data[:at] + piece + data[at:]
    return data[:at] + data[at:end] * 2 + data[end:] if kind == 1 else data[:at] + data[end:]
