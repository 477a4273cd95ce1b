"""README.md of an adapter: what it is, how it scored, how to use it. It names no folder: the adapter may move.

Its front matter is the hub's: https://huggingface.co/docs/hub/model-cards, with the scores as ``model-index``.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from capotune.adapters.task_model import CardWords
from capotune.files import human_bytes
from capotune.models.base import EMBEDDED
from capotune.models.hub import hub_name

_ON_HUB = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification"}
"""What the hub calls PEFT's tasks."""
_HERE = "ADAPTER"
_MARKUP = re.compile(r"[&<>`|]|\]\(")


def card(
    record: dict[str, Any],
    words: CardWords,
    parameters: int,
    config: dict[str, Any],
    *,
    repo: str = _HERE,
    licence: str | None = None,
) -> str:
    """The card of an adapter with so many ``parameters``, in Markdown with the hub's front matter.

    ``config`` is its ``adapter_config.json``, ``repo`` its name on the hub if it has one, ``licence`` its base's.
    """
    settings = "\n".join(f"| {_plain(name)} | {_plain(value)} |" for name, value in record["settings"].items())
    base, method = record["base"], record["method"]
    name = "the model in the folder above" if base["name"] == ".." else base["name"]  # as ``store.ABOVE``
    front = yaml.safe_dump(_front(record, config, repo, licence), sort_keys=False, allow_unicode=True)
    where = f"With `{_HERE}` the folder of this file:\n\n" if repo == _HERE else ""
    return f"""---
{front}---
# {method} adapter for {_plain(name)}

{_plain(words.what)}

{_plain(words.score)}, trained on {record["trained"]["train_rows"]:,} rows.
{parameters:,} trained weights ({human_bytes(parameters * 4)}); the base itself is unchanged
(fingerprint `{_plain(base["fingerprint"])}`).

{where}```
{words.shell.replace(_HERE, repo)}
```

```python
import capotune

adapter = "{repo}"
{words.python}
```

| setting | value |
| --- | --- |
{settings}
"""


def _plain(value: object) -> str:
    """A text for Markdown, in one line, in which labels and names are no tags, links, code or cells."""
    text = " ".join(str(value).split())
    return _MARKUP.sub(lambda found: f"{found[0][:-1]}&#{ord(found[0][-1])};", text)


def base_on_hub(name: str) -> str | None:
    """The repository on the hub of a base with this name, without revision; None where it is not known to be there."""
    if name in EMBEDDED:
        return EMBEDDED[name].hub
    found = hub_name(name)
    return None if found is None else found.repo


def _front(record: dict[str, Any], config: dict[str, Any], repo: str, licence: str | None) -> dict[str, Any]:
    base, method, task = base_on_hub(record["base"]["name"]), record["method"], _ON_HUB.get(config["task_type"])
    front = {
        "base_model": base,
        "license": licence,
        "library_name": "peft" if config["peft_type"] else "capotune",
        "pipeline_tag": task,
        "tags": ["capotune", method, *([f"base_model:adapter:{base}"] if base else [])],
    }
    scores = record["trained"].get("scores") or {}
    metrics = [
        {"type": name, "value": value, "name": name.replace("_", " ")}
        for name, value in scores.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]
    if metrics and record["trained"].get("test_rows"):
        result = {
            "task": {"type": task or record["task"]},
            "dataset": {"type": "private", "name": f"{record['trained']['test_rows']:,} test rows, not published"},
            "metrics": metrics,
        }
        name = f"{method} adapter" if repo == _HERE else repo.rpartition("/")[2]
        front["model-index"] = [{"name": name, "results": [result]}]
    return {name: value for name, value in front.items() if value is not None}
