"""The command line from end to end, on a small real model."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import PATIENCE, Result, capo, tree
from warm import WARM

from capotune import api
from capotune.cli.flags import parse

COMMANDS = ("compare", "train", "evaluate", "predict", "info")
METHODS = ("feature-extraction", "lora", "qlora", "prompt-tuning")


@pytest.fixture(scope="module")
def adapters(bert: Path, tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter folder of every method, each made by ``capo train``."""
    folder = tmp_path_factory.mktemp("trained")
    for method in METHODS:
        more = () if method == "feature-extraction" else ("--epochs", 1)
        more += ("--no-deep",) if method == "prompt-tuning" else ()
        made = capo("train", method, "--data", tickets, "--model", bert, "--out", folder / method, "--no-cache", *more)
        assert made.code == 0, made.err
    return {method: folder / method / "adapter" for method in METHODS}


# Help, version, what is unknown


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands(arguments: list[str]) -> None:
    shown = capo(*arguments)
    assert shown.code == 0
    assert all(f"capo {command}" in shown.out for command in COMMANDS)


@pytest.mark.parametrize("command", [*COMMANDS, *(f"train {method}" for method in METHODS)])
def test_every_command_has_help(command: str) -> None:
    shown = capo(*command.split(), "--help")
    assert shown.code == 0
    assert shown.out.startswith(f"usage: capo {command}")
    assert not shown.err


def test_settings_of_one_method_are_not_offered_to_another() -> None:
    assert "--rank" in capo("train", "lora", "--help").out
    for method in ("prompt-tuning", "feature-extraction"):
        assert "--rank" not in capo("train", method, "--help").out


def test_train_help_names_the_methods() -> None:
    shown = capo("train", "--help").out
    assert all(method in shown for method in METHODS)


def test_version() -> None:
    import capotune

    assert capo("--version") == Result(0, f"capotune {capotune.__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["compare", "--help"], ["tran"]])
def test_what_needs_no_model_imports_no_framework(arguments: list[str]) -> None:
    program = (
        "import sys; from capotune.cli import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'sklearn', 'matplotlib', 'pyarrow'} & set(sys.modules)\n"
        "print(code, sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] in ("0 []", "2 []")


def test_import_time_lists_no_framework() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import capotune.cli"], capture_output=True, text=True, check=True
    )
    imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert "capotune.cli.main" in imported
    assert not {"torch", "transformers", "numpy", "rich.progress", "yaml"} & set(imported)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["unknown command 'trian'", "Did you mean 'train'?", *COMMANDS]),
        (["train", "lroa", "--data", "x.csv"], ["unknown method 'lroa'", "Did you mean 'lora'?", *METHODS]),
        (["train"], ["which method", *METHODS]),
        (["train", "lora", "--data", "x.csv", "--rnak", "8"], ["--rnak", "--rank"]),
        (["compare", "--data", "x.csv", "--lora.rnk", "8"], ["--lora.rnk", "--lora.rank"]),
        (["compare", "--data", "x.csv", "--methods", "lroa"], ["unknown method 'lroa'", "mean 'lora'?", *METHODS]),
        (["train", "prompt-tuning", "--data", "x.csv", "--rank", "8"], ["--rank", "capo train prompt-tuning --help"]),
        (["train", "lora"], ["--data", "required"]),
        (["predict"], ["Adapter folder", "required"]),
        (["compare", "--config"], ["--config: needs a YAML file"]),
        (["train", "lora", "--lora.epochs", "1"], ["has no --lora.epochs. Did you mean '--epochs'?"]),
        (["export", "x", "--loader", "peft"], ["capo export has no --loader. Did you mean '--for'?"]),
        (["cache", "--as-json"], ["capo cache has no --as-json. Did you mean '--json'?"]),
        (["info", "x", "--adapter", "y"], ["capo info has no --adapter. Did you mean 'ADAPTER'?"]),
        (["compare", "--data", "x.csv", "--rank", "4"], ["mean '--lora.rank' or '--qlora.rank'?"]),
        (["info", "a", "b"], ["capo info takes no 'b'"]),
        (["train", "lora", "--data", "x.csv", "--resume"], ["has no --resume. `capo resume DIR` goes on with what"]),
    ],
)  # fmt: skip
def test_what_is_unknown_or_missing_is_named_with_the_nearest(arguments: list[str], words: list[str]) -> None:
    refused = capo(*arguments)
    assert_one_line(refused)
    for word in words:
        assert word in refused.said


def assert_one_line(refused: Result) -> None:
    assert refused.code == 2
    assert not refused.out
    assert refused.err.startswith("capo: ")
    assert refused.err.count("\n") == 1


TRACKERS = "tensorboard, wandb, mlflow, trackio"
AT_LEAST_1, HELP = "should be greater than or equal to 1.", "--help` lists the settings."
INSIDE = (
    "--prompt-tuning.init text needs --prompt-tuning.init-text, and --prompt-tuning.init-text needs "
    f"--prompt-tuning.init text. `capo compare {HELP}"
)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("train lora --data x --epochs abc", "--epochs abc: not allowed. Allowed: whole numbers, at least 1."),
        ("train lora --data x --epochs=1.5", "--epochs 1.5: not allowed. Allowed: whole numbers, at least 1."),
        ("train lora --data x --epochs", "--epochs needs a value. Allowed: whole numbers, at least 1."),
        ("train lora --data x --epochs 0", f"--epochs 0: input {AT_LEAST_1} `capo train lora {HELP}"),
        ("train lora --data x --warmup no", "--warmup no: not allowed. Allowed: numbers, at least 0, below 1."),
        ("train lora --data x --layers 1 b", "--layers 1 b: not allowed. Allowed: whole numbers, one or more."),
        ("train lora --data x --schedule up", "--schedule up: not allowed. Allowed: linear, cosine, constant."),
        ("compare --data x --lora.rank abc", "--lora.rank abc: not allowed. Allowed: whole numbers, at least 1."),
        ("compare --data x --lora.rank 0", f"--lora.rank 0: input {AT_LEAST_1} `capo compare {HELP}"),
        ("compare --data x --prompt-tuning.init text", INSIDE),
        ("generate x --temperature hot", "--temperature hot: not allowed. Allowed: numbers, at least 0."),
        ("demo labels", "TASK labels: not allowed. Allowed: generation."),
        ("runs --compare a", "--compare a: not allowed. Allowed: a path and a path."),
        ("runs --compare a b c d", "--compare a b c d: not allowed. Allowed: a path and a path."),
        ("runs --compare", "--compare needs a value. Allowed: a path and a path."),
        ("train lora --report-to --data x", f"--report-to needs a value. Allowed: {TRACKERS}, one or more."),
        ("compare --data x --lora.layers", "--lora.layers needs a value. Allowed: whole numbers, one or more."),
    ],
)
def test_refused_value_is_one_line_with_what_is_allowed(flags: str, said: str) -> None:
    refused = capo(*flags.split())
    assert_one_line(refused)
    assert refused.err == f"capo: {said}\n"


def test_interrupt_that_an_import_hides_stops_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Transformers does, which says that the part which is imported is missing."""
    from capotune.cli import main as entry

    assert entry is not None
    commands = sys.modules["capotune.cli.main"].COMMANDS

    def interrupted(_rest: list[str]) -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from error

    def missing(_rest: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'torch'")

    monkeypatch.setitem(commands, "info", interrupted)
    assert capo("info") == Result(130, "", "\ncapo: stopped.\n")
    monkeypatch.setitem(commands, "info", missing)
    with pytest.raises(ModuleNotFoundError, match="torch"):
        capo("info")


# Train, evaluate, predict, info


@pytest.mark.parametrize("method", METHODS)
def test_train_evaluate_predict_info(adapters: dict[str, Path], tickets: Path, method: str) -> None:
    adapter = adapters[method]
    record = json.loads((adapter.parent / "run.json").read_text())
    scores = json.loads(capo("evaluate", adapter, "--data", tickets, "--json").out)
    assert scores["rows"] == record["result"]["test_rows"] == 24
    assert scores["accuracy"] == record["result"]["score"]
    assert scores["intervals"]["accuracy"][0] <= scores["accuracy"] <= scores["intervals"]["accuracy"][1]
    facts = json.loads(capo("info", adapter, "--json").out)
    assert facts["method"] == method
    assert facts["labels"] == ["broken", "late", "money"]
    assert facts["trained_weights"] == record["result"]["trainable_parameters"]
    assert ("nearest_tokens" in facts) == (method == "prompt-tuning")
    answered = capo("predict", adapter, "the lamp is broken", "please refund twice paid")
    assert answered.code == 0
    rows = [line.split("\t") for line in answered.out.splitlines()]
    assert [text for _, _, text in rows] == ["the lamp is broken", "please refund twice paid"]
    assert all(label in facts["labels"] and 0 < float(probability) <= 1 for label, probability, _ in rows)


def test_tables_say_the_same_as_json(adapters: dict[str, Path], tickets: Path) -> None:
    scores = json.loads(capo("evaluate", adapters["lora"], "--data", tickets, "--json").out)
    assert f"{scores['accuracy']:.2%} on 24 rows" in capo("evaluate", adapters["lora"], "--data", tickets).said
    shown = capo("info", adapters["lora"]).said
    assert all(word in shown for word in ("lora", "broken, late, money", "rank 16", "mean pooling"))


def test_info_shows_the_nearest_real_tokens_of_a_prompt(adapters: dict[str, Path]) -> None:
    facts = json.loads(capo("info", adapters["prompt-tuning"], "--json").out)
    assert len(facts["nearest_tokens"]) == facts["settings"]["num_virtual_tokens"] == 20
    tokens = [token for near in facts["nearest_tokens"] for token, _ in near]
    assert all(isinstance(token, str) for token in tokens)
    shown = capo("info", adapters["prompt-tuning"]).said
    first, similarity = facts["nearest_tokens"][0][0]
    assert f"vector 0 near {first} {similarity:.2f}" in shown
    assert "vector 19 near" in shown


def test_predict_answers_the_same_from_arguments_files_and_standard_input(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["the lamp is broken", "my order was late", "paid twice"]
    (tmp_path / "lines.txt").write_text("\ufeff" + "\r\n\r\n".join(texts) + "\n", encoding="utf-8")
    (tmp_path / "column.csv").write_text("id,message\n" + "".join(f"{at},{text}\n" for at, text in enumerate(texts)))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"words": text}) + "\n" for text in texts))
    adapter = adapters["lora"]
    expected = capo("predict", adapter, *texts, "--json").out
    assert [json.loads(line)["text"] for line in expected.splitlines()] == texts
    for file in ("lines.txt", "column.csv", "rows.jsonl"):
        assert capo("predict", adapter, "--file", tmp_path / file, "--json").out == expected
    named = capo("predict", adapter, "--file", tmp_path / "column.csv", "--text-column", "message", "--json")
    assert named.out == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(texts) + "\n\n"))
    assert capo("predict", adapter, "--json").out == expected


def test_a_prediction_is_one_line_whatever_its_text_holds(adapters: dict[str, Path]) -> None:
    odd = "two\nlines\tand a tab \u2028 é 🎸"
    assert len(capo("predict", adapters["lora"], odd).out.splitlines()) == 1
    (line,) = capo("predict", adapters["lora"], odd, "--json").out.split("\n")[:-1]
    assert json.loads(line)["text"] == odd


def test_standard_input_is_answered_line_by_line_and_head_may_go_away(adapters: dict[str, Path]) -> None:
    program = WARM + "import sys; from capotune.cli import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", program, "predict", str(adapters["lora"])],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        assert process.stderr
        for text in ("the lamp is broken", "paid twice"):
            process.stdin.write(text + "\n")
            process.stdin.flush()
            assert process.stdout.readline().endswith(f"\t{text}\n")  # before the input has ended
        process.stdout.close()
        process.stdin.write("one more\n" * 3)
        process.stdin.close()
        assert process.wait(PATIENCE) == 0
        assert process.stderr.read() == ""


def test_what_is_not_utf8_is_refused(adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    refused = capo("predict", adapters["lora"], "caf\udce9")  # as Python gives an argument that is no UTF-8
    assert refused.code == 2
    assert "text 0: not UTF-8: 'caf\\udce9'" in refused.said
    for errors in ("strict", "surrogateescape"):  # the second is what Python uses in the C locale
        lines = io.TextIOWrapper(io.BytesIO(b"the lamp\ncaf\xe9\n"), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", lines)
        refused = capo("predict", adapters["lora"])
        assert refused.code == 2
        assert "not UTF-8" in refused.said
        assert "Traceback" not in refused.said


def test_a_text_may_begin_with_a_dash(adapters: dict[str, Path]) -> None:
    assert capo("predict", adapters["lora"], "--", "--late").out.endswith("\t--late\n")


@pytest.mark.parametrize("texts", ["one string", [None], [3]])
def test_texts_from_python_must_be_a_list_of_strings(adapters: dict[str, Path], texts: Any) -> None:
    import capotune

    with pytest.raises(capotune.CapotuneError, match=r"a list of texts|a string is needed"):
        capotune.predict(adapters["lora"], texts)


# Compare


@pytest.fixture(scope="module")
def compared(bert: Path, tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Prompt tuning and LoRA side by side, the settings from a YAML file and from flags."""
    folder = tmp_path_factory.mktemp("compare")
    config = folder / "settings.yaml"
    config.write_text(
        f"data: {tickets}\nmodel: {bert}\nseed: 5\nmethods: [lora, qlora]\n"
        "lora: {rank: 3, epochs: 1, target_modules: [query, value]}\n"
        "prompt-tuning:\n  num-virtual-tokens: 4\n  epochs: 1\n",
        encoding="utf-8",
    )
    out = folder / 'größe "1"' / "out dir"
    flags = ["--methods", "prompt-tuning", "lora", "--lora.rank", "2", "--seed", "7", "--tolerance", "1.5"]
    return out, capo("compare", "--config", config, "--out", out, *flags)


def test_compare_writes_the_schema_of_the_design(compared: tuple[Path, Result], bert: Path) -> None:
    out, shown = compared
    assert shown.code == 0, shown.err
    found = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    kinds: dict[str, Any] = {
        "model": str, "task": str, "metric": str, "higher_is_better": bool, "train_rows": int, "test_rows": int,
        "base_score": float, "base_scores": dict, "rows": list, "recommended": str, "why": str, "details": dict,
        "best": str, "tolerance": float, "base_difference": float, "base_difference_interval": list, "base_label": str,
        "columns": list, "metric_why": str, "chance": float, "chance_words": str,
    }  # fmt: skip
    of_rows: dict[str, Any] = {
        "method": str, "score": float, "trainable_parameters": int, "total_parameters": int, "adapter_bytes": int,
        "train_seconds": float, "peak_memory_bytes": int, "epochs": float, "adapter": str, "interval": list,
        "scores": dict, "difference": float, "difference_interval": list, "paired_rows": int,
    }  # fmt: skip
    assert {name: type(value) for name, value in found.items()} == kinds
    for row in found["rows"]:
        if row["method"] == found["best"]:
            assert (row.pop("difference"), row.pop("difference_interval"), row.pop("paired_rows")) == (0, None, 0)
        else:
            assert row["paired_rows"] == found["test_rows"]
        assert {name: type(value) for name, value in row.items()} == {name: of_rows[name] for name in row}
        adapter = out / row["adapter"]
        assert row["adapter_bytes"] == sum(path.stat().st_size for path in adapter.iterdir())
        assert row["peak_memory_bytes"] > 10_000_000
    assert (found["model"], found["task"], found["metric"]) == (str(bert), "classification", "accuracy")
    assert (found["train_rows"], found["test_rows"]) == (72, 24)
    assert found["recommended"] in ("lora", "prompt-tuning")
    assert found["recommended"] in found["why"]


@pytest.mark.parametrize(
    ("flags", "deep"), [("", None), ("--deep", True), ("--no-deep", False), ("--deep False --batch-size 4", False)]
)
def test_switch_that_may_be_left_to_the_program_needs_no_value(flags: str, deep: bool | None) -> None:
    assert parse(api.method_settings("prompt-tuning"), flags.split(), "capo train prompt-tuning").deep is deep
    inside = [flag.replace("--", "--prompt-tuning.") for flag in flags.split()]
    both = parse(api.compare_settings(), ["--data", "a.csv", *inside], "capo compare")
    assert both.for_method("prompt-tuning").deep is deep


def test_flags_win_over_yaml_and_yaml_over_defaults(compared: tuple[Path, Result]) -> None:
    out, _ = compared
    found = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in found["rows"]] == ["prompt-tuning", "lora"]
    settings = found["details"]["settings"]
    assert settings["lora"]["rank"] == 2
    assert settings["lora"]["epochs"] == settings["prompt-tuning"]["epochs"] == 1
    assert settings["lora"]["target_modules"] == ["query", "value"]
    assert settings["prompt-tuning"]["num_virtual_tokens"] == 4
    assert settings["lora"]["seed"] == 7
    assert found["tolerance"] == 1.5
    assert settings["lora"]["alpha"] == 32.0
    told = json.loads((out / "lora" / "run.json").read_text(encoding="utf-8"))["settings_from"]
    chosen = [told[name] for name in ("seed", "data", "rank", "epochs", "alpha", "cache")]
    assert chosen == ["flag", "file", "flag", "file", "default", "default"]


def test_compare_leaves_picture_page_and_adapters_and_nothing_else(compared: tuple[Path, Result]) -> None:
    out, shown = compared
    run = ("run.json", "metrics.jsonl", "predictions.jsonl", "test_rows.json", "adapter")
    files = ("adapter_config.json", "adapter_model.safetensors", "capotune.json", "README.md")
    expected = {"compare.json", "compare.png", "compare.html", "settings.json"}
    for method in ("lora", "prompt-tuning"):
        expected |= {method, *(f"{method}/{name}" for name in run), *(f"{method}/adapter/{name}" for name in files)}
    assert set(tree(out)) == expected
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG\r\n")
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert page.lstrip().startswith("<!doctype html>") or page.lstrip().startswith("<!DOCTYPE html>")
    assert [path.name for path in out.parent.iterdir()] == ["out dir"]
    assert "compare.html" in shown.out
    assert "prompt-tuning" in shown.out


def test_no_written_file_knows_a_temporary_name(compared: tuple[Path, Result]) -> None:
    out, shown = compared
    for path in out.rglob("*"):
        if path.is_file():
            assert b".partial" not in path.read_bytes(), path
    assert ".partial" not in shown.said
    record = json.loads((out / "lora" / "run.json").read_text(encoding="utf-8"))
    assert "out" not in record["settings"]
    assert record["result"]["adapter"] == "adapter"
    assert str(out) not in (out / "lora" / "adapter" / "README.md").read_text(encoding="utf-8")


def test_compared_adapters_answer(compared: tuple[Path, Result]) -> None:
    out, _ = compared
    for method in ("lora", "prompt-tuning"):
        answered = capo("predict", out / method / "adapter", "the lamp is broken")
        assert answered.code == 0
        assert answered.out.endswith("\tthe lamp is broken\n")


def test_the_same_seed_gives_the_same_scores_and_bytes(compared: tuple[Path, Result], tmp_path: Path) -> None:
    """Training alone, with the settings that ``compare`` recorded, makes the same adapter."""
    out, _ = compared
    record = json.loads((out / "lora" / "run.json").read_text(encoding="utf-8"))
    flags = ["--rank", 2, "--epochs", 1, "--target-modules", "query", "value", "--seed", 7]
    shared = ["--data", record["settings"]["data"], "--model", record["settings"]["model"], "--out", tmp_path / "again"]
    assert capo("train", "lora", *shared, *flags).code == 0
    again = json.loads((tmp_path / "again" / "run.json").read_text())
    for name in ("score", "scores", "held_out_score", "data_sha256"):
        assert again["result"][name] == record["result"][name], name
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (out / "lora" / weights).read_bytes()


def test_another_seed_gives_another_adapter(
    adapters: dict[str, Path], bert: Path, tickets: Path, tmp_path: Path
) -> None:
    made = capo(
        "train", "lora", "--data", tickets, "--model", bert, "--out", tmp_path / "run", "--epochs", 1, "--seed", 1
    )  # fmt: skip
    assert made.code == 0
    weights = "adapter_model.safetensors"
    assert (tmp_path / "run" / "adapter" / weights).read_bytes() != (adapters["lora"] / weights).read_bytes()


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("methds: [lora]\n", ["unknown setting 'methds'", "Did you mean 'methods'?"]),
        ("lora:\n  rnk: 3\n", ["lora: unknown setting 'rnk'", "Did you mean 'rank'?"]),
        ("prompt-tuning:\n  num-virtul-tokens: 3\n", ["num_virtul_tokens", "Did you mean 'num_virtual_tokens'?"]),
        ("lora: {rank: 0}\n", ["lora: --rank 0", "greater than or equal to 1"]),
        ("lora: 3\n", ["--lora 3"]),
        ("methods: [lora, lora]\n", ["each once", "lora, lora"]),
        ("- lora\n", ["'name: value'", "found a list"]),
        ("lora: {rank: [\n", ["not valid YAML", "line 2"]),
        ("model: 2020-13-45\n", ["not valid YAML", "month must be in 1..12"]),
        ('model: "a \\ud800"\n', ["'a ?' has half of a two-part character"]),
        ("model: &a {b: *a}\n", ["more than 20 levels deep"]),
        ("a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(18)), ["more than 100,000"]),
    ],
)
def test_a_bad_yaml_file_is_named_with_what_is_wrong(yaml: str, words: list[str], tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text(yaml, encoding="utf-8")
    refused = capo("compare", "--data", "x.csv", "--config", config)
    assert refused.code == 2
    assert f"--config {config}: " in refused.err
    for word in words:
        assert word in refused.said


def test_an_empty_yaml_file_changes_nothing(tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("# nothing\n", encoding="utf-8")
    assert "no-such.csv: no such file" in capo("train", "lora", "--data", "no-such.csv", "--config", config).err
