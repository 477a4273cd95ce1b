"""Capotune's side of ``engine.py``, and all that the benchmark asks of Capotune's training engine."""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _engine_clock import Clock
from _engine_data import DEVICE, VIRTUAL_TOKENS, Job, dtype_of, without_dropout
from _engine_workloads import Workload
from safetensors.torch import load_file, save_file

from capotune.adapters.assemble import Assembled, assemble, attach
from capotune.data.batches import TokenRows, epoch_order
from capotune.engine import loop, recorded
from capotune.engine.activation_cache import ActivationCache
from capotune.engine.recorded import with_boundary
from capotune.engine.state import TrainingState
from capotune.engine.state import start as start_state
from capotune.evaluation.forward import Examples
from capotune.methods.base import Start
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.models.base import find
from capotune.runs.run import Prepared, prepare
from capotune.settings import Context, TrainingSettings, TrainSettings
from capotune.tasks.classification import Classification
from capotune.tasks.generation import Generation

# -------------------------------------------------------------------------------------------------------- a run


def run(job: Job, clock: Clock) -> None:
    """Train as Capotune does, on the job's batches."""
    (solve_head if job.workload.solved else train)(job, clock)


def train(job: Job, clock: Clock) -> None:
    """Capotune's own loop from the given first weights; the order of the rows is the job's, nothing is held out."""
    options = dict(job.contender.options)
    second = options.pop("second_run", False)  # what the first left in the cache is there
    settings = settings_of(job.workload, job.comparison.batch_size, **options)
    model = assembled(job.workload, settings, job.base)
    if job.start.is_file():
        start = load_file(job.start)
        with torch.no_grad():
            for key, weight in model.trainable().items():
                weight.copy_(start[key])
    without_dropout(model.model)
    rows = TokenRows(job.rows["sequences"], model.task.pad_id)
    targets = torch.tensor(job.rows["targets"]) if job.workload.classifies else job.rows["targets"]
    examples = Examples(rows, targets).after(model.method.virtual_token_ids)
    epochs = [[np.array(batch) for batch in epoch] for epoch in job.rows["epochs"]]

    def on_step(state: TrainingState, _total: int, loss: float) -> bool:
        clock.losses.append(loss)
        clock.step()
        return state.step == job.steps

    with tempfile.TemporaryDirectory() as folder:
        state = start_state(model, (0.0,), 0)
        if second:
            with_boundary([examples], model, ActivationCache(Path(folder), {}), lambda _: None)
        clock.begin()
        (examples,) = with_boundary([examples], model, ActivationCache(Path(folder), {}), lambda _: None)
        loop.train(
            model, examples, model.method.settings, seed=0, state=state, on_step=on_step, evaluate=lambda: (0.0,),
            batches=epochs.__getitem__,
        )  # fmt: skip


def solve_head(job: Job, clock: Clock) -> None:
    """Feature extraction from nothing cached to the solved head, and its accuracy on the test rows."""
    prepared = labelled(job.workload, job.folder, FeatureExtractionSettings())
    task_run = prepared.task_run
    model = assemble(task_run.task, prepared.method, device=DEVICE)
    with tempfile.TemporaryDirectory() as folder:
        cache = ActivationCache(Path(folder), {})
        clock.begin()
        task_run.before_attach(model, cache, lambda _: None)
        attach(model, Start(torch.Generator().manual_seed(0)))
        task_run.fit(recorded.Recording(prepared.settings.out, recorded.Clock(cache)), model, cache, lambda _: None)
        clock.step()
        clock.accuracy, clock.epochs = task_run.test(model, cache, lambda _: None).scores["accuracy"], 1


# -------------------------------------------------------------------------------------------------------- the model


def settings_of(work: Workload, batch_size: int, **options: Any) -> TrainingSettings:
    """What Trainer does by default, in Capotune's words."""
    common = {
        "learning_rate": work.learning_rate, "head_learning_rate": work.learning_rate, "warmup": 0.0,
        "schedule": "linear", "weight_decay": 0.0, "max_grad_norm": 1.0, "batch_size": batch_size,
        "epochs": work.epochs, "patience": work.epochs, **options,
    }  # fmt: skip
    if work.method == "prompt-tuning":
        return PromptTuningSettings(num_virtual_tokens=VIRTUAL_TOKENS, deep=False, **common)
    if work.method == "feature-extraction":
        return FeatureExtractionSettings(trainable_layers=work.trainable_layers, **common)
    return {"lora": LoraSettings, "qlora": QloraSettings}[work.method](rank=work.rank, alpha=2 * work.rank, **common)


def assembled(work: Workload, settings: TrainingSettings, base: dict[str, Any]) -> Assembled:
    """The base with the method attached."""
    source = find("minilm" if work.classifies else base["folder"])
    tokens: list[int] = []
    if work.classifies:
        virtual = VIRTUAL_TOKENS if work.method == "prompt-tuning" else 0
        task: Any = Classification.on(source, base["labels"], None, virtual)
        tokens = task.tokenizer(", ".join(base["labels"]), add_special_tokens=False, verbose=False)["input_ids"]
    else:
        task = Generation.on(source, None, 0)
    complete = settings.completed(Context(source.hidden_size, task.has_head))
    model = assemble(task, complete, device=DEVICE, dtype=dtype_of(work))
    attach(model, Start(torch.Generator().manual_seed(0), tokens))
    return model


def write_start(work: Workload, folder: Path) -> None:
    """The weights that everybody begins with: Capotune's own first ones."""
    torch.manual_seed(0)  # the head's
    base = json.loads((folder / "base.json").read_text(encoding="utf-8"))
    weights = assembled(work, settings_of(work, 8), base).trainable()
    save_file({key: weight.detach().cpu() for key, weight in weights.items()}, folder / "start.safetensors")


# -------------------------------------------------------------------------------------------------------- the rows


def labelled(work: Workload, folder: Path, method: TrainingSettings) -> Prepared:
    """Banking77, read and tokenised as ``capo train`` does; with ``rows``, an evenly taken part of it."""
    files = [work.data() / "train.csv", work.data() / "test.csv"]
    if work.rows is not None:
        files = [_part(path, folder / path.name, work.rows) for path in files]
    settings = TrainSettings(data=str(files[0]), test=str(files[1]), model="minilm", out=folder / "unused")
    return prepare(settings, method, lambda _: None)


def write_labelled(work: Workload, folder: Path) -> tuple[dict[str, Any], str]:
    """Write base and test rows; the training rows, and what they are."""
    prepared = labelled(work, folder, settings_of(work, 8))
    run: Any = prepared.task_run
    base = {"folder": str(prepared.base.folder), "labels": list(run.task.labels)}
    test, train = run.data.test, run.train
    tests = {"sequences": run.task.encode(test.texts), "targets": run.task.targets(test.labels).tolist()}
    (folder / "base.json").write_text(json.dumps(base), encoding="utf-8")
    (folder / "test.json").write_text(json.dumps(tests), encoding="utf-8")
    return {"sequences": train.rows.sequences, "targets": train.targets.tolist()}, "Banking77's train.csv"


def grouped_batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Rows of like length together, shuffled: the order that Capotune trains in."""
    return [batch.tolist() for batch in epoch_order(lengths, batch_size, 0, 0)]


def _part(whole: Path, part: Path, rows: int) -> Path:
    with whole.open(encoding="utf-8", newline="") as source, part.open("w", encoding="utf-8", newline="") as to:
        head, *lines = csv.reader(source)
        csv.writer(to).writerows([head, *lines[:: max(1, len(lines) // rows)]])
    return part
