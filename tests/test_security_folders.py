"""A base's folder of a stranger: nothing in it runs, nothing outside it is read, and reading it ends."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from planted import MARKER, Plant, pickled
from safetensors import safe_open

from capotune.api import inspect
from capotune.errors import CapotuneError
from capotune.models.base import find
from capotune.models.load import load_backbone

CODE = f"""
from pathlib import Path
Path("{MARKER}").touch()
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
class Config(BertConfig): model_type = "strange"
class Model(BertModel): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""
FIFO = "fifo"


def use(folder: Path) -> None:
    """Texts are read and tokenised for it, and its weights loaded, as every command does."""
    rows = folder.parent / "rows.csv"
    texts = [f"{'a' * 30} {'x' * 30} {word} parcel {number}" for number in range(6) for word in ("late", "lost")]
    rows.write_text("text,label\n" + "".join(f"{text},{text.split()[2]}\n" for text in texts), encoding="utf-8")
    found = inspect(data=str(rows), model=str(folder))
    assert "refused" not in found, found["refused"]
    base = find(str(folder))
    _ = base.pooling, base.sentence_files.notices, base.generation_values, base.end_tokens
    load_backbone(base)


@pytest.fixture
def planted(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Plant], Path]:
    """A copy of a base with something planted in it, in which the process is then."""

    def make(plant: Plant) -> Path:
        folder = tmp_path / "outer" / "model"
        shutil.copytree(bert, folder)
        plant(folder)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", [str(folder), *sys.path])  # as where a program is started in it
        return folder

    return make


def unmarked(folder: Path) -> bool:
    return not list(folder.parent.rglob(MARKER)) and not Path(MARKER).exists()


def in_json(name: str, **values: Any) -> Plant:
    def change(folder: Path) -> None:
        path = folder / name
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**before, **values}), encoding="utf-8")

    return change


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def index(target: str) -> Plant:
    """All tensors in the file ``target``."""

    def change(folder: Path) -> None:
        with safe_open(folder / "model.safetensors", "pt") as file:
            names = list(file.keys())
        shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
        without_weights(folder)
        where = target.replace("OUTER", str(folder.parent))
        in_json("model.safetensors.index.json", weight_map=dict.fromkeys(names, where))(folder)

    return change


def instead(name: str, target: str) -> Plant:
    """A link to ``target`` in the place of a file, or a pipe that nobody writes into."""

    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        if target == FIFO:
            os.mkfifo(path)
            return
        (folder.parent / "secret").write_text('{"secret": "hunter2"}', encoding="utf-8")
        path.symlink_to(target.replace("OUTER", str(folder.parent)))

    return change


def code(*names: str) -> Plant:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(CODE, encoding="utf-8")

    return change


def in_tokenizer(**values: Any) -> Plant:
    return in_json("tokenizer.json", **values)


def both(*plants: Plant) -> Plant:
    return lambda folder: [plant(folder) for plant in plants]


def deep(name: str) -> Plant:
    return lambda folder: (folder / name).write_text('{"a":' * 100_000 + "1" + "}" * 100_000, encoding="utf-8")


def text(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


OWN = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoModelForCausalLM": "code.Model"}
POOLING = "sentence_transformers.models.Pooling"

REFUSED: dict[str, tuple[Plant, str]] = {
    "pickled weights": (both(without_weights, pickled("pytorch_model.bin")), "can run code and is not read"),
    "pickled shards": (
        both(
            without_weights, pickled("part.bin"), in_json("pytorch_model.bin.index.json", weight_map={"a": "part.bin"})
        ),
        "can run code and is not read",
    ),
    "pickle named by the configuration": (
        both(pickled("evil.bin"), in_json("config.json", transformers_weights="evil.bin")),
        "not a complete safetensors file",
    ),
    "pickle named by the index": (both(index("evil.bin"), pickled("evil.bin")), "not a complete safetensors file"),
    "weights above": (
        in_json("config.json", transformers_weights="../outside.safetensors"),
        "outside the model's folder",
    ),
    "shards above": (index("../outside.safetensors"), "outside the model's folder"),
    "shards by an absolute path": (index("OUTER/outside.safetensors"), "outside the model's folder"),
    "shards by a path of Windows": (index(r"C:\outside.safetensors"), "outside the model's folder"),
    "shards of a device": (index("/dev/zero"), "outside the model's folder"),
    "weights from a pipe": (instead("model.safetensors", FIFO), "no .*safetensors weights"),
    "weights from a device": (instead("model.safetensors", "/dev/zero"), "link to a file that is gone"),
    "configuration from a pipe": (instead("config.json", FIFO), "no config.json"),
    "configuration from a device": (instead("config.json", "/dev/zero"), "no config.json"),
    "configuration from outside": (instead("config.json", "OUTER/secret"), "link that leaves the folder"),
    "tokenizer from a device": (instead("tokenizer.json", "/dev/zero"), "tokenizer"),
    "tokenizer from a pipe": (instead("tokenizer.json", FIFO), "tokenizer"),
    "tokenizer from outside": (instead("tokenizer_config.json", "OUTER/secret"), "link that leaves the folder"),
    "template from outside": (instead("chat_template.jinja", "OUTER/secret"), "link that leaves the folder"),
    "settings of generation from outside": (instead("generation_config.json", "OUTER/secret"), "leaves the folder"),
    "pooling from outside": (
        both(
            lambda folder: (folder / "1_Pooling").symlink_to("/proc/self"),
            in_json("1_Pooling.json"),
            lambda folder: (folder / "modules.json").write_text(json.dumps([{"type": POOLING, "path": "../../etc"}])),
        ),
        "outside the model's folder",
    ),
    "pooling from a pipe": (
        both(
            instead("1_Pooling/config.json", FIFO),
            lambda folder: (folder / "modules.json").write_text(json.dumps([{"type": POOLING, "path": "1_Pooling"}])),
        ),
        "is not there",
    ),
    "a tokenizer's file elsewhere": (
        in_json("tokenizer_config.json", tokenizer_file="/etc/passwd"),
        "outside the model's folder",
    ),
    "code of a configuration": (
        both(code("code.py"), in_json("config.json", auto_map=OWN, model_type="strange")),
        "Python code of its own, which is not run unasked",
    ),
    "code of the hub": (
        in_json("config.json", auto_map={"AutoConfig": "evil/repo--code.Config"}, model_type="strange"),
        "Python code of its own, which is not run unasked",
    ),
    "code in a part's configuration": (
        both(
            code("code.py"),
            in_json("config.json", text_config={"model_type": "strange", "auto_map": OWN}, model_type="llava"),
        ),
        "cannot be used",
    ),
    "trust that a configuration takes itself": (
        lambda folder: both(
            code("other/code.py"),
            in_json("other/config.json", auto_map=OWN, model_type="strange"),
            in_json(
                "config.json",
                model_type="lightglue",
                trust_remote_code=True,
                keypoint_detector_config={"model_type": "strange", "_name_or_path": str(folder / "other")},
            ),
        )(folder),
        r"asks for trust \(trust_remote_code is True\), which only you can give",
    ),
    "a kernel of the hub": (in_json("config.json", attn_implementation="evil/kernel"), "code from the hub"),
    "a kernel of the hub, inside": (
        in_json("config.json", text_config={"_attn_implementation": {"": "evil/kernel:code"}}),
        "code from the hub",
    ),
    "a kernel of the hub for experts": (
        in_json("config.json", experts_implementation="evil/kernel"),
        "code from the hub",
    ),
    "code of a quantization": (
        both(code("code.py"), in_json("config.json", quantization_config={"quant_method": "strange", "auto_map": OWN})),
        "stored in the format 'strange'",
    ),
    "a quantization that evaluates": (
        in_json("config.json", quantization_config={"quant_method": "torchao", "quant_type": "__import__('os')"}),
        "stored in the format 'torchao'",
    ),
    "nested configuration": (deep("config.json"), "nested too deep"),
    "nested tokenizer": (deep("tokenizer_config.json"), "tokenizer cannot be loaded"),
    "nested index": (both(without_weights, deep("model.safetensors.index.json")), "not an index of weights"),
    "a billion layers": (in_json("config.json", num_hidden_layers=10**9), "num_hidden_layers = 1,000,000,000"),
    "a wide layer": (in_json("config.json", hidden_size=2**40), "cannot be used"),
    "pattern that goes back": (in_tokenizer(pre_tokenizer=text("(a+)+$")), "tokenizer gives up at a text"),
    "replacement that goes back": (
        in_tokenizer(normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "z"}),
        "tokenizer gives up at a text",
    ),
    "replacements that double": (
        in_tokenizer(
            normalizer={
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40,
            }
        ),
        "would fill the memory",
    ),
    "a long replacement": (
        in_tokenizer(normalizer={"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 10**6}),
        "would fill the memory",
    ),
}
"""What is planted, and what is said."""

USED: dict[str, Plant] = {
    "pickles beside the weights": pickled(
        "pytorch_model.bin",
        "optimizer.pt",
        "scaler.pt",
        "scheduler.pt",
        "training_args.bin",
        "rng_state.pth",
        "adapter_model.bin",
        "prompt_embeddings.bin",
        "vocab.pkl",
        "data.joblib",
        "data.npy",
        "1_Dense/pytorch_model.bin",
    ),
    "code of a known model": both(code("code.py"), in_json("config.json", auto_map=OWN)),
    "code of a tokenizer": both(
        code("code.py"),
        in_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}),
    ),
    "a tokenizer's class by a path": both(
        code("code.py"), in_json("tokenizer_config.json", tokenizer_class="code.Tokenizer")
    ),
    "modules that Python knows": code(
        "torch.py",
        "json.py",
        "modeling_bert.py",
        "configuration_bert.py",
        "tokenization_bert.py",
        "sitecustomize.py",
    ),
    "a way to generate": both(
        code("custom_generate/generate.py"), in_json("generation_config.json", custom_generate="./custom_generate")
    ),
    "kernels asked for": in_json("config.json", use_kernels=True, kernel_config={"RMSNorm": "evil/kernel:RMSNorm"}),
    "a foreign module of sentence-transformers": both(
        code("code.py"),
        lambda folder: (folder / "modules.json").write_text(json.dumps([{"type": "code.Model", "path": ""}])),
    ),
    "pipes that need not be there": both(
        *(instead(name, FIFO) for name in ("generation_config.json", "special_tokens_map.json", "added_tokens.json"))
    ),
    "devices that need not be there": both(
        *(instead(name, "/dev/zero") for name in ("generation_config.json", "chat_template.jinja", "merges.txt"))
    ),
}
"""What is planted and passed over."""

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and links")


@pytest.mark.parametrize("name", REFUSED)
def test_folder_of_a_stranger_is_refused_in_one_message(
    name: str, planted: Callable[[Plant], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, message = REFUSED[name]
    kernels = ModuleType("kernels")  # as where it is installed
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    folder = planted(plant)
    with pytest.raises(CapotuneError, match=message) as caught:
        use(folder)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert unmarked(folder)


@pytest.mark.parametrize("name", USED)
def test_what_could_run_is_passed_over(name: str, planted: Callable[[Plant], Path]) -> None:
    folder = planted(USED[name])
    use(folder)
    assert unmarked(folder)
    assert not {"code", "modeling_bert", "sitecustomize"} & {
        name for name, module in sys.modules.items() if str(folder) in str(getattr(module, "__file__", ""))
    }


def test_the_exploits_work_where_they_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests above could fail."""
    monkeypatch.chdir(tmp_path)
    pickled("a.bin", "a.npy", "a.pkl")(tmp_path)
    for open_it in (
        lambda: torch.load("a.bin", weights_only=False),
        lambda: np.load("a.npy", allow_pickle=True),
        lambda: pickle.loads(Path("a.pkl").read_bytes()),
        lambda: exec(CODE, {}),
    ):
        open_it()
        assert Path(MARKER).exists()
        Path(MARKER).unlink()
