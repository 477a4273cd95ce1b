"""``capo quantize`` and ``capo merge``: a model's checkpoint written anew."""

from __future__ import annotations

import json
from typing import Any

import tyro
from rich.table import Table

from capotune.cli.console import terminal
from capotune.cli.export import describe_agreement
from capotune.cli.flags import Json, parse
from capotune.cli.grid import two_columns
from capotune.conversion_settings import MergeSettings, QuantizeSettings
from capotune.files import human_bytes

SHOWN_LAYERS = 5


class Quantize(QuantizeSettings):
    """Write a model with its linear weights in 4 bits, for Transformers with bitsandbytes and for qlora."""

    model: tyro.conf.Positional[str]
    """Model to quantize: `minilm` or `smollm2` by name, a folder, a GGUF file, or a model id on the hub."""
    as_json: Json = False
    """Print one JSON object."""


def quantize(rest: list[str]) -> int:
    """Run the command; returns the exit code."""
    given = parse(Quantize, rest, "capo quantize")
    from capotune import api

    values = {name: getattr(given, name) for name in QuantizeSettings.model_fields}
    from capotune.cli.display import watch_bytes

    with watch_bytes() as report:
        result = api.quantize(progress=report, **values)
    if given.as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        _show_quantized(result, given.report)
    return 0


class Merge(MergeSettings):
    """Write the base with the adapter's change in its weights: a checkpoint that Transformers loads without an adapter.
    Trained prompts change no weights, so they cannot be merged."""

    adapter: tyro.conf.Positional[str]
    """An adapter of lora, qlora, feature-extraction with trained blocks, or PEFT: its folder, or its name on the hub
    (`owner/name@revision`)."""
    as_json: Json = False
    """Print one JSON object."""


def merge(rest: list[str]) -> int:
    """Run the command; returns the exit code."""
    given = parse(Merge, rest, "capo merge")
    from capotune import api

    values = {name: getattr(given, name) for name in MergeSettings.model_fields}
    from capotune.cli.display import watch_bytes

    with watch_bytes() as report:
        result = api.merge(progress=report, **values)
    if given.as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        _show_merged(result)
    return 0


def _show_quantized(result: dict[str, Any], with_report: bool) -> None:
    grid = two_columns()
    share = result["quantized_weights"] / result["all_weights"]
    grid.add_row("weights", f"{share:.1%} of {result['all_weights']:,} in 4 bits ({len(result['layers'])} layers)")
    grid.add_row("size", f"{human_bytes(result['bytes_before'])} before, {human_bytes(result['bytes'])} now")
    grid.add_row("error", f"{result['relative_error']:.2%} of the quantized weights' norm")
    if "answers" in result:
        grid.add_row("answers", describe_answers(result["answers"]))
    grid.add_row("written to", result["out"])
    console = terminal()
    console.print(grid, highlight=False)
    if with_report:
        table = Table("worst layers", "shape", "relative error", box=None, padding=(0, 2, 0, 0))
        for layer in result["layers"][:SHOWN_LAYERS]:
            shape = " × ".join(map(str, layer["shape"]))
            table.add_row(layer["name"], shape, f"{layer['relative_error']:.2%}")
        console.print("\n", table, sep="", highlight=False)


def _show_merged(result: dict[str, Any]) -> None:
    grid = two_columns()
    how = "in 4 bits: dequantized, changed, quantized again" if result["requantized"] else "as the base is stored"
    grid.add_row("merged", f"{result['changed_layers']} layers of {result['base']}, {how}")
    answers = result["answers"]
    grid.add_row("answers", describe_agreement(answers))
    if "over_4_bits" in answers:
        grid.add_row("", f"{answers['over_4_bits']:.3g} nats from the adapter over 4 bits, as it was trained")
    grid.add_row("written to", f"{result['out']}, {human_bytes(result['bytes'])}")
    if result["head"]:
        grid.add_row("head", f"{result['head']}, an adapter of the merged model")
    terminal().print(grid, highlight=False)


def describe_answers(answers: dict[str, Any]) -> str:
    """How far two models' answers are apart, in one line."""
    if "cosine" in answers:
        return (
            f"cosine of the last hidden states {answers['cosine']:.4f}, lowest {answers['lowest_cosine']:.4f} "
            f"({answers['compared']:,} tokens)"
        )
    return (
        f"KL divergence {answers['kl_divergence']:.4g} nats, the same most probable answer in "
        f"{answers['top1_agreement']:.1%} of {answers['compared']:,}"
    )
