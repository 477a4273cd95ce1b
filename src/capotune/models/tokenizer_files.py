"""Why a folder's tokenizer cannot be loaded: it needs other libraries, or a class that Transformers lacks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from capotune.errors import ModelError


def needs_libraries(folder: Path) -> ModelError | None:
    """The error for a tokenizer that Transformers converts with libraries which are not installed; None: not so."""
    from transformers.utils import is_protobuf_available, is_sentencepiece_available, is_tiktoken_available

    stored = sorted(path for path in folder.glob("*.model") if path.is_file())
    if not stored or (folder / "tokenizer.json").is_file():
        return None
    file = stored[0]
    if _is_text(file):
        needed = {"tiktoken": is_tiktoken_available()}
    else:
        needed = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    missing = [name for name, is_there in needed.items() if not is_there]
    if not missing:
        return None
    return ModelError(
        f"its tokenizer is stored as {file.name} alone, which Transformers reads with the Python "
        f"{'libraries' if len(needed) > 1 else 'library'} {' and '.join(needed)}.",
        advice=f"Run: pip install {' '.join(missing)}",
    )


def unknown_class(folder: Path) -> ModelError | None:
    """The error for a tokenizer whose class Transformers does not have; None: not so."""
    import transformers

    name = None
    with suppress(OSError, ValueError, AttributeError, RecursionError):  # not there, or damaged
        name = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("tokenizer_class")
    if not name or hasattr(transformers, name):
        return None
    return ModelError(
        f"its tokenizer_config.json names the class {name}, which Transformers {transformers.__version__} has not.",
        advice="Save the tokenizer as tokenizer.json: tokenizer.save_pretrained(folder) where it can be loaded.",
    )


def tokens_of(tokenizer: Any, texts: str | Sequence[str], **options: Any) -> Any:
    """``tokenizer(texts, **options)``. Raises ``ModelError`` where its library gives up, as it does at a pattern that
    goes back too often (Oniguruma's limit of 10⁷ steps)."""
    try:
        return tokenizer(texts, **options)
    except BaseException as error:  # a panic of Rust inherits from nothing that can be named
        if type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"the base's tokenizer gives up at a text: {error}.",
            advice="Its tokenizer.json holds what cannot be carried out: take that file from another source.",
        ) from None


def _is_text(path: Path) -> bool:
    """Whether it is tiktoken's format, lines of base64 and a number; SentencePiece's is binary."""
    with path.open("rb") as file:
        start = file.read(256)
    return start.isascii() and all(byte >= 32 or byte in b"\r\n" for byte in start)
