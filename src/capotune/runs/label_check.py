"""Look for wrong labels in a data set, and write a file to correct them in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from capotune import methods
from capotune.adapters.assemble import Assembled, assemble
from capotune.data.readers import read_table
from capotune.data.suggestions import with_suggestions
from capotune.data.suspects import LabelCheck
from capotune.device import pick_device
from capotune.engine.activation_cache import ActivationCache
from capotune.errors import SettingError
from capotune.events import Reporter, bytes_as_progress
from capotune.files import check_free, write_atomic
from capotune.runs.cached import activation_cache
from capotune.runs.run import base_record, found
from capotune.settings import TrainSettings


def check_labels(settings: TrainSettings, out: Path | None, report: Reporter) -> LabelCheck:
    """Look for wrong labels among all rows of ``settings.data``; ``out``: a csv file that gets its rows and columns and
    a suggestion for each suspect.

    Raises ``CapotuneError`` subclasses: for data that is no labelled text, a second file to test on, a file ``out``
    that exists or is no csv file.
    """
    if settings.test is not None:
        raise SettingError("labels are checked in one file at a time.", setting="test", advice="Give it as `data`.")
    if out is not None:
        if out.suffix.lower() != ".csv":
            raise SettingError("a csv file is written.", setting="out", given=out, allowed="a name that ends in .csv")
        check_free(out)
    settings, task, base, context = found(settings, report)
    method = methods.settings_class("feature-extraction")().completed(context)

    def load(on_base: Any) -> tuple[Assembled, ActivationCache]:
        device = pick_device()
        dtype = on_base.compute_dtype(device, base.quantization is not None)
        assembled = assemble(on_base, method, device=device, dtype=dtype, progress=bytes_as_progress(report))
        return assembled, activation_cache(settings, base_record(base, report), assembled, dtype, report)

    checked = task.find_wrong_labels(settings, base, load, report)
    if out is not None:
        suggested = {one.row: (one.suggestion, one.probability, one.label_probability) for one in checked.suspects}
        write_atomic(out, with_suggestions(read_table(settings.data), suggested))
    return checked
