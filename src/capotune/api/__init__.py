"""Everything that the command line can do, as functions.

>>> import capotune
>>> result = capotune.compare(data="tickets.csv", out="compared")   # doctest: +SKIP
>>> result.recommended                                              # doctest: +SKIP
'lora'
>>> classifier = capotune.load("compared/lora/adapter")             # doctest: +SKIP
>>> classifier.predict(["where is my parcel?"])                     # doctest: +SKIP
['order_status']
"""

from __future__ import annotations

from capotune.api.conversion import merge, quantize
from capotune.api.inference import (
    Classifier,
    Generator,
    Prediction,
    evaluate,
    generate,
    info,
    is_adapter,
    load,
    load_base,
    load_classifier,
    load_generator,
    load_model,
    predict,
    read_prompts,
    read_texts,
    user_turn,
)
from capotune.api.training import (
    compare,
    compare_run,
    inspect,
    render_comparison,
    train,
    train_run,
)

__all__ = [
    "Classifier",
    "Generator",
    "Prediction",
    "compare",
    "compare_run",
    "evaluate",
    "generate",
    "info",
    "inspect",
    "is_adapter",
    "load",
    "load_base",
    "load_classifier",
    "load_generator",
    "load_model",
    "merge",
    "predict",
    "quantize",
    "read_prompts",
    "read_texts",
    "render_comparison",
    "train",
    "train_run",
    "user_turn",
]
