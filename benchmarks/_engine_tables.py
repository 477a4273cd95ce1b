"""``results/engine.json`` as Markdown: every workload's tables, and the short one of the project's README."""

from __future__ import annotations

from typing import Any

from _engine_workloads import AS_IT_COMES, FLOOR, GROUPED, KERNEL_FLOOR, OURS

from capotune.files import human_bytes


def engine(content: dict[str, Any]) -> list[str]:
    """A section for each workload."""
    lines = [
        "Each run is a process of its own; contenders alternate. All contenders of a table have the same rows in the "
        "same batches, the same first weights, optimiser and schedule, and fp32 (language models on a GPU: its 16 "
        "bits). The largest relative difference of a "
        "step's loss from capotune's stands in the table; above a thousandth nothing is compared. Seconds are those of "
        "the training steps, medians with the smallest and largest (quartiles from four rounds on); the first step is "
        "left out, where not said otherwise. Tokens are real ones, without padding. *Peak memory* is the whole "
        "process's, *held before* what it held when training began. "
        f"*{FLOOR.capitalize()}* is the floor: the products with frozen weights that a step can't do without "
        "(`_engine_floor.py` says which, and what is left out), in fp32 as PyTorch computes them; one over a peer's "
        "share of it is the most by which anything could be faster with such products on the same batches. On a "
        "processor with AMX capotune computes them at 16 bits (`kernels/linear.py`), which is a floor of its own; a "
        "peer with *bf16 products* has PyTorch compute them at 8 bits "
        "(`torch.set_float32_matmul_precision('medium')`).",
    ]
    for letter, work in content.items():
        lines += ["", f"### ({letter}) {work['title']}", "", f"{work['settings']} Data: {work['rows']}."]
        if work["whole"]:
            lines[-1] += " The first step counts."
        for comparison in work["comparisons"]:
            lines += ["", f"**{comparison['name'].capitalize()}.** {_losses(comparison)}".rstrip()]
            lines += ["", *_table(comparison)]
        lines += ["", f"{work['date']}, {_machine(work)}"]
    return lines


def engine_summary(content: dict[str, Any]) -> str:
    """One row for each workload."""
    lines = [
        "| job | times as fast as peers as they come | as peers tuned | their peak memory, times ours | bare matrix "
        "products in fp32, of our time |",
        "| --- | --- | --- | --- | --- |",
    ]
    for letter, work in content.items():
        found = {one["name"]: one for one in work["comparisons"]}
        fast = [_ratios(found.get(name), "capotune_times_as_fast") for name in (AS_IT_COMES, GROUPED)]
        memory = _ratios(found.get(AS_IT_COMES), "times_the_memory")
        shares = [_share(_ours(one)) for one in work["comparisons"]]
        cells = [f"({letter}) {work['title']}", *fast, memory, ", ".join(shares)]
        lines.append(f"| {' | '.join(cells)} |")
    machines = dict.fromkeys(_machine(work) for work in content.values())
    return "\n".join([*lines, "", *(f"On {machine}" for machine in machines)])


def _ratios(comparison: dict[str, Any] | None, name: str) -> str:
    """A number for each peer that ran."""
    if comparison is None:
        return "–"
    found = []
    for row in comparison["rows"]:
        if row["name"] != OURS and "seconds" in row:
            number = f"{row[name]:.1f}" if name in row else "not equal"
            found.append(f"{number} ({row['name'].replace(', tuned', '')})")
    return ", ".join(found) or "–"


def _ours(comparison: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in comparison["rows"] if row["name"] == OURS)


def _table(comparison: dict[str, Any]) -> list[str]:
    lines = [
        "| contender | seconds | tokens/s | peak memory | held before | capotune is times as fast | its memory, times "
        "capotune's | floor's share | loss differs by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    if _ours(comparison).get("accuracy") is not None:
        lines[0] = lines[0].replace("loss differs by", "accuracy")
    floor = comparison["floor"]
    if "seconds" in floor:
        lines.append(f"| *{FLOOR}* | {_seconds(floor)} | – | – | – | – | – | 100% | – |")
        kernels = comparison["kernel_floor"]
        if "seconds" in kernels:
            share = f"{floor['median'] / kernels['median']:.0%}"
            lines.append(f"| *{KERNEL_FLOOR}* | {_seconds(kernels)} | – | – | – | – | – | {share} | – |")
    return lines + [_row(row) for row in comparison["rows"]]


def _row(row: dict[str, Any]) -> str:
    reason = row.get("failed") or row.get("absent")
    if "seconds" not in row:
        state = "did not run" if "failed" in row else "absent"
        text = str(reason).replace("|", "/")
        return f"| {row['name']} | {state}: {text} |" + " – |" * 7
    quality = f"{row['accuracy']:.2%}" if row["accuracy"] is not None else _difference(row)
    cells = [
        row["name"],
        _seconds(row),
        f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "–",
        human_bytes(row["peak_bytes"]),
        human_bytes(row["before_bytes"]),
        *(f"{row[name]:.2f}" if name in row else "–" for name in ("capotune_times_as_fast", "times_the_memory")),
        _share(row),
        f"{quality}; **not compared**: {reason}".replace("|", "/") if reason else quality,
    ]
    return f"| {' | '.join(cells)} |"


def _seconds(row: dict[str, Any]) -> str:
    spread = f" ({row['low']:.2f} to {row['high']:.2f})" if len(row["seconds"]) > 1 else ""
    return f"{row['median']:.2f}{spread}"


def _difference(row: dict[str, Any]) -> str:
    return f"{row['largest_relative_difference']:.0e}" if "largest_relative_difference" in row else "–"


def _share(row: dict[str, Any]) -> str:
    return f"{row['share_of_floor']:.0%}" if "share_of_floor" in row else "–"


def _losses(comparison: dict[str, Any]) -> str:
    found = comparison["equal_quality"]
    if "steps" not in found or found["largest_relative_difference"] is None:
        return ""
    steps = "1 step" if found["steps"] == 1 else f"{found['steps']:,} steps"
    rows = "1 row" if comparison["batch_size"] == 1 else f"{comparison['batch_size']} rows"
    alike = ", of like length" if comparison["grouped"] else ""
    return (
        f"Batches of {rows}{alike}. Loss from {found['first_loss']:.4f} to {found['last_loss']:.4f} in {steps}; "
        f"between contenders it differs by {found['largest_relative_difference']:.1e} at most."
    )


def _machine(work: dict[str, Any]) -> str:
    machine = work["environment"]
    gpu = "" if machine["gpu"] == "none" else f", {machine['gpu']}"
    versions = ", ".join(f"{name} {found}" for name, found in work["versions"].items())
    return f"{machine['cpu']}{gpu}, kernels {machine['kernels']}; {versions}."
