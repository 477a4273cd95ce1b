"""An adapter written for another program, read back from disk, and compared with the adapter on rows.

The adapter is put on its base first: what it answers on the rows, and what the base alone answers, is what the result
is measured by. Then it is written in the form that ``adapters.loaders`` finds for the program, read back as the program
reads it, and asked the same. The folder is complete and compared, or absent.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capotune import methods
from capotune.adapters.assemble import Assembled
from capotune.adapters.files import CONFIG, RECORD, WEIGHTS, inside
from capotune.adapters.gguf_adapter import read_gguf_adapter, write_gguf_adapter
from capotune.adapters.loaders import LOADERS, Loader, Verdict, judge, traits
from capotune.adapters.portable import Portable, check_same, dense_weight, portable, read_peft, write_peft
from capotune.adapters.store import CARD, StoredAdapter, find_base, read_adapter
from capotune.conversion_settings import ExportSettings
from capotune.data.batches import Encoded
from capotune.device import pick_device
from capotune.errors import SettingError
from capotune.evaluation.agreement import Agreement, Precision, agreement, computes_in, least, precision_of
from capotune.evaluation.divergence import SHORT_TEXT
from capotune.events import Reporter, Stage, alive, counter, ignore
from capotune.files import output_folder, write_atomic
from capotune.models.architecture import plain_linear, swap
from capotune.models.base import Base
from capotune.models.gguf.cache import GgufModel
from capotune.models.gguf.converted import converted
from capotune.models.gguf.metadata import architecture_in_gguf
from capotune.models.gguf.write import write_model
from capotune.models.load import load_causal_lm
from capotune.runs import onnx
from capotune.runs.asking import ask, ask_with_and_without, rows_to_ask
from capotune.runs.merging import HEAD, load_merged_model, on_merged_weights, write_merged_model
from capotune.tasks.generation.encoding import TextEncoder
from capotune.tasks.generation.modelfile import modelfile
from capotune.tasks.loading import load_adapter, task_class

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for ``--max-lora-rank``."""
_GGUF = ("llama.cpp", "ollama")
ADAPTER_FILE, MODEL_FILE, BASE_FILE, MODELFILE = "adapter.gguf", "model.gguf", "base.gguf", "Modelfile"


@dataclass
class _Export:
    """One export while it is made."""

    settings: ExportSettings
    loader: Loader
    stored: StoredAdapter
    assembled: Assembled
    """The base; the adapter is taken off once it was asked."""
    rows: list[Encoded]
    new: Path
    """The folder while it is filled."""
    report: Reporter
    precision: Precision
    """Of the result."""
    said: list[str] = field(default_factory=list)
    """What was changed, a sentence each."""

    @property
    def base(self) -> Base:
        return self.assembled.base

    @property
    def out(self) -> Path:
        return self.settings.out.absolute()

    def ask(self, model: Any) -> Tensor:
        return ask(self.assembled.task, model, self.rows, self.report)


def export(settings: ExportSettings, report: Reporter) -> dict[str, Any]:
    """Write ``settings.adapter`` for ``settings.loader`` into ``settings.out``; returns what was done and measured.

    Raises ``SettingError`` when the program cannot take such an adapter, with the nearest way out; ``AdapterError``
    when base and adapter do not fit, or the result answers as the base or otherwise than the adapter.
    """
    loader = LOADERS[settings.loader]
    stored = read_adapter(settings.adapter, allow_different_base=settings.allow_different_base)
    verdict = _verdict(settings, stored, loader)
    device = pick_device()
    trust = settings.trust_remote_code
    asked = stored
    if verdict.form == "merged" and not loader.graphs:  # a graph is of what ``predict`` computes
        base = find_base(stored, settings.model, trust_remote_code=trust, report=report)
        asked = on_merged_weights(stored, base, base.is_quantized)
    assembled = load_adapter(asked, model=settings.model, device=device, trust_remote_code=trust, report=report)
    if loader.name in _GGUF:
        architecture_in_gguf(assembled.base)  # refused before anything is written
    if loader.graphs:
        onnx.check_libraries()
    rows = rows_to_ask(assembled.task, settings.data)
    with output_folder(settings.out) as new:
        making = _Export(settings, loader, stored, assembled, rows, new, report, computes_in(stored.dtype))
        report(Stage(text=f"writing for {loader.title}"))
        if verdict.as_it_is:
            found, command = None, _copy(making)
        elif loader.graphs:
            found, command = _write_graph(making, verdict)
        else:
            report(Stage(text="asking the adapter and the base"))
            adapter, alone = ask_with_and_without(assembled, rows, report)
            result, command = _write(making, verdict)
            found = agreement(rows, adapter, alone, result)
            found.check(making.precision, str(settings.out))
    return _described(making, verdict, found, command)


def _verdict(settings: ExportSettings, stored: StoredAdapter, loader: Loader) -> Verdict:
    verdict = judge(traits(stored, task_class(stored).has_head), loader)
    if verdict.form is None:
        raise SettingError(verdict.why, setting="loader", given=loader.name, advice=verdict.instead)
    if settings.merged and not loader.models:
        raise SettingError(
            f"{loader.title} loads adapters, and no whole model.", setting="merged", advice="Leave it out."
        )
    if settings.merged and verdict.form == "adapter":
        return Verdict(loader, "merged", False, "the change is merged into a whole model, as asked.")
    return verdict


def _write(making: _Export, verdict: Verdict) -> tuple[Tensor, str]:
    """Write and read back; the result's answers, and the command that runs it."""
    making.said.append(verdict.why[0].upper() + verdict.why[1:])
    if verdict.form == "adapter":
        return _write_adapter(making)
    if making.loader.name in _GGUF:
        return _write_gguf_model(making)
    return _write_folder(making)


def _write_adapter(making: _Export) -> tuple[Tensor, str]:
    stored, assembled = making.stored, making.assembled
    deltas = methods.get(stored.settings.method).low_rank(stored.settings, stored.tensors)
    assert deltas is not None
    written = portable(deltas, assembled, making.loader)
    making.said += written.changes
    if making.loader.name in _GGUF:
        write_gguf_adapter(making.new / ADAPTER_FILE, written, making.base, assembled.model)
        found = read_gguf_adapter(making.new / ADAPTER_FILE, written, making.base, assembled.model)
        command = _gguf_command(making, _base_file(making))
    else:
        write_peft(written, assembled, making.new, assembled.task.peft_task_type, making.base.lasting_name)
        found = read_peft(making.new)
        command = _served(making, written)
    check_same(written, found, making.settings.out)
    _add(assembled, found)
    return making.ask(assembled.model), command


def _add(assembled: Assembled, adapter: Portable) -> None:
    """Every layer with its delta in its weight, which is how a program that scales by alpha/r computes it."""
    for path in adapter.layers:
        layer: Any = assembled.model.get_submodule(path)
        changed = plain_linear((dense_weight(layer) + adapter.delta(path)).to(assembled.model.device), layer.bias)
        swap(assembled.model, path, changed)


def _copy(making: _Export) -> str:
    """The adapter folder byte by byte, where the program takes it so; the command that loads it."""
    for name in (CONFIG, WEIGHTS, RECORD, CARD):
        if (path := inside(making.stored.folder, name)).is_file():
            shutil.copyfile(path, making.new / name)
    making.said.append(f"{making.loader.title} takes the adapter as it is; its files are copied byte by byte.")
    return _python_command(making)


def _write_folder(making: _Export) -> tuple[Tensor, str]:
    """A merged Transformers folder."""
    merged = _merge(making, making.new)
    out, answers = making.out, making.ask(load_merged_model(making.stored, merged))
    if (merged.folder / HEAD).is_dir():
        return answers, f'capo predict {out / HEAD} "your text"'
    commands = {
        "vllm": f"vllm serve {out}",
        "sglang": f"python -m sglang.launch_server --model-path {out}",
        "transformers": f"transformers.{_auto_class(making)}.from_pretrained({str(out)!r})",
    }
    return answers, commands[making.loader.name]


def _write_graph(making: _Export, verdict: Verdict) -> tuple[Agreement, str]:
    """Base, adapter and head as an ONNX graph, asked by ONNX Runtime what ``predict`` is asked."""
    assembled, ids = making.assembled, [one.ids for one in making.rows]
    making.said.append(verdict.why[0].upper() + verdict.why[1:])
    adapter = assembled.task.distributions(assembled.task.logits_of_ids(assembled, ids))
    onnx.write_onnx(assembled, making.new)
    base = assembled.task.distributions(onnx.answers_of_base(assembled, ids))
    result = onnx.read_onnx(making.new, ids, assembled.task.pad_id, alive(making.report))
    result = assembled.task.distributions(result)
    onnx.check_tokens(making.new, making.base, SHORT_TEXT.splitlines())
    difference = onnx.check_logits(adapter, result)
    making.said.append(f"ONNX Runtime's logits differ from the adapter's by at most {difference:.2g}.")
    found = agreement(making.rows, adapter, base, result)
    found.check(making.precision, str(making.settings.out))
    return found, f'onnxruntime.InferenceSession("{making.out / onnx.MODEL}")'


def _merge(making: _Export, folder: Path) -> Base:
    """The merged model as a Transformers folder, in the precision of the base."""
    folder.mkdir(exist_ok=True)
    base = making.base
    making.precision = least(making.precision, precision_of(base))
    merged = Base(str(making.settings.out), folder, base.trust_remote_code)
    _, notices = write_merged_model(making.stored, base, merged, requantize=base.is_quantized, report=making.report)
    making.said += notices
    return merged


def _auto_class(making: _Export) -> str:
    labels = making.assembled.task.has_head
    return "AutoModelForSequenceClassification" if labels else "AutoModelForCausalLM"


def _write_gguf_model(making: _Export) -> tuple[Tensor, str]:
    path = making.new / MODEL_FILE
    making.assembled.model.to("meta")  # it was asked: its memory is free for the model that is read back
    merged = _merge(making, making.new / ".merged")
    _write_gguf(making, path, merged)
    making.precision = least(making.precision, making.settings.gguf_type)
    shutil.rmtree(merged.folder)
    answers = making.ask(_read_gguf(making, path))
    return answers, _gguf_command(making, None)


def _write_gguf(making: _Export, path: Path, weights: Base) -> None:
    task: TextEncoder = making.assembled.task
    write_model(
        path,
        weights,
        making.base,
        making.settings.gguf_type,
        end_ids=task.end_ids,
        chat_template=task.chat_template,
        progress=counter(making.report),
    )


def _read_gguf(making: _Export, path: Path) -> Any:
    """The model of a GGUF file, read as any is, in a folder that goes again."""
    folder = making.new / ".read"
    gguf = GgufModel(path, folder / "whole", ignore)
    model = load_causal_lm(Base(str(path), gguf.described(), gguf=gguf), dtype=torch.float32)
    shutil.rmtree(folder)
    return model


def _base_file(making: _Export) -> str:
    """The base in GGUF that the adapter is to be loaded on: the file it came from, or one that is written beside it."""
    if making.base.gguf is not None:
        return str(making.base.gguf.path.absolute())
    _write_gguf(making, making.new / BASE_FILE, making.base)
    making.said.append(f"{BASE_FILE} is the base as GGUF; any other GGUF file of the same model does as well.")
    return f"./{BASE_FILE}"


def _gguf_command(making: _Export, base: str | None) -> str:
    """How llama.cpp or Ollama runs it; None: one file holds all."""
    out = making.out
    if making.loader.name == "llama.cpp":
        if base is None:
            return f"llama-server -m {out / MODEL_FILE}"
        where = out / BASE_FILE if base.startswith("./") else base
        return f"llama-server -m {where} --lora {out / ADAPTER_FILE}"
    model, adapter = (f"./{MODEL_FILE}", None) if base is None else (base, f"./{ADAPTER_FILE}")
    text, notices = modelfile(making.assembled.task, model, adapter)
    write_atomic(making.new / MODELFILE, text)
    making.said += notices
    return f"cd {out} && ollama create {making.settings.out.name} -f {MODELFILE}"


def _served(making: _Export, adapter: Portable) -> str:
    """The command line that serves the folder."""
    out, name = making.out, making.settings.out.name
    base = making.base.lasting_name if making.base.gguf is None else str(converted(making.base, None).folder)
    if making.loader.name == "vllm":
        rank = next(one for one in _RANKS if one >= adapter.rank)
        return f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={out}"
    if making.loader.name == "sglang":
        return (
            f"python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {adapter.rank} "
            f"--lora-paths {name}={out}"
        )
    return _python_command(making)


def _python_command(making: _Export) -> str:
    base = f'capotune.load_base("{making.stored.folder.absolute()}")'
    return f'peft.PeftModel.from_pretrained({base}, "{making.out}")'


def _described(making: _Export, verdict: Verdict, found: Agreement | None, command: str) -> dict[str, Any]:
    settings = making.settings
    if found is not None and settings.data is None:
        found = replace(found, recovered=None)  # a gain on lines of ours would mean nothing
    return {
        "adapter": str(settings.adapter),
        "loader": making.loader.name,
        "form": verdict.form,
        "base": making.base.name,
        "out": str(settings.out),
        "changes": making.said,
        "files": sorted(path.name for path in settings.out.iterdir()),
        "command": command,
        "agreement": None if found is None else asdict(found),
    }
