"""Adapters and bases on the Hugging Face hub: pushed without what belongs to the machine, found again by their name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import hub_server
import pytest
import yaml
from commands import capo
from hub_server import READER, UNKNOWN, Hub

import capotune
from capotune.adapters.files import RECORD
from capotune.adapters.store import read_adapter, save_adapter
from capotune.errors import AdapterError, CapotuneError, HubError, ModelError, SettingError
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.settings import LoraSettings
from capotune.models.base import find
from capotune.models.hub import HubName, hub_name
from capotune.runs.publish import public_base, publish
from capotune.tasks.golden import TEXTS, golden_answers

ASKED = ["my lamp is broken", "the parcel was late", "paid twice"]
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "capotune.json"]
SECRETS = ["/secret/customers.csv", "secret-data-hash", "a prompt that was tried", "/tmp/where/it/was"]

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
"""Of huggingface_hub's own upload, where Xet is off."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server.running() as server:
        hub_server.use(server, tmp_path / "cache", monkeypatch)
        yield server


@pytest.fixture(scope="module")
def adapter(bert: Path, tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained in a run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    capotune.train("lora", data=str(tickets), model=str(bert), out=out, epochs=1, rank=2)
    return out / "adapter"


def copy(adapter: Path, folder: Path, **changes: Any) -> Path:
    """The adapter with some values of its record changed."""
    shutil.copytree(adapter, folder)
    record = json.loads((folder / RECORD).read_text("utf-8"))
    for name, value in changes.items():
        record[name] = {**record[name], **value} if isinstance(value, dict) else value
    (folder / RECORD).write_text(json.dumps(record), "utf-8")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def front_matter(card: bytes) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(card.decode().split("---\n")[1])
    return values


def error_of(function: Any, *arguments: Any, kind: type[CapotuneError] = CapotuneError, **named: Any) -> str:
    with pytest.raises(kind) as caught:
        function(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is pushed


def test_pushed_adapter_is_loaded_by_its_name_with_equal_outputs(
    hub: Hub, adapter: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("ours/bert", files_of(bert))
    expected = capotune.load(adapter).predict_proba(ASKED).tolist()
    pushed = capo("push", str(adapter), "ours/tickets", "--model", "ours/bert", "--private", "--json")
    assert pushed.code == 0, pushed.err
    result = json.loads(pushed.out)
    assert result["files"] == FILES == sorted(hub.files("ours/tickets"))
    assert result["url"].endswith(result["commit"])
    assert hub.repositories["ours/tickets"].private
    assert hub.messages == ["Push lora adapter with Capotune"]

    hub_server.use(hub, tmp_path / "elsewhere", monkeypatch)  # another machine
    loaded = capotune.load("ours/tickets")
    assert loaded.predict_proba(ASKED).tolist() == expected
    assert capotune.info("ours/tickets", check=True)["check"]["agrees"]
    assert capo("predict", "ours/tickets", ASKED[0]).code == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert capotune.load("ours/tickets").predict_proba(ASKED).tolist() == expected  # from the cache alone


def test_nothing_of_the_machine_or_the_data_is_pushed(hub: Hub, adapter: Path, tmp_path: Path, tickets: Path) -> None:
    golden = json.loads((adapter / RECORD).read_text("utf-8"))["golden"]
    trained = {
        "data_sha256": SECRETS[1],
        "candidates": [{"prompt": SECRETS[2], "held_out_loss": 1.0}],
        "adapter": SECRETS[3],
        "general": {"text": SECRETS[0], "loss": 1.0, "words": f"on '{SECRETS[0]}' as good as the base"},
        "numbers": [1.0, 2.0],
    }
    mine = [*golden, {"text": "a row of the user's", "rows": golden[0]["rows"]}]
    folder = copy(adapter, tmp_path / "mine", trained=trained, golden=mine, unknown=SECRETS[0])
    (folder / "notes.txt").write_text("notes of the user's")
    (folder / "README.md").write_text(SECRETS[0])
    result = capotune.push(folder, "ours/tickets", model="ours/bert")
    pushed = b"".join(hub.files("ours/tickets").values())
    rows = [line.split(",")[0] for line in tickets.read_text("utf-8").splitlines()[1:]]
    for text in [*SECRETS, "a row of the user's", "notes of the user's", str(Path.home()), str(tmp_path), *rows]:
        assert text.encode() not in pushed, text
    assert sorted(hub.files("ours/tickets")) == FILES
    left_out = ["the base's folder", "the adapter's folder", "the prompts that were tried", "the data's hash"]
    assert result["left_out"] == [*left_out, "golden answers to 1 texts that are not capotune's"]
    record = json.loads(hub.files("ours/tickets")[RECORD])
    assert record["trained"]["numbers"] == [1.0, 2.0]
    assert [one["text"] for one in record["golden"]] == list(TEXTS)[: len(golden)]


@pytest.mark.usefixtures("hub")
def test_check_says_what_stayed_behind_when_golden_answers_did(adapter: Path, tmp_path: Path) -> None:
    golden = [{"text": "a row of the user's", "rows": [[[0, 0.5]]]}]
    capotune.push(copy(adapter, tmp_path / "mine", golden=golden), "ours/tickets", model="ours/bert")
    assert "golden answers to 1 texts" in " ".join(capotune.info("ours/tickets")["left_out"])
    with pytest.raises(AdapterError, match=r"When it was pushed, .*golden answers to 1 texts"):
        capotune.info("ours/tickets", check=True, model=json.loads((adapter / RECORD).read_text())["base"]["name"])


def test_card_says_base_licence_and_scores_as_the_hub_reads_them(hub: Hub, adapter: Path) -> None:
    from huggingface_hub import ModelCard

    hub.put("ours/bert", {"config.json": b"{}"})
    hub.repositories["ours/bert"].card = {"license": "mit"}
    capotune.push(adapter, "ours/tickets", model="ours/bert@main")
    text = hub.files("ours/tickets")["README.md"].decode()
    found = ModelCard(text).data
    trained = read_adapter(adapter).record["trained"]
    assert (found.base_model, found.license, found.library_name) == ("ours/bert", "mit", "peft")
    assert found.pipeline_tag == "text-classification"
    assert found.tags == ["capotune", "lora", "base_model:adapter:ours/bert"]
    assert found.model_name == "tickets"
    assert {one.metric_type: one.metric_value for one in found.eval_results} == trained["scores"]
    assert 'capo predict ours/tickets "your text"' in text
    config = json.loads(hub.files("ours/tickets")["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("ours/bert", "main")


def test_combined_adapter_is_pushed_without_what_it_was_made_of(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    made_of = {"name": SECRETS[0], "weight": 0.5, "trained": {"data_sha256": SECRETS[1]}, "settings": {}}
    combined = {"method": "ties", "rank": 2, "held": 1.0, "density": 0.5, "adapters": [made_of, made_of]}
    folder = copy(adapter, tmp_path / "both", trained={"combined": combined, "test_rows": 0})
    capotune.push(folder, "ours/both", model="ours/bert")
    assert not any(secret.encode() in b"".join(hub.files("ours/both").values()) for secret in SECRETS)
    shown = capo("info", "ours/both")
    assert "adapter 1 × 0.5, adapter 2 × 0.5 by ties" in shown.said


def test_embedded_base_is_named_as_on_the_hub_for_other_programs(hub: Hub) -> None:
    fixture = Path(__file__).parent / "fixtures" / "adapters" / "labels-lora"
    capotune.push(fixture, "ours/old")
    files = hub.files("ours/old")
    assert json.loads(files[RECORD])["base"]["name"] == "minilm"
    name = "sentence-transformers/all-MiniLM-L6-v2"
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == name
    front = front_matter(files["README.md"])
    assert (front["base_model"], front["license"]) == (name, "apache-2.0")


def test_adapter_that_peft_cannot_read_is_not_called_pefts(hub: Hub, bert: Path, tmp_path: Path) -> None:
    assembled = helpers.on_base(bert, FeatureExtractionSettings(trainable_layers=0))
    save_adapter(tmp_path / "head", assembled, helpers.TRAINED, golden_answers(assembled))
    capotune.push(tmp_path / "head", "ours/head", model="ours/bert")
    front = front_matter(hub.files("ours/head")["README.md"])
    assert front["library_name"] == "capotune"
    assert "model-index" not in front  # there were no test rows


def test_branch_and_message_are_the_users(hub: Hub, adapter: Path) -> None:
    capotune.push(adapter, "ours/tickets", model="ours/bert", revision="v2", message="Second try")
    assert sorted(hub.files("ours/tickets", "v2")) == FILES
    assert hub.files("ours/tickets", "main") == {}
    assert hub.messages == ["Second try"]
    assert read_adapter("ours/tickets@v2").task == "classification"


def test_copy_that_names_a_home_folder_or_a_token_is_refused(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    for number, (label, what) in enumerate({"/home/me/x": "a home folder", "hf_" + "a" * 30: "a token"}.items()):
        folder = copy(adapter, tmp_path / str(number), labels=["broken", "late", label])
        message = error_of(capotune.push, folder, "ours/tickets", model="ours/bert", kind=AdapterError)
        assert what in message
        assert "capotune.json" in message
    assert not hub.repositories


@pytest.mark.parametrize(
    ("label", "is_refused"),
    [
        (r"C:\Users\bob\x", True),
        ("see /root/x", True),
        ("next\n/home/é", True),
        ("square/root", False),
        ("https://some.org/home/page", False),
    ],
)
def test_home_folders_are_found_in_values_and_not_in_other_words(
    label: str, is_refused: bool, adapter: Path, tmp_path: Path
) -> None:
    stored = read_adapter(copy(adapter, tmp_path / "mine", labels=["broken", "late", label]))
    if not is_refused:
        publish(stored, "ours/tickets", "ours/bert", None)
        return
    with pytest.raises(AdapterError, match="home folder stands in 'labels'"):
        publish(stored, "ours/tickets", "ours/bert", None)


# What is refused when pushing


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (None, ["no token of the hub is here", "hf auth login"]),
        (UNKNOWN, ["does not know the token", "hf auth login"]),
        (READER, ["may not do this in ours/tickets"]),
    ],
)
def test_push_without_the_right_is_refused(
    token: str | None, words: list[str], hub: Hub, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_server.use(hub, tmp_path / "cache", monkeypatch, token)
    result = capo("push", str(adapter), "ours/tickets", "--model", "ours/bert")
    assert result.code == 2
    assert all(word in result.said for word in words), result.err
    assert not hub.repositories


@pytest.mark.usefixtures("hub")
def test_push_without_a_hub_is_refused(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    message = error_of(capotune.push, adapter, "ours/tickets", model="ours/bert", kind=HubError)
    assert "the hub cannot be reached" in message
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in error_of(capotune.push, adapter, "ours/tickets", model="ours/bert", kind=HubError)


def test_private_push_into_a_public_repository_sends_nothing(hub: Hub, adapter: Path) -> None:
    hub.put("ours/tickets", {})
    message = error_of(capotune.push, adapter, "ours/tickets", model="ours/bert", private=True, kind=HubError)
    assert "is public" in message
    assert hub.files("ours/tickets") == {}


@pytest.mark.parametrize(
    ("repo", "model", "words"),
    [
        ("ours/tickets", None, ["base is a folder of this machine", "OWNER/NAME"]),
        ("ours/tickets", "tests", ["model=tests", "a folder of this machine"]),
        ("ours/tickets/more", "ours/bert", ["repo=ours/tickets/more", "OWNER/NAME"]),
        ("../tickets", "ours/bert", ["repo=../tickets", "OWNER/NAME"]),
        ("ours/tickets@v2", "ours/bert", ["repo=ours/tickets@v2", "OWNER/NAME"]),
    ],
)
def test_push_of_what_others_could_not_find_is_refused(
    repo: str, model: str | None, words: list[str], hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    message = error_of(capotune.push, adapter, repo, model=model, kind=SettingError)
    assert all(word in message for word in words), message
    assert not hub.requests


def test_base_in_the_hubs_cache_is_named_as_on_the_hub(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    base = {"name": f"/home/me/.cache/huggingface/hub/models--ours--bert/snapshots/{'1' * 40}"}
    folder = copy(adapter, tmp_path / "mine", base=base)
    capotune.push(folder, "ours/tickets")
    pushed = publish(read_adapter(folder), "ours/tickets", "ours/bert@v2", None).files["adapter_config.json"]
    (folder / "adapter_config.json").write_bytes(pushed)
    again = publish(read_adapter(folder), "ours/tickets", "ours/other", None).files["adapter_config.json"]
    assert "revision" in json.loads(pushed)
    assert "revision" not in json.loads(again)
    with pytest.raises(SettingError, match="a folder of this machine"):
        public_base(read_adapter(folder), base["name"] + "/model-Q4.gguf")
    record = json.loads(hub.files("ours/tickets")[RECORD])
    assert record["base"]["name"] == "ours/bert@" + "1" * 40


# What is found by its name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", HubName("gpt2")),
        ("ours/bert", HubName("ours/bert")),
        ("ours/bert@refs/pr/1", HubName("ours/bert", "refs/pr/1")),
        ("ours/bert/a/b@v1", HubName("ours/bert", "v1", "a/b")),
        *(
            (name, None)
            for name in ("./x", "../x", "/x", "a b", "ours/../x", "ours/x@../y", "ours/", "", "~/x", "a\\b")
        ),
    ],
)
def test_names_on_the_hub_have_an_owner_a_revision_and_a_folder(name: str, expected: HubName | None) -> None:
    assert hub_name(name) == expected


def test_revision_and_subfolder_of_an_adapter_are_read(hub: Hub, adapter: Path) -> None:
    nested = {f"second/{name}": content for name, content in files_of(adapter).items()}
    hub.put("ours/several", nested)
    sha = hub.repositories["ours/several"].refs["main"]
    for name in ("ours/several/second", f"ours/several/second@{sha}", "ours/several/second@main"):
        assert read_adapter(name).record == read_adapter(adapter).record
    assert capotune.info("ours/several/second")["task"] == "classification"
    message = error_of(read_adapter, "ours/several", kind=AdapterError)
    assert "holds no adapter_config.json" in message
    assert "OWNER/NAME/FOLDER" in message


def test_only_tensors_settings_and_tokenizers_are_fetched(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    more = {"run.py": b"1/0", "optimizer.pt": b"x", "data.csv": b"x", "modeling.py": b"1/0", "adapter_model.bin": b"x"}
    hub.put("ours/tickets", {**files_of(adapter), **more, "chat_template.jinja": b"x"})
    read_adapter("ours/tickets")
    fetched = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert fetched == {*FILES, "chat_template.jinja"} - {"README.md"}


def test_adapter_of_peft_names_its_base_with_a_revision(hub: Hub, bert: Path, tmp_path: Path) -> None:
    assembled = helpers.on_base(bert, LoraSettings(rank=2))
    save_adapter(tmp_path / "lora", assembled, helpers.TRAINED)
    files = files_of(tmp_path / "lora")
    config = {**json.loads(files["adapter_config.json"]), "base_model_name_or_path": "ours/bert", "revision": "v1"}
    weights = {"adapter_model.safetensors": files["adapter_model.safetensors"]}
    hub.put("ours/theirs", {"adapter_config.json": json.dumps(config).encode(), **weights})
    assert read_adapter("ours/theirs").base == "ours/bert@v1"
    message = error_of(capotune.push, "ours/theirs", "ours/copy", kind=AdapterError)
    assert "hf upload ours/copy" in message
    hub.put("ours/pickled", {"adapter_config.json": json.dumps(config).encode(), "adapter_model.bin": b"x"})
    message = error_of(capotune.generate, "ours/pickled", ["x"], kind=AdapterError)
    assert "can run code and is not fetched" in message


def test_folder_wins_over_the_hub(hub: Hub, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(adapter, tmp_path / "ours" / "tickets")
    monkeypatch.chdir(tmp_path)
    assert read_adapter("ours/tickets").folder == Path("ours/tickets")
    assert not hub.requests


def test_base_is_read_at_its_revision(hub: Hub, bert: Path) -> None:
    hub.put("ours/bert", files_of(bert))
    sha = hub.repositories["ours/bert"].refs["main"]
    hub.repositories["ours/bert"].commit("main", {"config.json": b"{}"})
    base = find(f"ours/bert@{sha}")
    assert (base.folder / "config.json").read_bytes() == (bert / "config.json").read_bytes()
    assert base.lasting_name == f"ours/bert@{sha}"


@pytest.mark.parametrize(
    ("name", "token", "words"),
    [
        ("ours/none", READER, ["no such repository on the hub, or none that you may see"]),
        ("ours/hidden", None, ["no such repository on the hub, or none that you may see", "hf auth login"]),
        ("ours/hidden", UNKNOWN, ["does not know the token"]),
        ("ours/bert@v9", READER, ["the hub's ours/bert has no revision 'v9'"]),
        ("ours/bert@../x", READER, ["not a valid hub id"]),
    ],
)
def test_name_that_is_neither_says_that_both_were_tried(
    name: str, token: str | None, words: list[str], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("ours/bert", {"config.json": b"{}"})
    hub.put("ours/hidden", {}, private=True)
    hub_server.use(hub, tmp_path / "cache", monkeypatch, token)
    for kind, function, start in (
        (AdapterError, read_adapter, "no such adapter folder"),
        (ModelError, find, "no such folder, and"),
    ):
        message = error_of(function, name, kind=kind)
        assert name in message
        assert start in message
        if kind is ModelError or hub_name(name):
            assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ["~nobody-is-called-so/x", "a" * 300, "a/" * 300, "a\0b"])
def test_name_that_no_file_can_have_is_refused(name: str) -> None:
    assert "no such adapter folder" in error_of(read_adapter, name, kind=AdapterError)
    assert "no such folder" in error_of(find, name, kind=ModelError)


@pytest.mark.usefixtures("hub")
def test_hub_that_fails_is_said_with_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_server._Handler, "_route", lambda self, _: self._error(418, "", "I am a teapot."))
    assert "the hub answered with the error 418: I am a teapot." in error_of(read_adapter, "ours/x", kind=AdapterError)


def test_adapter_is_told_from_a_model_on_the_hub(hub: Hub, adapter: Path, bert: Path) -> None:
    from capotune import api

    hub.put("ours/bert", files_of(bert))
    hub.put("ours/tickets", files_of(adapter))
    assert api.is_adapter("ours/tickets")
    assert not api.is_adapter("ours/bert")
    assert not api.is_adapter("minilm")
    assert not api.is_adapter("ours/none")
