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

from capotune.api.comparison import compare, compare_run, compare_settings
from capotune.api.conversion import combine, diff, export, merge, push, quantize
from capotune.api.inference import (
    evaluate,
    generate,
    info,
    install_command,
    is_adapter,
    load,
    load_adapters,
    load_base,
    load_generator,
    load_model,
    load_predictor,
    predict,
    read_prompts,
    read_texts,
)
from capotune.api.resuming import checkpoint, methods_of, request_checkpoint, resume
from capotune.api.runs import compare_runs, list_runs, reproduce
from capotune.api.training import (
    check_labels,
    describe_data,
    inspect,
    method_names,
    method_settings,
    train,
    train_run,
    usage,
)
from capotune.data.suspects import LabelCheck, Suspect
from capotune.evaluation.metrics import Metric, metric
from capotune.report import Comparison, ComparisonRow

__all__ = [
    "Comparison",
    "ComparisonRow",
    "LabelCheck",
    "Metric",
    "Suspect",
    "check_labels",
    "checkpoint",
    "combine",
    "compare",
    "compare_run",
    "compare_runs",
    "compare_settings",
    "describe_data",
    "diff",
    "evaluate",
    "export",
    "generate",
    "info",
    "inspect",
    "install_command",
    "is_adapter",
    "list_runs",
    "load",
    "load_adapters",
    "load_base",
    "load_generator",
    "load_model",
    "load_predictor",
    "merge",
    "method_names",
    "method_settings",
    "methods_of",
    "metric",
    "predict",
    "push",
    "quantize",
    "read_prompts",
    "read_texts",
    "reproduce",
    "request_checkpoint",
    "resume",
    "train",
    "train_run",
    "usage",
]
