"""What is written and said: no password or token, and nothing of a stranger's that a page would run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

import capotune
from capotune.adapters.card import card
from capotune.adapters.task_model import CardWords
from capotune.api.comparison import compare_run, compare_settings
from capotune.cli import main
from capotune.errors import CapotuneError, ModelError, without_secrets
from capotune.settings import build

SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz012345",
    "HUGGING_FACE_HUB_TOKEN": "hf_bcdefghijklmnopqrstuvwxyz0123456",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MLFLOW_TRACKING_PASSWORD": "hunter2-mlflow",
    "AWS_SECRET_ACCESS_KEY": "hunter2-aws",
    "HTTPS_PROXY": "http://someone:hunter2-proxy@localhost:9",
}


def test_run_folder_cache_and_output_hold_no_secret_of_the_environment(
    bert: Path, tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CAPOTUNE_CACHE", str(tmp_path / "cache"))
    capotune.train("feature-extraction", data=str(tickets), model=str(bert), out=tmp_path / "run")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "run.json" for path in files)
    content = b"".join(path.read_bytes() for path in files) + "".join(capfd.readouterr()).encode()
    for value in SECRETS.values():
        assert value.rpartition("hunter2")[2].encode() not in content or b"hunter2" not in content
        assert value.encode() not in content


def test_secrets_of_a_comparisons_flags_and_of_its_old_records_are_not_written(
    bert: Path, tickets: Path, tmp_path: Path
) -> None:
    """The command is shown as it was given, and a record of an earlier version may hold all of it."""
    token, out = SECRETS["HF_TOKEN"], tmp_path / "out"
    command = f"capo compare --data {tickets} --model https://user:hunter2@host/m --token {token}"
    own = {"model": str(bert), "methods": ("feature-extraction",), "cache": False}
    settings = build(compare_settings(), {"data": str(tickets), "out": out, **own})
    compare_run(settings, command=command)
    assert "https://user:***@host" in (out / "compare.html").read_text("utf-8")
    record = json.loads((out / "settings.json").read_text("utf-8"))
    (out / "settings.json").write_text(json.dumps({**record, "command": command, "data": {}}), encoding="utf-8")
    assert token in (out / "settings.json").read_text("utf-8")
    shutil.rmtree(out / "feature-extraction")
    for name in ("compare.html", "compare.json", "compare.png"):
        (out / name).unlink()
    capotune.resume(out)
    for path in (path for path in out.rglob("*") if path.is_file()):
        assert b"hunter2" not in path.read_bytes(), path
        assert token.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:hunter2@host/x", "https://user:***@host/x"),
        ("http://:hunter2@host", "http://:***@host"),
        ("a hf_abcdefghijklmnopqrstuvwxyz b", "a hf_*** b"),
        ("https://host:8080/a@b", "https://host:8080/a@b"),
        ("hf_model and user@host", "hf_model and user@host"),
    ],
)
def test_secrets_are_taken_out_of_messages(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert str(ModelError("gone.", setting="model", given=text)) == f"`model={shown}`: gone."


@pytest.mark.parametrize("flag", ["--model", "--data"])
def test_password_in_a_flag_is_neither_said_nor_recorded(
    flag: str, capsys: pytest.CaptureFixture[str], tickets: Path, tmp_path: Path
) -> None:
    address = "https://user:hunter2@host/file.csv"
    given = {"--data": str(tickets), "--model": "capo-tiny", flag: address, "--out": str(tmp_path / "run")}
    code = main(["train", "lora", *(part for item in given.items() for part in item)])
    assert code == 2
    shown = "".join(capsys.readouterr())
    assert "hunter2" not in shown
    assert "host" in shown
    assert not any(b"hunter2" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_error_of_the_api_holds_no_password() -> None:
    with pytest.raises(CapotuneError) as caught:
        capotune.load("https://user:hunter2@host/adapter")
    assert "hunter2" not in str(caught.value)


HOSTILE = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[click](javascript:alert(1))", "![x](https://evil/x.png)",
    "a\n---\nlicense: evil\n---\n# Heading", "```\ncode", "| cell | cell |", "`code`", "&lt;script&gt;",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_labels_names_and_settings_are_text_on_the_card(text: str) -> None:
    record = {
        "settings": {"init_text": text, text: 1},
        "base": {"name": text, "fingerprint": text},
        "method": "lora",
        "task": "classification",
        "trained": {"train_rows": 1, "test_rows": 0},
    }
    words = CardWords(
        f"Classifies a text into 1 labels: {text}.", f"Accuracy of {text}", "capo predict ADAPTER", "pass"
    )
    made = card(record, words, 1, {"task_type": "SEQ_CLS", "peft_type": "LORA"})
    front, body = made.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["library_name"] == "peft"
    assert "license" not in yaml.safe_load(front)
    assert not re.search(r"<(script|img)|\]\(|\n---|\n# H", body)
    assert body.count("```") == 4
    table = body.split("| --- | --- |\n")[1].splitlines()
    assert [line.count("|") for line in table] == [3, 3]
