"""Write ``benchmarks/README.md`` and the tables of the project's README from ``results/*.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _engine_tables import engine, engine_summary
from _text_tables import text_pairs, wrong_labels

from capotune.files import human_bytes

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TITLES = {
    "demo": ("compare-tickets", "`examples/support_tickets.csv`, 20 intents, defaults alone"),
    "banking77": ("compare-banking77", "Banking77, 77 intents, all of train.csv and test.csv, defaults alone"),
}
DEMONSTRATIONS = {
    "messages": "`capo demo generation`",
    "expressions": "`capo demo generation` without SmolLM2, on capo-tiny",
}


def _tables() -> dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]]:
    """Title and table of each result that has one of its own, by the result's name."""
    return {
        "nf4": ("4-bit weights: speed", four_bit),
        "nf4-bits": ("4-bit weights: equal bits", equal_bits),
        "stream-13b": ("13 billion weights on a small machine", streaming),
        "gguf-memory": ("A GGUF file in 4 bits: memory", gguf_memory),
        "linear_head": ("The head", head),
        "engine-profile": ("Where a training step's time goes", profiles),
        "startup": ("From the command to the first step", startup),
        "checkpoints": ("What checkpoints cost a step", checkpoints),
        "decoding": ("Text written with an adapter", decoding),
        "defaults": ("LoRA's defaults against TRL", defaults),
        "prompts": ("Prompts against LoRA", prompts),
        "reading": ("Many rows", reading),
        "wrong-labels": ("Wrong labels", wrong_labels),
        "pairs": ("Pairs of texts", text_pairs),
    }


def main() -> None:
    """Fill the marked places of both files."""
    readme = HERE.parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    sections = ["# Benchmarks", "", "Made by `python benchmarks/_summary.py` from `results/*.json`; do not edit."]
    for marker, (name, title) in TITLES.items():
        path = RESULTS / f"{name}.json"
        if not path.is_file():
            continue
        block = comparison(json.loads(path.read_text(encoding="utf-8")), title)
        text = re.sub(f"(<!-- {marker} -->).*?(<!-- /{marker} -->)", rf"\1\n{block}\n\2", text, flags=re.DOTALL)
        sections += ["", f"## {title}", "", block, "", f"`python benchmarks/compare.py`, `results/{name}.json`."]
    for name, (title, table) in _tables().items():
        if not (RESULTS / f"{name}.json").is_file():
            continue
        content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        source = f"`python benchmarks/{name.replace('-', '_')}.py`, `results/{name}.json`."
        sections += ["", f"## {title}", "", *table(content), "", source]
    if (RESULTS / "generation.json").is_file():
        sections += ["", *generation(json.loads((RESULTS / "generation.json").read_text(encoding="utf-8")))]
    for name, title in DEMONSTRATIONS.items():
        path = RESULTS / f"demo-{name}.json"
        if path.is_file():
            block = demonstration(json.loads(path.read_text(encoding="utf-8")))
            text = re.sub(f"(<!-- {name} -->).*?(<!-- /{name} -->)", rf"\1\n{block}\n\2", text, flags=re.DOTALL)
            source = f"`python benchmarks/generation.py {name}`, `results/demo-{name}.json`."
            sections += ["", f"## {title}", "", block, "", source]
    if (RESULTS / "engine.json").is_file():
        content = json.loads((RESULTS / "engine.json").read_text(encoding="utf-8"))
        block = engine_summary(content)
        text = re.sub("(<!-- engine -->).*?(<!-- /engine -->)", rf"\1\n{block}\n\2", text, flags=re.DOTALL)
        sections += ["", "## The training engine against peers", "", *engine(content), ""]
        sections += ["`python benchmarks/engine.py`, `results/engine.json`."]
    if (RESULTS / "engine-avx2.json").is_file():
        content = json.loads((RESULTS / "engine-avx2.json").read_text(encoding="utf-8"))
        sections += ["", "## The training engine without AMX", "", *vectors(content)]
    readme.write_text(text, encoding="utf-8")
    (HERE / "README.md").write_text("\n".join(sections) + "\n", encoding="utf-8")


def vectors(content: dict[str, Any]) -> list[str]:
    """The short table of the engine on a processor with AVX2 alone."""
    steps = ", ".join(f"{work['steps']} of ({letter})" for letter, work in content.items() if work["steps"])
    found = [row["largest_relative_difference"] for work in content.values() for one in work["comparisons"]
             for row in one["rows"] if "largest_relative_difference" in row]  # fmt: skip
    return [
        f"The same contenders on a processor with AVX2 alone, where all of them multiply in fp32. Steps: {steps}. The "
        f"losses of a step differ by {max(found):.0e} at most.",
        "",
        engine_summary(content),
        "",
        f"`python benchmarks/engine.py {' '.join(content)} --out benchmarks/results/engine-avx2.json`, "
        "`results/engine-avx2.json`.",
    ]


def comparison(content: dict[str, Any], title: str) -> str:
    """A comparison as a Markdown table, with its machine and its recommendation."""
    base = f"The base alone (nearest class mean): {content['base_score']:.2%}."
    lines = [
        f"{title}; {content['test_rows']:,} test rows. {base}",
        "",
        "| technique | accuracy | trained weights | adapter | seconds | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in content["rows"]:
        share = row["trainable_parameters"] / row["total_parameters"]
        lines.append(
            f"| {row['method']} | {row['score']:.2%} | {row['trainable_parameters']:,} ({share:.1%}) "
            f"| {human_bytes(row['adapter_bytes'])} | {row['train_seconds']:.0f} "
            f"| {human_bytes(row['peak_memory_bytes'])} |"
        )
    return "\n".join([*lines, *_ending(content)])


def demonstration(content: dict[str, Any]) -> str:
    """A demonstration's table, exact match first, and some answers."""
    base = content["base_scores"]
    lines = [
        f"{content['train_rows']:,} rows to train on, {content['test_rows']} to answer.",
        "",
        "| technique | exact match | perplexity | trained weights | adapter | seconds | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        f"| base alone | {base['exact_match']:.1%} | {base['perplexity']:.2f} | – | – | – | – |",
    ]
    for row in content["rows"]:
        share = row["trainable_parameters"] / row["total_parameters"]
        lines.append(
            f"| {row['method']} | {row['scores']['exact_match']:.1%} | {row['scores']['perplexity']:.2f} "
            f"| {row['trainable_parameters']:,} ({share:.1%}) | {human_bytes(row['adapter_bytes'])} "
            f"| {row['train_seconds']:.0f} | {human_bytes(row['peak_memory_bytes'])} |"
        )
    return "\n".join([*lines, *_ending(content), *_answers(content.get("answers", []))])


def _answers(answers: list[dict[str, str]]) -> list[str]:
    if not answers:
        return []
    cells = ["| asked | the base | with LoRA |", "| --- | --- | --- |"]
    cells += [f"| {one['prompt']} | {' '.join(one['base'].split())} | `{one['lora']}` |" for one in answers]
    return ["", *cells]


def _ending(content: dict[str, Any]) -> list[str]:
    """Below a comparison's table: what to take, and where that was found."""
    machine = content["environment"]
    kernels = f", kernels {machine['kernels']}" if "kernels" in machine else ""  # not in the oldest results
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}"
    recommended = f"Recommended: **{content['recommended']}**. {content['why']}"
    note = f" {content['note']}" if "note" in content else ""
    return ["", recommended, "", f"On {machine['cpu']}{kernels}; {versions}.{note}"]


def generation(content: dict[str, Any]) -> list[str]:
    """A table for each data set: the techniques and full fine-tuning from one start."""
    lines = [
        "## Generation on a very small model",
        "",
        "`stories260K` (260,032 weights), by the four techniques, by QLoRA with other 4-bit formats, and by full "
        "fine-tuning as the yardstick. A model this small is a test of mechanics: that every technique learns on real "
        "data, and how far each gets from the same start in the same number of passes. It can't show what a large "
        "model would answer.",
    ]
    for name, part in content.items():
        base = part["base_scores"]
        lines += [
            "",
            f"### {name}: {part['train_rows']:,} rows to train on, {part['test_rows']:,} to test",
            "",
            "| technique | test loss | perplexity | its 95 % interval | exact match | ROUGE-L "
            "| trained weights | adapter | seconds |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            f"| base alone | {base['loss']:.3f} | {base['perplexity']:.2f} | – "
            f"| {_share(base, 'exact_match')} | {_share(base, 'rouge_l')} | – | – | – |",
        ]
        for row in part["rows"]:
            scores, (low, high) = row["scores"], row["intervals"]["perplexity"]
            lines.append(
                f"| {row['technique']} | {scores['loss']:.3f} | {scores['perplexity']:.2f} | {low:.2f} to {high:.2f} "
                f"| {_share(scores, 'exact_match')} | {_share(scores, 'rouge_l')} | {row['trainable_parameters']:,} "
                f"| {human_bytes(row['adapter_bytes'])} | {row['train_seconds']:.0f} |"
            )
    return [*lines, "", "`python benchmarks/generation.py`, `results/generation.json`."]


def _share(scores: dict[str, float], name: str) -> str:
    return f"{scores[name]:.1%}" if name in scores else "–"


def four_bit(content: dict[str, Any]) -> list[str]:
    """Medians with quartiles beside bitsandbytes, and a plain fp32 layer where there is one."""
    lines = [
        "| work | shape | capotune, ms | bitsandbytes, ms | times as fast | plain fp32, ms | of its time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in content["rows"]:
        times = row["milliseconds"]
        dense = times.get("dense nn.Linear")
        ratio = f"{times['capotune']['median'] / dense['median']:.2f}" if dense else "–"
        shape = " × ".join(map(str, row["shape"]))
        lines.append(
            f"| {row['what']} | {shape} | {_spread(times['capotune'])} | {_spread(times['bitsandbytes'])} "
            f"| {row['speed_against_bitsandbytes']} | {_spread(dense) if dense else '–'} | {ratio} |"
        )
    rounds, threads = content["rounds"], content["machine"]["threads"]
    return [
        *lines,
        "",
        f"Medians (and quartiles) of {rounds} alternating rounds in one process, {threads} threads, fp32.",
    ]


def _spread(times: dict[str, Any]) -> str:
    low, high = times["q1"], times["q3"]
    return f"{times['median']:.1f} ({low:.1f} to {high:.1f})"


def equal_bits(content: dict[str, Any]) -> list[str]:
    """How many stored tensors equal bitsandbytes' to the last bit."""
    kinds, shapes, blocks = (len(content[name]) for name in ("kinds", "shapes", "block_sizes"))
    lines = [
        f"{kinds} kinds of tensors (random, constant, zero, tiny, huge, denormal …) × {shapes} shapes × fp32, "
        f"bf16 and fp16 × NF4 and FP4 × {blocks} block sizes × double quantisation on and off; equal / all.",
        "",
        "| what | compiled kernel | plain PyTorch |",
        "| --- | --- | --- |",
    ]
    for what in content["paths"]["C"]:
        counts = [content["paths"][path][what] for path in ("C", "PyTorch")]
        lines.append(f"| {what} | " + " | ".join(f"{one['equal']:,} / {one['all']:,}" for one in counts) + " |")
    versions = content["versions"]
    return [*lines, "", f"bitsandbytes {versions['bitsandbytes']}, torch {versions['torch']}."]


def streaming(content: dict[str, Any]) -> list[str]:
    """Phases of the 13B run with their peaks."""
    lines = ["![memory over time](results/stream-13b.png)", ""]
    lines += ["| phase | seconds | peak, GiB |", "| --- | --- | --- |"]
    lines += [f"| {one['phase']} | {one['seconds']:.1f} | {one['peak_gib']:.2f} |" for one in content["phases"]]
    return [*lines, "", f"Peak resident memory of the whole process: **{content['peak_gib']:.2f} GiB**."]


def gguf_memory(content: dict[str, Any]) -> list[str]:
    """What loading each file adds at its peak, the first time and from the cache."""
    lines = ["| file | loaded | added at the peak | result | largest tensor | limit | in fp32 | seconds |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name, found in content["files"].items():
        for when in ("first", "again"):
            sizes = [human_bytes(found[when][key]) for key in ("added", "result", "largest", "limit", "whole")]
            lines.append(f"| {name} | {when} | {' | '.join(sizes)} | {found[when]['seconds']:.1f} |")
    return [*lines, "", "The limit is the result and two of the largest tensor; nothing is written in fp32."]


def head(content: dict[str, Any]) -> list[str]:
    """CPU seconds to choose λ and to solve, of each solver, on one problem."""
    size = f"{content['rows']:,} rows, {content['features']:,} features, {content['labels']} labels"
    lines = [
        f"{size}, {content['threads']} thread.",
        "",
        "| solver | CPU seconds | evaluations |",
        "| --- | --- | --- |",
    ]
    solvers = {name: value for name, value in content.items() if isinstance(value, dict)}
    return lines + [f"| {name} | {one['cpu_seconds']} | {one['evaluations'] or '–'} |" for name, one in solvers.items()]


def profiles(content: dict[str, Any]) -> list[str]:
    """Milliseconds of a step by what they are for, before the engine was built and after, for both workloads."""
    lines = [
        "Workloads (a) and (d) of the engine, tuned; one step each, by PyTorch's profiler, which itself slows what is "
        "made of many small operations. *Before*: the version that padded batches (commit cb00828); *after*: this "
        "one. In brackets each kind's part of the step.",
    ]
    for letter in "ad":
        steps = {label: content[label][letter] for label in ("before", "after")}
        names = dict.fromkeys(name for step in steps.values() for name in step["by_kind_ms"])
        lines += [
            "",
            f"({letter}), {steps['after']['tokens']} tokens:",
            "",
            "| | before, ms | after, ms |",
            "| --- | --- | --- |",
        ]
        lines += [f"| {name} | " + " | ".join(_part_of(step, name) for step in steps.values()) + " |" for name in names]
        lines.append(
            "| a step without the profiler | " + " | ".join(f"{s['step_ms']:.0f}" for s in steps.values()) + " |"
        )
    return lines


def startup(content: dict[str, Any]) -> list[str]:
    """Seconds to each stage, with and without cached features."""
    lines = [
        "`capo train lora --data examples/support_tickets.csv` on MiniLM, seconds since the process was started. "
        "Before the first step the head is solved, for which the base reads the 1,040 training rows once.",
        "",
        "| | everything imported | first optimiser step done |",
        "| --- | --- | --- |",
    ]
    for name in ("features cached", "nothing cached"):
        times = content[name]
        cells = [f"{one['median']:.1f} ({one['low']:.1f} to {one['high']:.1f})" for one in times.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    machine = content["environment"]
    return [*lines, "", f"Medians (least to most) of {content['rounds']} rounds; {content['date']}, {machine['cpu']}."]


def checkpoints(content: dict[str, Any]) -> list[str]:
    """The training thread's work for them, and the writing thread's."""
    lines = [
        "LoRA by its defaults, CPU time with one thread for PyTorch. The training thread copies weights and moments; "
        "another thread writes them.",
        "",
        "| | checkpoint | a step | for each step | for each checkpoint | the writing thread | a step is longer by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model, found in content["results"].items():
        times = (found[f"{name}_cpu_seconds"] for name in ("step", "each_step", "taken", "written"))
        cells = [f"{found['checkpoint_bytes'] / 1e6:.0f} MB", *(f"{1000 * seconds:.4g} ms" for seconds in times)]
        lines.append(f"| {model} | {' | '.join(cells)} | {found['share_at_the_default_interval']:.2%} |")
    machine = content["environment"]
    return [*lines, "", f"With a checkpoint every 5 minutes. Medians of {content['steps']} steps; {machine['cpu']}."]


def reading(content: dict[str, Any]) -> list[str]:
    """Processor time and memory against rows."""
    lines = [
        "`capo data` on labelled text in csv, read, checked and reported: processor seconds of all threads and peak "
        "memory, of which the libraries take 5 s and 0.5 GB.",
        "",
        "| rows | file | processor seconds | peak memory |",
        "| --- | --- | --- | --- |",
    ]
    for one in content["labelled"]:
        sizes = human_bytes(one["bytes"]), f"{one['cpu_seconds']:.1f}", human_bytes(one["peak_memory_bytes"])
        lines.append(f"| {one['rows']:,} | {' | '.join(sizes)} |")
    lines += ["", "From 50,000 rows on the tokens of the longest and of some at random are counted, not of all.", ""]
    lines += [
        "On prompts with completions in jsonl, all tokenised for SmolLM2: the first start, and one that finds tokens "
        "in the cache. Anonymous memory is without the pages of mapped files.",
        "",
        "| rows | file | start | processor seconds | peak anonymous | peak resident |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in content.get("written", []):
        memory = human_bytes(one["peak_anonymous_bytes"]), human_bytes(one["peak_memory_bytes"])
        cells = human_bytes(one["bytes"]), one["start"], f"{one['cpu_seconds']:.0f}", *memory
        lines.append(f"| {one['rows']:,} | {' | '.join(cells)} |")
    return lines


def decoding(content: dict[str, Any]) -> list[str]:
    """Tokens a second of both, and the ratio of times: on one thread and on more."""
    first = next(iter(content.values()))
    lines = [
        f"SmolLM2-135M-Instruct with LoRA against Transformers' `generate` with the merged model, {first['prompts']} "
        "prompts in one batch; prompts included.",
        "",
        "| threads | seconds of | answers | tokens written | capotune, tokens/s | Transformers, tokens/s "
        "| times as fast | equal answers |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for part in content.values():
        clock = "the processor" if part["threads"] == 1 else "the wall clock"
        for name, one in part["results"].items():
            speed = one["tokens_per_second"]
            lines.append(
                f"| {part['threads']} | {clock} | {name} | {one['tokens']:,} of at most "
                f"{part['prompts'] * part['most_tokens']:,} | {speed['capotune']:.1f} | {speed['transformers']:.1f} "
                f"| {one['ratio']:.2f} | {one['equal_answers']} / {part['prompts']} |"
            )
    machine, rounds = first["environment"], first["rounds"]
    return [
        *lines,
        "",
        f"Medians of {rounds} alternating rounds in one process, fp32; torch {machine['torch']}, transformers "
        f"{machine['transformers']}.",
    ]


def defaults(content: dict[str, Any]) -> list[str]:
    """Of each data set the test loss of every run, and what a default was chosen by."""
    machine = content["environment"]
    sets = {name: part for name, part in content.items() if name != "environment"}
    rows = ", ".join(f"{name} {part['train_rows']}" for name, part in sets.items())
    chosen = _by_set(sets, lambda label: label.startswith("choose"))
    if chosen:
        words = "Other settings of Capotune, on rows held out of the training data, by which defaults were chosen:"
        chosen = [words, "", *chosen, ""]
    scored = ", ".join(f"{name} {next(iter(part['runs'].values()))['rows']}" for name, part in sets.items())
    return [
        "SmolLM2-135M-Instruct, LoRA of rank 16 and alpha 32 on all linear layers, fp32, one pass over some rows "
        f"({rows}). Loss of the answers' tokens in nats on test rows ({scored}); in brackets the part of the rows "
        "whose every token is the most probable one. TRL runs with several learning rates; its defaults are 2e-5 and "
        "batches of 8.",
        "",
        *_by_set(sets, lambda label: not label.startswith("choose")),
        "",
        *chosen,
        f"One run each, one thread; torch {machine['torch']}, transformers {machine['transformers']}.",
    ]


def prompts(content: dict[str, Any]) -> list[str]:
    """Of each data set and technique loss, part of LoRA's gain, what it costs elsewhere, and the time."""
    machine = content["environment"]
    above = json.loads((RESULTS / "defaults.json").read_text(encoding="utf-8"))
    unmeasured = {
        "shallow": "vectors before the input alone",
        "lora": "in the same runs LoRA, what it costs on general text and its seconds",
    }
    sets = [runs for name, runs in content.items() if name != "environment"]
    missing = [words for technique, words in unmeasured.items() if any(technique not in runs for runs in sets)]
    lines = [
        "| rows | technique | test loss | part of LoRA's gain | exact match | general text, nats | same next token "
        "| adapter | processor seconds |",
        f"| --- | --- |{' --- |' * 7}",
    ]
    for name, runs in content.items():
        if name == "environment":
            continue
        for technique, run in runs.items():
            lora, base = runs.get("lora", above[name]["runs"]["capotune, defaults"])["loss"], runs["base"]["loss"]
            gain = f"{(base - run['loss']) / (base - lora):.0%}"
            cells = ["–"] * 4
            if cost := run.get("general"):
                cells = [f"{cost['loss'] - cost['base_loss']:+.2f}", f"{cost['agreement']:.0%}"]
                cells += [f"{run['bytes'] / 1e6:.1f} MB", f"{run['cpu_seconds']:.0f}"]
            found = [technique, f"{run['loss']:.3f}", gain, f"{run['exact_match']:.0%}", *cells]
            lines.append(f"| {name} | {' | '.join(found)} |")
    return [
        "SmolLM2-135M-Instruct, one pass over 64 rows, defaults alone; scored as above. General text is 600 tokens "
        "that no run trains on. LoRA's loss, where it does not stand here, is that of the table above.",
        "",
        *lines,
        "",
        *([f"Not measured: {'; '.join(missing)}.", ""] if missing else []),
        "Of a deep prompt's change as much is left as has 90 % of the held-out gain; 90 was chosen over 95 after "
        "GSM8K's test rows were seen, so its row is no clean test.",
        "",
        f"One run each, one thread; torch {machine['torch']}, transformers {machine['transformers']}.",
    ]


def _by_set(sets: dict[str, Any], wanted: Callable[[str], bool]) -> list[str]:
    labels = dict.fromkeys(label for part in sets.values() for label in part["runs"] if wanted(label))
    if not labels:
        return []
    lines = [f"| | {' | '.join(sets)} |", f"| --- |{' --- |' * len(sets)}"]
    for label in labels:
        found = [part["runs"].get(label) for part in sets.values()]
        cells = ["–" if one is None else f"{one['loss']:.3f} ({one['exact_match']:.0%})" for one in found]
        lines.append(f"| {label.removeprefix('choose, ')} | {' | '.join(cells)} |")
    return lines


def _part_of(step: dict[str, Any], name: str) -> str:
    times = step["by_kind_ms"]
    return f"{times[name]:.1f} ({times[name] / sum(times.values()):.0%})" if name in times else "–"


if __name__ == "__main__":
    main()
