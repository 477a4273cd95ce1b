"""Capotune fine-tunes a pretrained transformer four ways and leaves a small adapter; the base never changes.

The functions here are those of ``capotune.api``; they are found at first use, so that importing is fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capotune.api import (
        check_labels,
        checkpoint,
        combine,
        compare,
        diff,
        evaluate,
        generate,
        info,
        load,
        load_adapters,
        load_base,
        load_model,
        merge,
        predict,
        push,
        quantize,
        resume,
        train,
    )
    from capotune.errors import CapotuneError
    from capotune.events import CancelToken
    from capotune.tasks.classification import Classifier, Prediction
    from capotune.tasks.generation import Generator
    from capotune.tasks.token_classification import FoundEntity, Tagger

__all__ = [
    "CancelToken",
    "CapotuneError",
    "Classifier",
    "FoundEntity",
    "Generator",
    "Prediction",
    "Tagger",
    "check_labels",
    "checkpoint",
    "combine",
    "compare",
    "diff",
    "evaluate",
    "export",
    "generate",
    "info",
    "load",
    "load_adapters",
    "load_base",
    "load_model",
    "merge",
    "predict",
    "push",
    "quantize",
    "resume",
    "train",
]
__version__ = "0.1.0"


_ELSEWHERE = {
    "CancelToken": "capotune.events",
    "CapotuneError": "capotune.errors",
    "Classifier": "capotune.tasks.classification",
    "FoundEntity": "capotune.tasks.token_classification",
    "Generator": "capotune.tasks.generation",
    "Prediction": "capotune.tasks.classification",
    "Tagger": "capotune.tasks.token_classification",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'capotune' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_ELSEWHERE.get(name, "capotune.api")), name)
