"""Train one technique; look at data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capotune.api.trackers import recorded_config, tracked
from capotune.data_blocks import Block
from capotune.device import collector_at_rest
from capotune.errors import DataError, SettingError
from capotune.events import CancelToken, DataInspected, Event, Reporter, ignore
from capotune.settings import RunSettings, TrainingSettings, TrainSettings, build, nearest

if TYPE_CHECKING:
    from capotune.data.suspects import LabelCheck


def train(
    method: str,
    *,
    data: Any,
    out: str | Path = "capo-train",
    report: Reporter = ignore,
    cancel: CancelToken | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train one technique on data and write its run folder; returns what ``run.json`` holds.

    Args:
        method: ``feature-extraction``, ``lora``, ``qlora``, ``prompt-tuning``, or one that was registered.
        data: labelled text, tagged words, or text to write: a path, a dataset id on the hub, or rows in memory: a list
            of dicts (``[{"text": "…", "label": "…"}]``), a pandas DataFrame, a ``datasets.Dataset`` or ``DatasetDict``.
            The same for ``test`` among the settings.
        out: the run's folder; must not exist. With one that was stopped ``capotune.resume`` goes on.
        report: called with progress events (``capotune.events``).
        cancel: stops the run from another thread; it ends with ``KeyboardInterrupt``, as by Ctrl-C.
        settings: those of ``capo train METHOD --help`` by name (``rank=8``, ``test="test.csv"``).

    Raises ``CapotuneError`` subclasses, all ``ValueError``s, for unusable settings, data, models and folders.
    """
    shared, own = _separate(method, settings)
    built = build(TrainSettings, {"out": out, **sources(data, shared)})
    given = dict.fromkeys(["data", *settings], "argument")
    return train_run(built, own, report=report, cancel=cancel, given=given)


def train_run(
    settings: TrainSettings,
    method: TrainingSettings,
    *,
    report: Reporter = ignore,
    cancel: CancelToken | None = None,
    given: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """``train`` with settings already validated; ``given`` says where those that are no defaults came from."""
    with collector_at_rest():
        from capotune.runs.run import run

    config = run_config(settings, method)
    with tracked(settings.report_to, settings.out, {None: config}, (cancel or CancelToken()).watching(report)) as told:
        return run(settings, method, told, given=given)


def run_config(settings: RunSettings, method: TrainingSettings) -> dict[str, Any]:
    """Settings of one technique, as trackers show them."""
    shared = settings.model_dump(mode="json", include=set(RunSettings.model_fields))
    name = method.method
    return recorded_config({"method": name, "settings": shared, name: method.model_dump(mode="json")})


def method_names() -> tuple[str, ...]:
    """Every known method's name."""
    from capotune import methods

    return methods.names()


def method_settings(name: str) -> type[TrainingSettings]:
    """A method's settings class; an unknown name is a ``SettingError`` with the nearest one."""
    from capotune import methods

    return methods.settings_class(name)


def usage(task: str, adapter: Path) -> str:
    """The command that uses an adapter that was trained for ``task``, with an example of a text."""
    from capotune import tasks
    from capotune.adapters.files import RECORD

    shell, _ = tasks.get(task).example(json.loads((adapter / RECORD).read_text(encoding="utf-8")))
    return f"capo {tasks.get(task).command} {adapter} {shell}"


def describe_data(task: str, report: Mapping[str, Any]) -> list[Block]:
    """A task's data report in words, as blocks to draw (``capotune.data_blocks``)."""
    from capotune import tasks

    return tasks.get(task).describe_data(report)


def inspect(*, data: Any, report: Reporter = ignore, **settings: Any) -> dict[str, Any]:
    """What data holds and how it would be read: ``task``, ``model`` whose tokens were counted, and ``report``.

    ``settings`` are those of ``capo data --help`` by name. Nothing is trained or written. Raises as ``train``, but for
    data that can be read and not trained on, as there is too little of it: that is said under ``refused``.
    """
    with collector_at_rest():
        from capotune import tasks
        from capotune.runs import run as runs

    shared, method = _separate("lora", settings)
    found: dict[str, Any] = {}

    def listen(event: Event) -> None:
        if isinstance(event, DataInspected):
            found.update(task=event.task, report=event.report)
        report(event)

    run = runs.resolve(build(TrainSettings, sources(data, shared)), listen)
    try:
        runs.inspect(run, method, listen)
    except DataError as error:
        if not found:
            raise
        found["refused"] = str(error)
    return {"model": run.model, "title": tasks.get(found["task"]).title, **found}


def check_labels(
    *,
    data: Any,
    out: str | Path | None = None,
    report: Reporter = ignore,
    cancel: CancelToken | None = None,
    **settings: Any,
) -> LabelCheck:
    """Labels of texts that are likely to be wrong, ranked, each with the label that is more probable.

    Every row is labelled by a linear head on the frozen base's features that has not seen it (confident learning,
    Northcutt et al. 2021; needs cleanlab). The data is not changed.

    Args:
        data: labelled text, as in ``train``.
        out: a csv file to write (none must be there): the rows and columns of ``data`` and the columns ``suggestion``,
            ``suggestion_probability`` and ``label_probability``, empty where nothing is suspect. Corrected, it is data
            to train on.
        report, cancel: as in ``train``.
        settings: those of ``capo data --help`` by name (``model``, ``text_column``, ``seed`` …), and ``cache``.

    Raises ``CapotuneError`` subclasses, as ``train``; ``MissingLibraryError`` without cleanlab.

    >>> check = capotune.check_labels(data="tickets.csv", out="to_correct.csv")    # doctest: +SKIP
    >>> check.suspects[0].suggestion                                               # doctest: +SKIP
    'refund'
    """
    with collector_at_rest():
        from capotune.runs import label_check

    shared, _ = _separate("feature-extraction", settings)
    built = build(TrainSettings, sources(data, shared))
    told = (cancel or CancelToken()).watching(report)
    return label_check.check_labels(built, None if out is None else Path(out), told)


def sources(data: object, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with ``data`` and ``test`` as settings hold them."""
    from capotune.data.readers import as_source

    test = settings.get("test")
    return {**settings, "data": as_source(data), **({} if test is None else {"test": as_source(test, "test")})}


def _separate(method: str, settings: dict[str, Any]) -> tuple[dict[str, Any], TrainingSettings]:
    """Split flat keyword settings into the run's own and the method's."""
    cls = method_settings(method)
    known = [*RunSettings.model_fields, *cls.model_fields]
    for name in settings:
        if name not in known:
            raise SettingError(f"unknown setting '{name}' for {method}.{nearest(name, known)}")
    own = build(cls, {name: value for name, value in settings.items() if name in cls.model_fields})
    return {name: value for name, value in settings.items() if name in RunSettings.model_fields}, own
