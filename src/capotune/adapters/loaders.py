"""What each program that runs models takes of an adapter, and what becomes of an adapter for it.

Read in the programs' sources in August 2026: vLLM ``lora/peft_helper.py``, SGLang ``lora/``, llama.cpp
``convert_lora_to_gguf.py`` and ``llama-adapter.cpp``, Ollama ``convert/`` and ``server/``. A program reads alpha and r
alone (rsLoRA is then scaled wrongly without a word), refuses DoRA, or looks at no prompt; ``capo export`` changes what
can be changed, and merges or refuses the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from capotune import methods
from capotune.adapters.store import StoredAdapter

Form = Literal["adapter", "merged"]
"""What is written: an adapter, or a whole model."""


@dataclass(frozen=True)
class Loader:
    """A program that runs models."""

    name: str
    """As ``capo export --for`` has it."""
    title: str
    serves: str
    """What it is for, in words."""
    deltas: bool = True
    """Whether it takes LoRA adapters."""
    most_rank: int | None = None
    """Largest rank that it can be told to take; None: any."""
    least_rank: int = 1
    """Ranks below are padded to it."""
    magnitudes: bool = False
    """Whether it takes DoRA."""
    prompts: bool = False
    """Whether it takes soft prompts."""
    models: bool = True
    """Whether it takes whole models."""
    heads: bool = False
    """Whether it takes the head that a task of labels puts on a base."""
    uniform: bool = False
    """Whether a layer's name must stand in every block."""
    graphs: bool = False
    """Whether it takes base, adapter and head as one graph, whatever was trained."""


LOADERS = {
    one.name: one
    for one in (
        Loader("peft", "PEFT", "loading in Python", magnitudes=True, prompts=True, models=False, heads=True),
        Loader("vllm", "vLLM", "serving on GPUs", most_rank=512, least_rank=8, uniform=True),
        Loader("sglang", "SGLang", "serving on GPUs", most_rank=512, least_rank=8, uniform=True),
        Loader("llama.cpp", "llama.cpp", "running GGUF files", most_rank=512),
        Loader("ollama", "Ollama", "running GGUF files", most_rank=512),
        Loader("transformers", "Transformers", "loading in Python without an adapter", deltas=False, heads=True),
        Loader("onnx", "ONNX Runtime", "running encoders without PyTorch", deltas=False, heads=True, graphs=True),
    )
}  # fmt: skip
"""By name."""


@dataclass(frozen=True)
class Traits:
    """What of an adapter decides which programs take it."""

    ranks: tuple[int, ...]
    """Of its LoRA deltas, each once; empty where it has none."""
    narrowest: int
    """Largest min(out, in) of its layers: the rank with which any change of them is exact."""
    magnitudes: bool
    """DoRA."""
    scales: tuple[float, ...]
    """Factors of the deltas, each once."""
    blocks: bool
    """Whether it changes weights in another way than by deltas."""
    soft_prompt: bool
    head: bool
    of_peft: bool = False
    """Whether PEFT wrote it."""

    @property
    def plain(self) -> bool:
        """Whether alpha/r, an integer alpha and one rank say all of its deltas."""
        one = len(self.ranks) == len(self.scales) == 1 and not self.magnitudes
        return one and (self.ranks[0] * self.scales[0]).is_integer()

    @property
    def deltas(self) -> bool:
        """Whether it changes weights by LoRA deltas."""
        return bool(self.ranks)


@dataclass(frozen=True)
class Verdict:
    """What becomes of an adapter for a program."""

    loader: Loader
    form: Form | None
    """What ``capo export`` writes; None: nothing can be."""
    as_it_is: bool
    """Whether the program takes the adapter folder without an export."""
    why: str
    """A sentence: what has to change, or why nothing can be written."""
    instead: str | None = None
    """Where nothing can be: the nearest way out."""


def traits(stored: StoredAdapter, has_head: bool) -> Traits:
    """Of a stored adapter, whose task puts a head on the base or not. Raises ``AdapterError`` for damaged tensors."""
    method = methods.get(stored.settings.method)
    deltas = method.low_rank(stored.settings, stored.tensors) or {}
    replaced = method.replaced_weights(stored.settings, stored.tensors)
    virtual_tokens = stored.settings.virtual_tokens
    return Traits(
        tuple(sorted({one.rank for one in deltas.values()})),
        max((min(one.shape) for one in deltas.values()), default=0),
        any(one.magnitude is not None for one in deltas.values()),
        tuple(sorted({one.scale for one in deltas.values()})),
        any(path.count(".") > 1 for path in replaced) or (stored.is_foreign and not deltas and not virtual_tokens),
        virtual_tokens > 0,
        has_head,
        stored.is_foreign,
    )


def verdicts(stored: StoredAdapter, has_head: bool) -> list[Verdict]:
    """One for each known program; raises as ``traits``."""
    found = traits(stored, has_head)
    return [judge(found, loader) for loader in LOADERS.values()]


_AS_GRAPH = "Give `loader=onnx`: base, adapter and head as one graph."


def judge(adapter: Traits, loader: Loader) -> Verdict:
    """What becomes of an adapter with these traits for ``loader``."""

    def refused(why: str, instead: str) -> Verdict:
        return Verdict(loader, None, False, why, instead)

    if adapter.of_peft and loader.name == "peft":
        return Verdict(loader, "adapter", True, "PEFT wrote it.")
    if adapter.head and not loader.heads:
        return refused(
            f"{loader.title} runs models that write text, and this adapter's head gives labels.",
            "Give `loader=transformers`: the merged base, with the head as an adapter of it."
            if adapter.deltas or adapter.blocks
            else _AS_GRAPH,
        )
    if loader.graphs:
        return _graph(adapter, loader, refused)
    if not (adapter.deltas or adapter.blocks):
        return _prompt(adapter, loader, refused)
    if loader.magnitudes and (adapter.magnitudes or adapter.head) and adapter.deltas:
        return Verdict(loader, "adapter", True, "it takes the adapter as it is.")
    merged = _why_merged(adapter, loader)
    if merged is None:
        changed = _changes(adapter, loader)
        return Verdict(loader, "adapter", False, changed or "it takes the adapter as it is, which is written anew.")
    if not loader.models:
        return refused(
            f"{loader.title} knows no such adapter: {merged}.", "Give `loader=transformers` for the merged model."
        )
    return Verdict(loader, "merged", False, f"the change is merged into a whole model: {merged}.")


def _graph(adapter: Traits, loader: Loader, refused: Callable[[str, str], Verdict]) -> Verdict:
    """Of a program that runs graphs: labels and tags take one forward pass, text takes a loop with a cache."""
    if not adapter.head:
        return refused(
            f"a graph for {loader.title} gives labels or tags, and this adapter writes text.",
            "Give `loader=peft`." if adapter.soft_prompt else "Give `loader=llama.cpp`, which needs no PyTorch either.",
        )
    return Verdict(loader, "merged", False, "base, adapter and head are written as one graph.")


def _prompt(adapter: Traits, loader: Loader, refused: Callable[[str, str], Verdict]) -> Verdict:
    """Of adapters that change no weight."""
    if adapter.soft_prompt and loader.prompts:
        return Verdict(loader, "adapter", True, "it takes the trained vectors as they are.")
    what = "vectors are trained and no weight changes" if adapter.soft_prompt else "no weight changes"
    nearest = "Give `loader=peft` (`capo generate` uses it as it is); or train lora, which every program takes."
    return refused(f"{loader.title} takes changes of weights, and here {what}.", _AS_GRAPH if adapter.head else nearest)


def _why_merged(adapter: Traits, loader: Loader) -> str | None:
    """Why no adapter can be written for it; None: one can."""
    if adapter.blocks:
        return "weights were trained that have no LoRA delta"
    if not loader.deltas:
        return "it loads models without adapters"
    limit = loader.most_rank
    if adapter.magnitudes and not loader.magnitudes and limit is not None and adapter.narrowest > limit:
        return (
            f"DoRA rescales every row, so that its delta has the full rank {adapter.narrowest}, and the most that "
            f"{loader.title} takes is {limit}"
        )
    if limit is not None and max(adapter.ranks) > limit:
        return f"its rank is {max(adapter.ranks)}, and the most that {loader.title} takes is {limit}"
    return None


def _changes(adapter: Traits, loader: Loader) -> str:
    """What an adapter for it has to change, a sentence; empty: nothing."""
    if adapter.magnitudes and not loader.magnitudes:
        return "DoRA is written as an exact LoRA delta of full rank."
    if not adapter.plain and not adapter.magnitudes:
        return "scales are folded into B, and ranks padded to one, so that alpha/r says all."
    if loader.name in ("llama.cpp", "ollama"):
        return "it is written as GGUF, with the order of rows that llama.cpp has."
    return ""
