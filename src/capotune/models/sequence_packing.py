"""Whether a model can read sequences that stand one after the other, without padding, and how.

Packed, a batch is one row of tokens: positions begin anew with each sequence, and attention knows where each ends.
For that Transformers' models are given another attention function by name, for as long as it is needed. Not every
family can do it (some count positions themselves, some mix tokens by other means than attention), so each model is
tried once on a few sequences: what it computes of them packed must be what it computes of them one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from capotune.kernels.attention import Sequences
from capotune.kernels.prefix import prefixed_attention
from capotune.models.architecture import FAILURES
from capotune.models.prefix import PREFIXED, prefix_of

_NAME = "capotune_packed"
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_LONGEST_TRIED = 512


@dataclass(frozen=True)
class Packing:
    """How a model reads several sequences."""

    first_position: int | None
    """Position of a sequence's first token where sequences are packed; None: they are padded."""
    why_not: str | None = None
    """Why they are padded, in words."""
    equal_lengths: bool = False
    """Whether padding changes what the model computes of a sequence, so that only equally long ones go together."""
    changes_beyond: int | None = None
    """Length beyond which one sequence changes how the model places the tokens of all others beside it (longrope)."""

    def group(self, length: int) -> int:
        """A number for sequences of this length; only those of one number go together."""
        return length if self.equal_lengths else int(self.changes_beyond is not None and length > self.changes_beyond)

    @property
    def described(self) -> str:
        """For the record of a run."""
        if self.first_position is not None:
            return "packed"
        how = "those of one length together, since the model reads padding too" if self.equal_lengths else "padded"
        return f"{how}: {self.why_not}"


class PackingError(ValueError):
    """The model asks of attention what the packed one does not do."""


def try_packing(backbone: Any) -> Packing:
    """Find out by trying: ``backbone`` is a ``PreTrainedModel`` without head."""
    with without_dropout(backbone), torch.no_grad():
        tried = replace(_try_packing(backbone), changes_beyond=changes_beyond(backbone.config))
        return tried if tried.first_position is not None else replace(tried, equal_lengths=_reads_padding(backbone))


@contextmanager
def without_dropout(backbone: nn.Module) -> Iterator[None]:
    """Inside, no random numbers are drawn, which would make two ways to read differ."""
    training = [module for module in backbone.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _reads_padding(backbone: Any) -> bool:
    """Whether what stands behind a sequence, masked, changes what is computed of it."""
    long, short = _probe_sequences(backbone.config, 0)
    ids = torch.stack([long, nn.functional.pad(short, (0, len(long) - len(short)), value=int(long[0]))])
    mask = torch.tensor([[1] * len(long), [1] * len(short) + [0] * (len(long) - len(short))])
    device = backbone.device
    try:
        together = _states(backbone(input_ids=ids.to(device), attention_mask=mask.to(device)))[1, : len(short)]
        alone = _states(backbone(input_ids=short[None].to(device)))[0]
    except FAILURES:  # it was a try; what is wrong will be said where the model is used
        return False
    return not relative_error(together.float(), alone.float()) <= TOLERANCE.get(alone.dtype, 1e-4)


def changes_beyond(config: Any) -> int | None:
    """``Packing.changes_beyond``, by its ``rope_parameters``: one set for all layers, or one for each kind."""
    stated = getattr(config, "rope_parameters", None) or {}
    for one in (stated, *(part for part in stated.values() if isinstance(part, dict))):
        if one.get("rope_type") == "longrope":
            return int(one.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    return None


def _window(config: Any) -> int | None:
    """Tokens that attention sees, 0 for all; None where layers have settings of their own."""
    try:
        return getattr(config, "sliding_window", None) or 0
    except RuntimeError:  # Transformers', for such a configuration
        return None


def _try_packing(backbone: Any) -> Packing:
    config = backbone.config
    layers = set(getattr(config, "layer_types", None) or _PLAIN_LAYERS) - _PLAIN_LAYERS
    if layers:
        return Packing(None, f"the model has layers of other kinds ({', '.join(sorted(layers))})")
    if config._attn_implementation not in ("sdpa", PREFIXED):
        return Packing(None, f"the model's attention is {config._attn_implementation}")
    window = _window(config)
    if window is None:
        return Packing(None, "the model's layers differ in the window of their attention")
    probes = _probe_sequences(config, window)
    expected = torch.cat([_states(backbone(input_ids=ids[None].to(backbone.device)))[0] for ids in probes])
    reason = ""
    # RoBERTa and its relatives count positions from the id of the padding token on
    for first in (0, (getattr(config, "pad_token_id", None) or 0) + 1):
        packing = Packing(first)
        try:
            with packed(backbone, packing):
                observed_windows: dict[nn.Module, int | None] = {}
                found = _states(_forward_packed(backbone, probes, first, observed_windows))[0]
        except FAILURES as error:  # it was a try
            reason = f"the model's code does not take packed sequences ({error})"
            continue
        off = relative_error(found.float(), expected.float())
        if not off <= TOLERANCE.get(found.dtype, 1e-4):
            reason = f"packed, the model computes something else (by {off:.1g})"
        elif window > _LONGEST_TRIED and set(observed_windows.values()) == {None}:
            reason = "the model keeps the window of its attention to itself"
        else:
            return packing
    return Packing(None, reason)


@contextmanager
def packed(backbone: Any, packing: Packing) -> Iterator[None]:
    """Inside, ``backbone`` reads packed batches, and only such, where ``packing`` says it can; else nothing changes."""
    if packing.first_position is None:
        yield
        return
    AttentionInterface.register(_NAME, _attention)
    # a block that was copied has a configuration of its own
    configs = [module.config for module in backbone.modules() if hasattr(module, "config")]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = _NAME  # a name without a mask function of its own: no mask is made
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the token that is farthest off: the median over its elements, since trained models have a few that are
    hundreds of times as large as all others. A token that is equal is not off, even where all its elements are 0."""
    difference = (found - expected).abs().median(1).values
    off = torch.where(difference == 0, 0, difference / expected.abs().median(1).values)
    return float(off.max())


def _probe_sequences(config: Any, window: int) -> list[torch.Tensor]:
    """Ids of two short sequences that begin differently, and of one beyond the attention window where that is short."""
    words = [token for token in range(config.vocab_size) if token != getattr(config, "pad_token_id", None)][:7]
    lengths = [5, 3, window + 5] if 0 < window <= _LONGEST_TRIED else [5, 3]
    return [
        torch.tensor((words[at:] + words * (length // len(words) + 1))[:length]) for at, length in enumerate(lengths)
    ]


def probe_sequences(config: Any) -> list[torch.Tensor]:
    """Ids of the sequences that packing was tried on."""
    return _probe_sequences(config, _window(config) or 0)


def forward_packed(
    backbone: Any, probes: list[torch.Tensor], first_position: int, wanted: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[nn.Module, int | None]]:
    """What ``backbone``, now packed, computes of a few sequences: (tokens, hidden), or with ``wanted`` perhaps of these
    positions alone; and the window that each of its attention modules asked for."""
    observed_windows: dict[nn.Module, int | None] = {}
    extra = {} if wanted is None else {"wanted": wanted}
    return _states(_forward_packed(backbone, probes, first_position, observed_windows, **extra))[0], observed_windows


def _forward_packed(
    backbone: Any,
    probes: list[torch.Tensor],
    first_position: int,
    observed_windows: dict[nn.Module, int | None],
    **extra: Any,
) -> Any:
    sequences = Sequences(tuple(map(len, probes)))
    return backbone(
        input_ids=torch.cat(probes)[None].to(backbone.device),
        position_ids=sequences.positions(first_position)[None].to(backbone.device),
        sequences=sequences,
        observed_windows=observed_windows,
        **extra,
    )


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    sequences: Sequences | None = None,
    observed_windows: dict[nn.Module, int | None] | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as Transformers calls it: query (1, heads, tokens, head_dim) → (1, tokens, heads, head_dim)."""
    extra = sorted(name for name in ("softcap", "position_bias", "s_aux", "head_mask") if more.get(name) is not None)
    if sequences is None or attention_mask is not None or dropout or extra:
        raise PackingError(f"its attention asks for {', '.join(extra) or 'a mask or dropout'}")
    if observed_windows is not None:
        observed_windows[module] = sliding_window
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = prefixed_attention(
        prefix_of(module),
        q,
        k,
        v,
        sequences,
        causal=bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal,
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        window=sliding_window,
    )
    return out[None], None


def _states(output: Any) -> torch.Tensor:
    states: torch.Tensor = output.last_hidden_state
    return states
