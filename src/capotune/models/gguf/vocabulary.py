"""A fast tokenizer of Transformers as a GGUF file's metadata: the inverse of ``tokenizer``.

Byte-level BPE and SentencePiece's BPE are written. How a byte-level tokenizer splits texts is found by asking it: a
text full of corner cases is split by it and by each rule that llama.cpp has a name for (``splits``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from capotune.models.base import Base
from capotune.models.gguf.file import GgufFile
from capotune.models.gguf.splits import WHOLE_WORDS, names, split

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "▁"
_PROBE = (
    "Hello, World! It's I'LL we're 1 12 123 1234 3.14 x1y22  two   three\t\ttabs\n\nnew\r\n lines \n end "
    "ÀÉ naïve Straße日本語 中文字 한국어 привет мир हिन्दी العربية 👍🏽 ... !!! (a[b]{c}) /path/to#x @y a_b-c Camel "
)


def of_tokenizer(base: Base, rows: int, end_ids: Sequence[int], chat_template: str | None) -> dict[str, Any]:
    """The ``tokenizer.…`` entries for an embedding of so many ``rows``. ``end_ids`` end a text, the first before all.

    Raises ``ModelError`` for a tokenizer of another kind, or one that splits texts by a rule without a name.
    """
    tokenizer = base.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = {} if backend is None else json.loads(backend.to_str())
    if backend is None or state["model"]["type"] != "BPE":
        raise base.error(
            "its tokenizer is no BPE, and GGUF files are written with such alone.",
            advice="Give `loader=transformers` and convert that folder with llama.cpp's convert_hf_to_gguf.py.",
        )
    tokens, kinds = _tokens(state, backend, rows)
    found: dict[str, Any] = {"tokens": tokens, "token_type": kinds}
    by_bytes = _is_byte_level(state)
    if by_bytes:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
        found |= {"model": "gpt2", "pre": _rule(base, backend, state), "merges": merges}
    else:
        found |= {"model": "llama", "pre": "default", "scores": _scores(state, tokens)}
        found["add_space_prefix"] = _spaces_first(backend)
    ids = {"bos": tokenizer.bos_token_id, "padding": tokenizer.pad_token_id, "unknown": tokenizer.unk_token_id}
    ends = [*end_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
    ids |= dict(zip(("eos", "eot", "eom"), dict.fromkeys(ends), strict=False))
    found |= {f"{name}_token_id": number for name, number in ids.items() if number is not None}
    whole = tokenizer("a")["input_ids"]
    found["add_bos_token"] = bool(whole) and whole[0] == tokenizer.bos_token_id
    found["add_eos_token"] = bool(whole) and len(whole) > 1 and whole[-1] == tokenizer.eos_token_id
    entries = {f"tokenizer.ggml.{name}": value for name, value in found.items()}
    return entries if chat_template is None else {**entries, "tokenizer.chat_template": chat_template}


def _is_byte_level(state: dict[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps(state["pre_tokenizer"])


def _tokens(state: dict[str, Any], backend: Tokenizer, rows: int) -> tuple[list[str], list[int]]:
    """Every token by its id, with its kind; ids that no token has are filled up."""
    by_id = {number: token for token, number in backend.get_vocab(with_added_tokens=True).items()}
    added = {one["id"]: _CONTROL if one["special"] else _USER_DEFINED for one in state["added_tokens"]}
    unknown, bytes_too = state["model"].get("unk_token"), state["model"].get("byte_fallback")
    tokens, kinds = [], []
    for number in range(max(rows, max(by_id) + 1)):
        token = by_id.get(number)
        tokens.append(f"[PAD{number}]" if token is None else token)
        if token is None:
            kinds.append(_UNUSED)
        elif token == unknown:
            kinds.append(_UNKNOWN)
        elif bytes_too and len(token) == len("<0x00>") and token.startswith("<0x"):
            kinds.append(_BYTE)
        else:
            kinds.append(added.get(number, _NORMAL))
    return tokens, kinds


def _rule(base: Base, backend: Tokenizer, state: dict[str, Any]) -> str:
    """llama.cpp's name of the rule that splits texts as the tokenizer does."""
    wanted = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(_PROBE)]
    takes_words_whole = bool(state["model"].get("ignore_merges"))
    nobody = GgufFile(Path(base.name), {}, {})
    for name in names():
        if (name in WHOLE_WORDS) != takes_words_whole:
            continue
        if [part for part, _ in split(nobody, name).pre_tokenize_str(_PROBE)] == wanted:
            return name
    raise base.error(
        "its tokenizer splits texts by a rule that has no name in llama.cpp known here.",
        advice="Give `loader=transformers` and convert that folder with llama.cpp's convert_hf_to_gguf.py.",
    )


def _scores(state: dict[str, Any], tokens: list[str]) -> list[float]:
    """The earlier a token is merged, the higher; tokens that no merge makes come last."""
    merges = state["model"]["merges"]
    order: dict[str, int] = {}
    for number, merge in enumerate(merges):
        order.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), number)
    return [-float(order.get(token, len(merges))) for token in tokens]


def _spaces_first(backend: Tokenizer) -> bool:
    """Whether a space is put before a text."""
    return bool(backend.encode("a", add_special_tokens=False).tokens[0].startswith(_SPACE))
