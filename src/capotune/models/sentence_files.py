"""What sentence-transformers writes beside a model: how it makes one vector of a text, and what else it does.

modules.json                            the modules that a text goes through, each with its folder
1_Pooling/config.json                   how hidden states become one vector; flags before version 5, then a word
config_sentence_transformers.json       prompts that stand before texts
sentence_bert_config.json               max_seq_length
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from capotune.errors import ModelError
from capotune.models.untrusted import check_name, read_json

Pooling = Literal["mean", "cls", "last", "max", "weightedmean", "mean_sqrt_len"]
"""How hidden states of a text become one vector. With n tokens h₁ … hₙ: ``weightedmean`` is Σ i·hᵢ / Σ i,
``mean_sqrt_len`` is Σ hᵢ / √n."""

_MODES: dict[str, Pooling] = {
    "mean": "mean",
    "cls": "cls",
    "lasttoken": "last",
    "max": "max",
    "weightedmean": "weightedmean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
}
"""What sentence-transformers calls them."""
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""How it said so before one word said it."""
_POOLING_FOLDER = "1_Pooling"


@dataclass(frozen=True)
class Module:
    """One of the modules that a text goes through."""

    kind: str
    """Name of its class: Transformer, Pooling, Dense, Normalize …"""
    folder: str
    """Where it lies in the model's folder; empty for the model itself."""


@dataclass(frozen=True)
class SentenceFiles:
    """The files in ``folder``, as far as they are there."""

    folder: Path

    @cached_property
    def modules(self) -> tuple[Module, ...]:
        """Those of ``modules.json``, in order; without that file the pooling alone, where its folder is."""
        path = self.folder / "modules.json"
        if not path.is_file():
            stored = (self.folder / _POOLING_FOLDER / "config.json").is_file()
            return (Module("Pooling", _POOLING_FOLDER),) if stored else ()
        try:
            found = tuple(Module(one["type"].rpartition(".")[2], one["path"]) for one in read_json(path))
            for module in found:
                check_name(module.folder, path)
            return found
        except (KeyError, TypeError, AttributeError):
            raise ModelError(f"{path}: expected a list of modules, each with type and path.") from None

    @property
    def pooling(self) -> Pooling | None:
        """How the model was trained to make one vector of a text; None where no file says it.

        Raises ``ModelError`` for a way that is not known here, and for several side by side.
        """
        folder = next((module.folder for module in self.modules if module.kind == "Pooling"), None)
        if folder is None:
            return None
        path = self.folder / folder / "config.json"
        if not path.is_file():
            raise ModelError(f"{self.folder / 'modules.json'} names {folder}, and {path} is not there.")
        modes = _modes(_read_object(path))
        if len(modes) == 1 and modes[0] in _MODES:
            return _MODES[modes[0]]
        raise ModelError(
            f"it makes a text's vector by {' and '.join(modes)} pooling ({path}), which is not done here.",
            advice=f"Write one of these into that file as pooling_mode: {', '.join(_MODES)}.",
        )

    @property
    def longest(self) -> int | None:
        """Tokens that sentence-transformers reads of a text; None where no file says it."""
        path = self.folder / "sentence_bert_config.json"
        found = _read_object(path).get("max_seq_length") if path.is_file() else None
        return found if isinstance(found, int) and found > 0 else None

    @property
    def notices(self) -> list[str]:
        """What sentence-transformers does to a text or its vector and a head here does not get, a sentence each."""
        found = []
        kinds = [module.kind for module in self.modules]
        after = kinds[kinds.index("Pooling") + 1 :] if "Pooling" in kinds else []
        if set(after) - {"Normalize"}:  # a length of 1 changes little for a head that is trained on the vectors
            found.append(
                f"modules.json puts {' and '.join(after)} after the pooling; the head reads the pooled states without."
            )
        prompt = self._default_prompt()
        if prompt:
            found.append(
                f"sentence-transformers puts {prompt!r} before every text of this model; here texts are read as given."
            )
        return found

    def _default_prompt(self) -> str | None:
        path = self.folder / "config_sentence_transformers.json"
        values = _read_object(path) if path.is_file() else {}
        prompts = values.get("prompts")
        return prompts.get(values.get("default_prompt_name")) if isinstance(prompts, dict) else None


def _modes(config: dict[str, Any]) -> list[str]:
    """In sentence-transformers' words; mean where the file says nothing, as there."""
    stated = config.get("pooling_mode")
    if stated is None:
        return [mode for flag, mode in _FLAGS.items() if config.get(flag)] or ["mean"]
    return [str(mode) for mode in stated] if isinstance(stated, list) else [str(stated)]


def _read_object(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected an object, found a {type(values).__name__}.")
    return values
