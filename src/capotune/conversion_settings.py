"""Settings of what makes something else of an adapter or a base, or sets two adapters beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from capotune.memory_table import DataSource
from capotune.settings import BaseSettings, Count, Settings


class MergeSettings(BaseSettings):
    """An adapter's change in its base's weights."""

    adapter: str
    """An adapter of lora, qlora, feature-extraction with trained blocks, or PEFT: its folder, or its name on the hub
    (`owner/name@revision`)."""
    out: Path
    """Folder for the merged model. Must not exist."""
    requantize: bool = False
    """qlora: add the change to what the 4 bits stand for, and quantize the sum again, instead of adding it to the base
    in full precision."""
    data: DataSource | None = None
    """Rows of your own, as in training: adapter and merged model are compared on 32 of them. Left out: some lines of
    ours."""
    trust_remote_code: bool = False
    """Allow a hub model to run its own Python code on this machine."""


class CombineSettings(Settings):
    """Several adapters of one base made into one."""

    adapters: tuple[str, ...]
    """Adapter folders, of lora or qlora, on one base, or adapters on the hub (`owner/name@revision`): two or more."""
    out: Path
    """Folder for the combined adapter. Must not exist."""
    method: Literal["linear", "svd", "ties", "dare", "dare-ties"] = "linear"
    """linear: the sum of the weighted changes, exact, its rank the sum of their ranks (what PEFT calls cat). svd: the
    same, rounded to `rank`. ties: of each adapter the largest values stay, and where signs differ the greater total
    decides (Yadav et al. 2023). dare: values are dropped at random and the others enlarged, then added, or with
    dare-ties merged as ties does (Yu et al. 2023)."""
    weights: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] = ()
    """A factor for each adapter, in their order; below 0 takes a change away. Left out: 1 for each, which adds the
    changes up. Heads for labels are averaged by these weights."""
    density: float = Field(default=0.2, gt=0, le=1)
    """ties, dare, dare-ties: part of each adapter's values that stays."""
    rank: Count | None = None
    """Rank of the result, but for linear. Left out: the largest of the adapters' for svd, else their sum."""
    seed: int = Field(default=0, ge=0)
    """dare, dare-ties: decides which values are dropped."""
    model: str | None = None
    """Where the adapters' base is, when not where the first one was trained."""
    trust_remote_code: bool = False
    """Allow a hub model to run its own Python code on this machine."""

    @property
    def factors(self) -> tuple[float, ...]:
        """The weights, one for each adapter."""
        return self.weights or (1.0,) * len(self.adapters)


LoaderName = Literal["peft", "vllm", "sglang", "llama.cpp", "ollama", "transformers", "onnx"]
"""A program that ``adapters.loaders`` knows."""


class ExportSettings(BaseSettings):
    """An adapter for another program."""

    adapter: str
    """Adapter folder, or an adapter on the hub (`owner/name@revision`)."""
    loader: LoaderName
    """The program that is to load it."""
    out: Path
    """Folder for what is written. Must not exist."""
    merged: bool = False
    """Write a whole model with the change in its weights, where an adapter beside the base would do too."""
    gguf_type: Literal["F32", "F16", "Q8_0"] = "F16"
    """llama.cpp, ollama: how a whole model's matrices are stored."""
    data: DataSource | None = None
    """Rows of your own, as in training: adapter and result are compared on 32 of them. Left out: some lines of ours."""
    trust_remote_code: bool = False
    """Allow a hub model to run its own Python code on this machine."""


class PushSettings(Settings):
    """An adapter on the hub."""

    adapter: str
    """Adapter folder."""
    repo: str
    """Repository on the hub, OWNER/NAME; made where it is missing."""
    private: bool = False
    """Make the repository a private one."""
    revision: str | None = None
    """Branch to push to; made where it is missing. Left out: main."""
    message: str | None = None
    """The commit's message."""
    model: str | None = None
    """The adapter's base as it is called on the hub, where it was trained on a folder of this machine."""


class DiffSettings(BaseSettings):
    """Two adapters beside each other."""

    adapter: str
    """Adapter folder, or an adapter on the hub (`owner/name@revision`)."""
    other: str
    """The one that it is compared with."""
    data: DataSource | None = None
    """Rows of your own, as in training: both answer 32 of them, and are compared."""


class QuantizeSettings(Settings):
    """A model in 4 bits."""

    model: str
    """Model to quantize: `minilm` or `smollm2` by name, a folder, a GGUF file, or a model id on the hub."""
    out: Path
    """Folder for the quantized model. Must not exist."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit code book."""
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share one scale."""
    double_quant: bool = True
    """Quantise the scales as well, to 8 bits."""
    report: bool = False
    """Show the worst layers and write report.json: each layer's error, and with `text` how the answers change."""
    text: str | None = None
    """A text file of your own: the model's answers on it are compared with those at full precision, which needs memory
    for the whole model."""
    trust_remote_code: bool = False
    """Allow a hub model to run its own Python code on this machine."""
