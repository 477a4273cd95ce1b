"""How far a changed model's answers are from the original's, on text of the user's own.

Language models are compared by the distribution of the next token: the mean of KL(p‖q) = Σ p·log(p/q), in nats, p the
original's, and how often both find the same token most probable. Encoders are compared by the cosine of each token's
last hidden state, classifiers by the distribution over their labels, as language models are by tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from capotune.device import pick_device
from capotune.errors import DataError
from capotune.events import nothing
from capotune.models.base import Base
from capotune.models.load import load_backbone, load_causal_lm
from capotune.models.tokenizer_files import tokens_of

WINDOW = 512
"""Tokens that a model reads at once."""
MOST_TOKENS = 2048
"""Tokens that are compared: for each the original's whole distribution is kept in memory."""
CHUNK = 256

SHORT_TEXT = """The lighthouse keeper wrote down the weather every morning, and the names of the ships that passed.
One winter the supply boat did not come for six weeks, so he mended the old sail and went to the village himself.
How do I change the address on my order? I moved last week and the parcel has not been sent yet.
def area(width, height):
    return width * height
In 1969 two people walked on the Moon; about 600 million watched it on television.
"""
"""Stands in where no text of the user's own is given."""


@dataclass(frozen=True)
class Divergence:
    """Of two distributions over tokens or labels."""

    compared: int
    """Tokens or texts."""
    kl_divergence: float
    """Mean, in nats."""
    top1_agreement: float
    """Part of them for which both find the same answer most probable."""


@dataclass(frozen=True)
class StateDivergence:
    """Of two encoders' last hidden states."""

    compared: int
    """Tokens."""
    cosine: float
    """Mean over the tokens."""
    lowest_cosine: float


def compare_logits(original: Tensor, changed: Tensor) -> Divergence:
    """Of logits or log-probabilities, each (rows, choices)."""
    kl, same = 0.0, 0
    for one, other in zip(torch.split(original, CHUNK), torch.split(changed, CHUNK), strict=True):
        p, q = one.double().log_softmax(1), other.double().log_softmax(1)
        kl += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(1) == q.argmax(1)).sum())
    rows = len(original)
    return Divergence(rows, max(0.0, kl / rows), same / rows)


def compare_states(original: Tensor, changed: Tensor) -> StateDivergence:
    """Of hidden states, each (tokens, hidden)."""
    cosine = functional.cosine_similarity(original.double(), changed.double(), dim=1)
    return StateDivergence(len(cosine), float(cosine.mean()), float(cosine.min()))


def compare_models(
    original: Base, changed: Base, text: str, alive: Callable[[], object] = nothing
) -> Divergence | StateDivergence:
    """Of two models of one tokenizer, one after the other in memory, ``original`` at full precision.

    ``alive`` is called before each window. Raises ``DataError`` when the text is too short, ``ModelError`` when a model
    cannot be loaded.
    """
    writes = writes_text(original)
    windows = text_windows(original, text, by_line=not writes)
    load = load_causal_lm if writes else load_backbone
    answers = [answers_of(load(base), windows, alive) for base in (original, changed)]  # one model at a time
    return compare_logits(*answers) if writes else compare_states(*answers)


def writes_text(base: Base) -> bool:
    """Whether the model is stored with a language model's output layer."""
    from transformers.models.auto import modeling_auto as known

    names = (known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    stored = (base.config_values.get("architectures") or [None])[0]
    return any(stored in one.values() for one in names)


def read_text(path: str | Path | None) -> str:
    """A file's text; a few lines of our own for None. ``DataError`` when it cannot be read or holds nothing."""
    if path is None:
        return SHORT_TEXT
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot be read as UTF-8 text ({error}).", setting="text", given=path, advice="Give a text file."
        ) from None
    if not text.strip():
        raise DataError(
            "the file holds no text.",
            setting="text",
            given=path,
            advice="Give some of the text that the model will meet.",
        )
    return text


def text_windows(base: Base, text: str, *, by_line: bool) -> list[Tensor]:
    """Token ids, each (1, tokens): the start of ``text``, line by line or as one stream.

    Raises ``DataError`` when there are not two tokens.
    """
    tokenizer = base.tokenizer
    longest = min(WINDOW, base.max_length)
    if not by_line:
        ids = tokens_of(tokenizer, text, verbose=False)["input_ids"][:MOST_TOKENS]
        rows = [ids[at : at + longest] for at in range(0, len(ids), longest)]
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        each = (tokens_of(tokenizer, line, truncation=True, max_length=longest)["input_ids"] for line in lines)
        rows = list(_up_to(MOST_TOKENS, each))
    if sum(len(row) for row in rows) < 2:
        raise DataError(
            "the tokenizer makes less than two tokens of this text.", setting="text", advice="Give more of it."
        )
    return [torch.tensor([row]) for row in rows]


def _up_to(most: int, rows: Iterator[list[int]]) -> Iterator[list[int]]:
    """Rows until they hold ``most`` tokens."""
    taken = 0
    for row in rows:
        if taken >= most:
            return
        taken += len(row)
        yield row


@torch.no_grad()
def answers_of(
    model: Any,
    windows: Sequence[Tensor],
    alive: Callable[[], object] = nothing,
    types: Sequence[Tensor] | None = None,
) -> Tensor:
    """Logits or last hidden states, (tokens, choices or hidden) on the CPU; of a classifier (windows, labels).

    ``types`` are the token types of each window."""
    device = pick_device()
    model = model.to(device)
    found = []
    for at, window in enumerate(windows):
        alive()
        typed = {} if types is None else {"token_type_ids": types[at].to(device)}
        found.append(model(input_ids=window.to(device), **typed)[0].float().cpu())
    return torch.cat([answer.reshape(-1, answer.shape[-1]) for answer in found])
