"""How many tokens a model has positions for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_NAMES = (
    *("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "context_length"),
    "max_target_positions",  # of a decoder that listens (Whisper)
)
"""What configurations call it."""


def positions(config: Any) -> int | None:
    """Tokens that a model has positions for; None where its configuration states none.

    RoBERTa and its relatives count positions from the padding's id on, so that some of the table are never used. The
    table says so itself, by its ``padding_idx``; looked at are encoders alone, which are small.
    """
    from transformers import AutoModel, AutoModelForMaskedLM

    stated = next((value for name in _NAMES if (value := getattr(config, name, None)) is not None), None)
    if not isinstance(stated, int) or stated < 1:  # -1: as many as you like
        return None
    if getattr(config, "pad_token_id", None) is None or type(config) not in AutoModelForMaskedLM._model_mapping:
        return stated
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    words = model.get_input_embeddings()
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding) and part is not words]
    unused = [part.padding_idx + 1 for part in tables if part.num_embeddings == stated and part.padding_idx is not None]
    return stated - max(unused, default=0)
