"""Real runs of generation: a small language model on three data sets, by every technique and by full fine-tuning.

The base is ``../shared/models/stories260K``, a Llama of 260,032 weights trained on children's stories; the data are
Shakespeare's plays (the last 10 % held out), WikiSQL and GSM8K. A model this small is a test of mechanics: it shows
that every technique learns, and how far each gets from the same start; it cannot show what a large model would answer.

Full fine-tuning is a method of this script alone: every weight of the base trains, which is what the four techniques
avoid. It stands here as the yardstick.

    python benchmarks/generation.py              every run, into results/generation.json, and the demonstration
    python benchmarks/generation.py wikisql      one data set again; the others' rows stay as they are
    python benchmarks/generation.py messages     the demonstration on SmolLM2, into results/demo-messages.json
    python benchmarks/generation.py expressions  the demonstration on capo-tiny, into results/demo-expressions.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from capotune.cli.demo import on_expressions, on_messages
from capotune.cli.main import compare
from capotune.methods import register
from capotune.methods.feature_extraction.method import FeatureExtraction
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.runs.run import run
from capotune.settings import TrainingSettings, TrainSettings

HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared"
RESULTS = HERE / "results" / "generation.json"
SHOWN = 5


class FullSettings(FeatureExtractionSettings):
    """Every weight trains."""

    method = "full-fine-tuning"


class FullFineTuning(FeatureExtraction):
    """No copies: the base itself, in memory, is what trains."""

    Settings = FullSettings

    def attach(self, model: nn.Module, architecture: Any, start: Any) -> None:  # noqa: ARG002
        self.model, self.architecture = model, architecture
        model.requires_grad_(True)

    def detach(self) -> None:
        raise NotImplementedError("the base is gone")

    def parameters(self) -> dict[str, nn.Parameter]:
        return {self.key_prefix + name: weight for name, weight in self.model.named_parameters()}

    def expected_parameters(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters())

    def first_trainable_block(self) -> int:
        return 0


EPOCHS = {"tinyshakespeare": 1, "wikisql": 3, "gsm8k": 2}
RUNS: dict[str, TrainingSettings] = {
    "feature extraction, last 2 blocks": FeatureExtractionSettings(),
    "LoRA": LoraSettings(),
    "QLoRA, NF4": QloraSettings(),
    "QLoRA, FP4": QloraSettings(quant_type="fp4"),
    "QLoRA, NF4 without double quantisation": QloraSettings(double_quant=False),
    "prompt tuning, before the input alone": PromptTuningSettings(deep=False),
    "full fine-tuning": FullSettings(trainable_layers=5, learning_rate=2e-3),
}


def data_sets(folder: Path) -> dict[str, dict[str, Any]]:
    """Settings of each data set, by name; the rows that are used are written into ``folder``."""
    gsm8k = (SHARED / "data" / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:600]
    (folder / "gsm8k.jsonl").write_text("\n".join(gsm8k) + "\n", encoding="utf-8")
    test = (SHARED / "data" / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    (folder / "gsm8k-test.jsonl").write_text("\n".join(test) + "\n", encoding="utf-8")
    for part in ("train", "test"):  # the question and the query, which stand in one field
        rows = (SHARED / "data" / "wikisql" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        pairs = [json.loads(row)["text"].partition("\nA: ") for row in rows]
        lines = [json.dumps({"prompt": f"{before}\nA:\n", "completion": after}) for before, _, after in pairs]
        (folder / f"wikisql-{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "tinyshakespeare": {
            "data": str(SHARED / "data" / "tinyshakespeare" / "input.txt"), "test_fraction": 0.1, "max_length": 256,
        },
        "wikisql": {"data": str(folder / "wikisql-train.jsonl"), "test": str(folder / "wikisql-test.jsonl")},
        "gsm8k": {"data": str(folder / "gsm8k.jsonl"), "test": str(folder / "gsm8k-test.jsonl")},
    }  # fmt: skip


def one_run(name: str, shared: dict[str, Any], method: TrainingSettings, out: Path, is_first: bool) -> dict[str, Any]:
    """One technique on one data set: its ``run.json``."""
    settings = TrainSettings(model=str(SHARED / "models" / "stories260K"), out=out, answers=50, cache=False, **shared)
    record = run(settings, method, base_score=is_first)
    print(f"  {name}: {record['result']['scores']}, {record['result']['train_seconds']:.0f} s", flush=True)
    return record


def row(name: str, record: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run."""
    kept = ("scores", "intervals", "trainable_parameters", "adapter_bytes", "train_seconds", "epochs", "best_epoch")
    method = record["method"]
    return {"technique": name, **{key: record["result"][key] for key in kept}, "settings": record[method]}


def main() -> None:
    """The data sets named on the command line, or all."""
    register(FullFineTuning)
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, shared in data_sets(Path(folder)).items():
            if sys.argv[1:] and name not in sys.argv[1:]:
                continue
            print(name, flush=True)
            records = {
                label: one_run(
                    label,
                    shared,
                    method.model_copy(update={"epochs": EPOCHS[name]}),
                    Path(folder) / f"{name}-{number}",
                    number == 0,
                )
                for number, (label, method) in enumerate(RUNS.items())
            }
            first = next(iter(records.values()))
            before[name] = {
                "settings": {**first["settings"], "data": name, "test": None, "out": None},
                "environment": first["environment"],
                "train_rows": first["result"]["train_rows"],
                "test_rows": first["result"]["test_rows"],
                "base_scores": first["base_scores"],
                "rows": [row(label, record) for label, record in records.items()],
            }
            RESULTS.write_text(json.dumps(before, indent=2) + "\n", encoding="utf-8")


DEMONSTRATIONS = {"messages": on_messages, "expressions": on_expressions}
"""Of ``capo demo generation``, with and without SmolLM2."""


def demonstration(name: str) -> None:
    """What ``capo demo generation`` finds."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        compare(DEMONSTRATIONS[name](out, {}), "capo demo generation")
        record(name, out)


def record(name: str, out: Path) -> None:
    """Of a comparison's folder the table, and the first answers of the base and of LoRA side by side."""
    content = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    content["environment"] = content.pop("details")["environment"]
    of_base = json.loads((out / content["rows"][0]["method"] / "run.json").read_text(encoding="utf-8"))["base_answers"]
    lines = (out / "lora" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    content["answers"] = [
        {"prompt": one["prompt"], "base": base["written"], "lora": one["written"], "expected": one["expected"]}
        for base, one in zip(of_base, map(json.loads, lines), strict=True)
    ][:SHOWN]
    path = HERE / "results" / f"demo-{name}.json"
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for name in DEMONSTRATIONS:
        if not sys.argv[1:] or name in sys.argv[1:]:
            demonstration(name)
    if SHARED.is_dir():
        main()
    else:
        print(f"{SHARED} is not there: the other runs are left out", file=sys.stderr)
