"""Runs on the screens of other programs: TensorBoard, Weights & Biases, MLflow, trackio.

Each is a listener of the run's events and is imported only when ``report_to`` names it. Where it writes to is its own
affair (``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI`` …); the project or experiment is called ``capotune`` where nothing
else is said, and a run as its folder. TensorBoard's files go to ``tensorboard/RUN`` beside the run's folder.

A tracker that fails later than at its start is left out from then on, and the run goes on. A run that is resumed goes
on in its tracker too: ``trackers.json`` in its folder holds the name that the tracker gave it.
"""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capotune.errors import SettingError, needs_extra
from capotune.events import EpochEnded, Event, Finished, Reporter, StepTaken, TrainingStarted, Warned
from capotune.files import write_atomic

__all__ = ["TRACKERS", "names_in", "recorded_config", "tracked"]

_IDS = "trackers.json"
_PROJECT = "capotune"


class Tracker(ABC):
    """One run in one program.

    Args:
        folder: the run's.
        config: its settings.
        known_as: what the program called it when it was started, for one that is resumed.
    """

    id: str
    """What the program calls the run."""

    @abstractmethod
    def __init__(self, folder: Path, config: Mapping[str, Any], known_as: str | None) -> None: ...

    @classmethod
    def failures(cls) -> tuple[type[Exception], ...]:
        """What its library raises."""
        return (OSError,)

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Values as they are after ``step`` optimizer steps."""

    @abstractmethod
    def close(self, *, finished: bool) -> None:
        """The run ended, or was stopped."""


class TensorBoard(Tracker):
    """Event files, a scalar for each value, and the settings as a text."""

    def __init__(self, folder: Path, config: Mapping[str, Any], known_as: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder.parent / "tensorboard" / folder.name))
        if known_as is None:
            self._writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in config.items()))
        self.id = folder.name

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, finished: bool) -> None:  # noqa: ARG002 - its files do not say
        self._writer.close()


class WeightsAndBiases(Tracker):
    """A run in the project ``WANDB_PROJECT``."""

    def __init__(self, folder: Path, config: Mapping[str, Any], known_as: str | None) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        quiet = wandb.Settings(console="off", silent=True)
        self._run: Any = wandb.init(
            project=project, name=folder.name, id=known_as, resume="allow" if known_as else None, config=dict(config),
            settings=quiet,
        )  # fmt: skip
        self.id = str(self._run.id)

    @classmethod
    def failures(cls) -> tuple[type[Exception], ...]:
        import wandb

        return OSError, wandb.Error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class Mlflow(Tracker):
    """A run in the experiment ``MLFLOW_EXPERIMENT_NAME``. Values are sent every few seconds, as a server may be far."""

    SECONDS, MOST = 5.0, 900

    def __init__(self, folder: Path, config: Mapping[str, Any], known_as: str | None) -> None:
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient()
        self._waiting: list[Any] = []
        self._sent = time.monotonic()
        self.id = known_as or self._started(folder.name, config)

    @classmethod
    def failures(cls) -> tuple[type[Exception], ...]:
        from mlflow.exceptions import MlflowException

        return OSError, MlflowException

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(name, value, now, step) for name, value in values.items()]
        if len(self._waiting) >= self.MOST or time.monotonic() - self._sent > self.SECONDS:
            self._send()

    def close(self, *, finished: bool) -> None:
        self._send()
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")

    def _started(self, name: str, config: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        called = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(called)
        number = self._client.create_experiment(called) if experiment is None else experiment.experiment_id
        run = self._client.create_run(number, run_name=name).info.run_id
        self._client.log_batch(run, params=[Param(key, str(value)) for key, value in config.items()])
        return str(run)

    def _send(self) -> None:
        self._client.log_batch(self.id, metrics=self._waiting)
        self._waiting, self._sent = [], time.monotonic()


class Trackio(Tracker):
    """A run in the project ``TRACKIO_PROJECT``, in trackio's own database on this machine."""

    def __init__(self, folder: Path, config: Mapping[str, Any], known_as: str | None) -> None:
        import trackio

        self._trackio: Any = trackio
        project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
        run: Any = trackio.init(
            project=project, name=known_as or folder.name, config=dict(config), resume="allow" if known_as else "never"
        )
        self.id = str(run.name)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self, *, finished: bool) -> None:  # noqa: ARG002 - it does not say
        self._trackio.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": Mlflow,
    "trackio": Trackio,
}
"""By the name in ``report_to``."""


def names_in(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The trackers that a run's record asks for."""
    return tuple(name for name in record["settings"].get("report_to", ()) if name in TRACKERS)


def recorded_config(record: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings, as trackers show them, from its record."""
    method = record["method"]
    values = {"method": method, **record["settings"], **record.get(method, {})}
    return {name: value for name, value in values.items() if value is not None and name != "report_to"}


@contextmanager
def tracked(
    names: tuple[str, ...], out: Path, configs: Mapping[str | None, Mapping[str, Any]], report: Reporter
) -> Iterator[Reporter]:
    """A reporter that also tells the trackers of those ``names``; ``report`` itself where there are none.

    Args:
        names: keys of ``TRACKERS``.
        out: the run's folder, or that of a comparison, with a folder for each method inside.
        configs: settings by the method that events name.
        report: is told every event first.

    Raises ``MissingLibraryError`` for a tracker that is not installed, and ``SettingError`` for one that cannot start.
    """
    if not names:
        yield report
        return
    for name in names:
        _check_installed(name)
    listener = _Listener(names, out, configs, report)
    try:
        yield listener
    finally:
        listener.close(finished=False)


def _check_installed(name: str) -> None:
    from importlib import import_module

    with needs_extra(name):
        import_module("torch.utils.tensorboard" if name == "tensorboard" else name)


class _Listener:
    """Tells trackers what events say."""

    def __init__(
        self, names: tuple[str, ...], out: Path, configs: Mapping[str | None, Mapping[str, Any]], report: Reporter
    ) -> None:
        self._names, self._out, self._configs, self._report = names, out, configs, report
        self._trackers: dict[str, Tracker] = {}
        self._step, self._seen_step, self._seen_epoch = 0, 0, 0

    def __call__(self, event: Event) -> None:
        self._report(event)
        if isinstance(event, TrainingStarted):
            self.close(finished=False)
            self._open(event.method)
            if not self._seen_step:
                self._log(0, {"trainable_parameters": event.trainable})
        elif isinstance(event, StepTaken):
            self._step = event.step
            if event.step > self._seen_step:
                self._log(event.step, {"train/loss": event.loss, "train/learning_rate": event.learning_rate})
        elif isinstance(event, EpochEnded) and event.epoch > self._seen_epoch:
            values = {"epoch": event.epoch, "train/epoch_loss": event.loss, f"held_out/{event.metric}": event.score}
            self._log(self._step, values)
        elif isinstance(event, Finished):
            scores = (event.result or {}).get("scores", {})
            self._log(self._step, {f"test/{name}": value for name, value in scores.items()})
            self.close(finished=True)

    def close(self, *, finished: bool) -> None:
        """End what is open."""
        for name, tracker in self._trackers.items():
            try:
                tracker.close(finished=finished)
            except tracker.failures() as error:
                self._say_lost(name, error)
        self._trackers = {}

    def _open(self, method: str | None) -> None:
        """Start the trackers of one method's run, or go on with them."""
        folder = self._out / method if method else self._out
        config, known = self._configs[method], _stored_ids(folder)
        self._step = self._seen_step = self._seen_epoch = 0
        if known:
            self._look_back(folder)
        for name in self._names:
            cls = TRACKERS[name]
            try:
                self._trackers[name] = cls(folder, config, known.get(name))
            except cls.failures() as error:
                raise SettingError(f"cannot start: {error}", setting="report_to", given=name) from error
        if folder.is_dir():
            ids = {name: tracker.id for name, tracker in self._trackers.items()}
            write_atomic(folder / _IDS, json.dumps(known | ids) + "\n")

    def _look_back(self, folder: Path) -> None:
        """What the trackers were told before the run was stopped, also of steps that are taken again."""
        from capotune.engine.metrics_log import read_metrics

        for line in read_metrics(folder):
            self._seen_step = self._step = max(self._seen_step, line.get("step", 0))
            self._seen_epoch = max(self._seen_epoch, line.get("epoch", 0))

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(step, values)
            except tracker.failures() as error:
                del self._trackers[name]
                self._say_lost(name, error)

    def _say_lost(self, name: str, error: Exception) -> None:
        self._report(Warned(text=f"{name} gets no more of this run ({error}); metrics.jsonl has all of it."))


def _stored_ids(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / _IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}
