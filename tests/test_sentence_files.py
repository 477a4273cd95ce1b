"""sentence-transformers' files: how a text becomes one vector is as they say, and what is not done here is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import on_base

import capotune
from capotune.data.batches import TokenRows
from capotune.errors import ModelError
from capotune.events import Event, Warned
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.models.base import find
from capotune.tasks.text_targets.features import compute_features

FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
ROWS = [[2, 9, 14, 3], [2, 5, 6, 7, 8, 21, 3], [2, 12, 3]]
MODULES = [("Transformer", ""), ("Pooling", "1_Pooling")]


def sentence_model(
    bert: Path, folder: Path, pooling: dict[str, Any] | None = None, modules: list[tuple[str, str]] | None = MODULES
) -> Path:
    """BERT with the files around it."""
    shutil.copytree(bert, folder)
    for kind, path in modules or MODULES:
        if path:
            (folder / path).mkdir()
            values = pooling if kind == "Pooling" else {}
            (folder / path / "config.json").write_text(json.dumps(values))
    if modules is not None:
        kinds = "sentence_transformers.sentence_transformer.modules"
        listed = [{"idx": 0, "name": "0", "path": path, "type": f"{kinds}.{kind}"} for kind, path in modules]
        (folder / "modules.json").write_text(json.dumps(listed))
    return folder


def vector(states: torch.Tensor, mode: str) -> torch.Tensor:
    """A text's vector of its states (tokens, hidden), by sentence-transformers' definitions."""
    count = len(states)
    weights = torch.arange(1, count + 1)[:, None]
    return {
        "cls": states[0],
        "lasttoken": states[-1],
        "max": states.max(0).values,
        "mean": states.sum(0) / count,
        "mean_sqrt_len_tokens": states.sum(0) / count**0.5,
        "weightedmean": (weights * states).sum(0) / weights.sum(),
    }[mode]


@pytest.mark.parametrize("form", ["word", "list of one", "flags", "flags without modules.json"])
@pytest.mark.parametrize("mode", FLAGS)
@torch.no_grad()
def test_texts_are_pooled_as_the_file_says(mode: str, form: str, bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    flags = {flag: name == mode for name, flag in FLAGS.items()}
    stored = {"word": {"pooling_mode": mode}, "list of one": {"pooling_mode": [mode]}}.get(form, flags)
    modules = None if form == "flags without modules.json" else MODULES
    folder = sentence_model(bert, tmp_path / "model", {"word_embedding_dimension": 32, **stored}, modules)
    assembled = on_base(folder, FeatureExtractionSettings(trainable_layers=1))
    found = compute_features(assembled, (-1,), TokenRows(ROWS, 0), None, reduced=False)
    reference = AutoModel.from_pretrained(bert).eval()
    each = [reference(input_ids=torch.tensor([row])).last_hidden_state[0] for row in ROWS]
    torch.testing.assert_close(found, torch.stack([vector(states, mode) for states in each]), rtol=0, atol=1e-5)


def test_modules_json_says_which_folder_is_the_pooling(bert: Path, tmp_path: Path) -> None:
    """A folder of an earlier training lies beside the one that counts."""
    modules = [("Transformer", ""), ("Pooling", "2_Pooling")]
    folder = sentence_model(bert, tmp_path / "model", {"pooling_mode": "cls"}, modules)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "max"}')
    assert find(str(folder)).pooling == "cls"
    (folder / "modules.json").write_text(json.dumps([{"path": "", "type": "sentence_transformers.models.Transformer"}]))
    assert find(str(folder)).pooling == "mean"


@pytest.mark.parametrize(
    ("pooling", "words"),
    [
        ({"pooling_mode": ["mean", "cls"]}, "by mean and cls pooling"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "by max and mean pooling"),
        ({"pooling_mode": "attention"}, "by attention pooling"),
    ],
)
def test_another_pooling_is_refused(pooling: dict[str, Any], words: str, bert: Path, tmp_path: Path) -> None:
    folder = sentence_model(bert, tmp_path / "model", pooling)
    with pytest.raises(ModelError, match=rf"`model=.*`: .*{words} .*not done here. Write one of these"):
        _ = find(str(folder)).pooling


def test_what_sentence_transformers_does_beside_is_said(bert: Path, tickets: Path, tmp_path: Path) -> None:
    modules = [*MODULES, ("Dense", "2_Dense"), ("Normalize", "")]
    folder = sentence_model(bert, tmp_path / "model", {"pooling_mode": "mean"}, modules)
    prompts = {"prompts": {"topic": "Sort this: "}, "default_prompt_name": "topic"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8}))
    events: list[Event] = []
    capotune.train(
        "feature-extraction", data=str(tickets), model=str(folder), out=tmp_path / "run", report=events.append,
        validation_fraction=0.1,
    )  # fmt: skip
    said = [event.text for event in events if isinstance(event, Warned)]
    assert len(said) == 3
    assert "Dense and Normalize after the pooling" in said[0]
    assert "'Sort this: ' before every text" in said[1]
    assert "longer than the 8 tokens that sentence-transformers reads" in said[2]
    assert int(said[2].split()[0]) > 0


def test_nothing_is_said_of_plain_models(bert: Path) -> None:
    assert not find(str(bert)).sentence_files.notices
    assert not find("minilm").sentence_files.notices


def test_what_concerns_the_base_is_printed_once_for_all_techniques(capsys: pytest.CaptureFixture[str]) -> None:
    from capotune.cli.display import watch

    with watch(["lora", "qlora"]) as report:
        for method in ("lora", "qlora"):
            report(Warned(method=method, text="the head reads the pooled states."))
            report(Warned(method=method, text=f"{method} leaves something out."))
    said = capsys.readouterr().err
    assert said.count("the head reads the pooled states.") == 1
    assert "lora: lora leaves something out." in said
    assert "qlora: qlora leaves something out." in said
