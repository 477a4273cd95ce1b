"""What stands beside a merged language model's weights, so that it answers as the adapter on its base does, here and in
plain Transformers: the chat template that was trained with, the tokens that end an answer, and no settings of decoding
that the adapter was not trained and scored with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal

import pydantic

from capotune.files import write_atomic
from capotune.models.base import Base
from capotune.settings import DecodingSettings
from capotune.tasks.generation.chat_template import PLAIN_TEMPLATE
from capotune.tasks.generation.encoding import TextEncoder
from capotune.tasks.generation.score import StoredScoredAs
from capotune.tasks.generation.tokens import added_tokens

_CARRIED: Final = (
    "bos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens", "use_cache",
    "cache_implementation", "transformers_version",
)  # fmt: skip
"""What of the base's generation_config.json does not decide which token comes next."""
_RECORD: Final = "capotune_model.json"
"""How a merged model was trained to be asked, where the tokenizer's and the model's own files have no place for it."""


class AskedAs(pydantic.BaseModel):
    """What ``capotune_model.json`` holds. The chat template is the tokenizer's."""

    chat: bool
    learn: Literal["all", "last"]
    separator: str
    max_length: int = pydantic.Field(ge=1)
    scored_as: StoredScoredAs


def plain_template(tokenizer: Any) -> str:
    """``PLAIN_TEMPLATE`` after the tokens that the tokenizer puts before a text, such as ``<s>``: as any template it
    writes all tokens of a conversation. Adapters written before hold it without them."""
    front, _ = added_tokens(tokenizer)
    return "".join(tokenizer.convert_ids_to_tokens(front)) + PLAIN_TEMPLATE


def write_merged_files(task: TextEncoder, record: AskedAs, folder: Path) -> list[str]:
    """Write template, generation settings and the ``record`` into a merged model's ``folder``, which holds its base's
    other files. Returns what the user should know, a sentence each.
    """
    _write_template(task, folder)
    write_atomic(folder / _RECORD, record.model_dump_json(indent=2) + "\n")
    notices = _write_generation_config(task, folder)
    if record.separator:
        notices.append(
            f"the adapter was trained with {record.separator!r} between prompt and completion. Here it is put after a "
            "prompt as before; in other programs let prompts end with it."
        )
    for stop in task.chat_decoding(DecodingSettings()).stop if record.chat else ():
        notices.append(
            f"the chat template ends a turn with the text {stop!r} and no token of its own. Here an answer ends there; "
            "tell other programs to stop at it."
        )
    return notices


def asked_as(base: Base) -> AskedAs | None:
    """How a merged model was trained to be asked; None for other models. ``ModelError`` for a damaged record."""
    path = base.folder / _RECORD
    if not path.is_file():
        return None
    try:
        return AskedAs.model_validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        raise base.error(f"{path} is not as capotune writes it: {problem['msg']}.", advice="Merge again.") from None


def _write_template(task: TextEncoder, folder: Path) -> None:
    """The template, and one for tools, as Transformers reads them, unless the tokenizer's own files hold them."""
    template = plain_template(task.tokenizer) if task.chat_template == PLAIN_TEMPLATE else task.chat_template
    own, others = task.tokenizer.chat_template, folder / "additional_chat_templates"
    stored = (own.get("default"), own.get("tool_use")) if isinstance(own, dict) else (own, None)
    if template is None or (template, task.tool_template) == stored:
        return
    for path in (folder / "chat_template.json", *others.glob("*.jinja")):
        path.unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("chat_template", None) is not None:
            write_atomic(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    write_atomic(folder / "chat_template.jinja", template)
    if task.tool_template is not None:
        others.mkdir(exist_ok=True)
        write_atomic(others / "tool_use.jinja", task.tool_template)


def _write_generation_config(task: TextEncoder, folder: Path) -> list[str]:
    """Every end token, so that an answer ends where it did in training."""
    of_base = task.base.generation_values
    pad = task.tokenizer.pad_token_id
    values: dict[str, Any] = {
        "pad_token_id": task.end_ids[0] if pad is None else pad,
        **{name: of_base[name] for name in _CARRIED if of_base.get(name) is not None},
        "eos_token_id": list(task.end_ids),
    }
    write_atomic(folder / "generation_config.json", json.dumps(values, indent=2) + "\n")
    left_out = [
        f"{name}={value}"
        for name, value in of_base.items()
        if name not in (*_CARRIED, "eos_token_id") and not name.startswith("_") and _decides(value)
    ]
    if not left_out:
        return []
    return [
        f"generation_config.json: the base's asks for {', '.join(left_out)}; the merged model's does not, as the "
        "adapter was trained and scored without. Set them where the model is served, if they are wanted."
    ]


def _decides(value: Any) -> bool:
    """Whether a setting with this value changes which token is written; 0, 1 and nothing are neutral."""
    return value is True or (value is not False and value not in (None, 0, 1, [], {}, ""))
