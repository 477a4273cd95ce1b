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
    train,
    train_run,
)
from capotune.evaluation.metrics import Metric, metric
from capotune.report import Comparison, ComparisonRow

__all__ = [
    "Classifier",
    "Comparison",
    "ComparisonRow",
    "Generator",
    "Metric",
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
    "metric",
    "predict",
    "quantize",
    "read_prompts",
    "read_texts",
    "train",
    "train_run",
    "user_turn",
]
