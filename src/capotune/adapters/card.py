"""README.md of an adapter: what it is, how it scored, how to use it. It names no folder: the adapter may move."""

from __future__ import annotations

from typing import Any

from capotune.adapters.task_model import CardWords
from capotune.files import human_bytes


def card(record: dict[str, Any], words: CardWords, parameters: int) -> str:
    """The card of an adapter with so many ``parameters``, in Markdown with the hub's front matter."""
    settings = "\n".join(f"| {name} | {value} |" for name, value in record["settings"].items())
    base, method = record["base"], record["method"]
    is_above = base["name"] == ".."  # as ``store.ABOVE``
    base_model = "" if is_above else f"base_model: {base['name']}\n"
    name = "the model in the folder above" if is_above else base["name"]
    return f"""---
{base_model}library_name: capotune
tags: [capotune, {method}]
---
# {method} adapter for {name}

{words.what}

{words.score}, trained on {record["trained"]["train_rows"]:,} rows.
{parameters:,} trained weights ({human_bytes(parameters * 4)}); the base itself is unchanged
(fingerprint `{base["fingerprint"]}`).

With `ADAPTER` the folder of this file:

```
{words.shell}
```

```python
import capotune

adapter = "ADAPTER"
{words.python}
```

| setting | value |
| --- | --- |
{settings}
"""
