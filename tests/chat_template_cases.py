"""Stock chat templates and conversations to write with them, and the table of what becomes of each pair.

    python tests/chat_template_cases.py        prints the table of docs/conversations.md

The templates are those that TRL ships (the extra ``dev`` brings it): as the models' makers wrote them, and beside most
a second one that marks the assistant's part with ``{% generation %}``, by other authors.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from capotune.data.batches import Encoded
from capotune.data.samples import Conversation, Samples
from capotune.data.table import Origin
from capotune.errors import DataError
from capotune.tasks.generation.encoding import TextEncoder
from capotune.tasks.generation.notices import Notices

END, BOS = "<|endoftext|>", "<bos>"
CALL = [{"id": "call00001", "type": "function", "function": {"name": "rate", "arguments": {"of": "euro", "days": 2}}}]
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "rate",
            "description": "A rate.",
            "parameters": {"type": "object", "properties": {"of": {"type": "string"}, "days": {"type": "integer"}}},
        },
    },
)

ENDS = {
    **dict.fromkeys(("cohere", "cohere2"), ("<|END_OF_TURN_TOKEN|>",)),
    **dict.fromkeys(("deepseek_r1_distill", "deepseekv3"), ("<｜end▁of▁sentence｜>",)),
    **dict.fromkeys(("gemma", "gemma3"), ("<end_of_turn>",)),
    **dict.fromkeys(("diffusion_gemma", "gemma4_v5"), ("<turn|>", "<|tool_response>")),
    "glm4moe": ("<|user|>", "<|observation|>", "<|assistant|>", "<|system|>", END),
    "gptoss": ("<|return|>", "<|call|>"),
    **dict.fromkeys(("idefics3", "smolvlm"), ("<end_of_utterance>",)),
    **dict.fromkeys(("lfm2", "lfm2_2_5_v2"), ("<|im_end|>",)),
    **dict.fromkeys(("llama3", "llama3_1"), ("<|eot_id|>",)),
    "llava_next": ("</s>",),
    "muse_glimmer": ("<|eot|>",),
    **dict.fromkeys(("nemotron_3_5_lightning", "nemotron_3_ultra"), ("<|im_end|>",)),
    "phi3": ("<|end|>",),
    **dict.fromkeys(("qwen2_5", "qwen2_5_vl", "qwen3", "qwen3_5_think", "qwen3_8"), ("<|im_end|>",)),
    **dict.fromkeys(("qwen3_instruct_2507", "qwen3_vl"), ("<|im_end|>",)),
}
"""The templates by their files' names, and the tokens that end a turn in each, as its maker documents them."""


def turn(role: str, content: str, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


HI = (turn("user", "hi there"), turn("assistant", "hello you"))
AGAIN = (turn("user", "again?"), turn("assistant", "yes, again"))
CONVERSATIONS: dict[str, Conversation] = {
    "one answer": Conversation(HI),
    "several": Conversation((*HI, *AGAIN)),
    "system": Conversation((turn("system", "be kind"), *HI, *AGAIN)),
    "tools": Conversation(
        (
            turn("user", "euro?"),
            turn("assistant", "", tool_calls=CALL),
            turn("tool", "1.1", name="rate", tool_call_id="call00001"),
            turn("assistant", "It is 1.1."),
        ),
        TOOLS,
    ),
    "thinking": Conversation(
        (
            HI[0],
            turn("assistant", "hello you", reasoning_content="a greeting"),
            AGAIN[0],
            turn("assistant", "yes, again", reasoning_content="once more"),
        )
    ),
    "`<think>`": Conversation(
        (
            HI[0],
            turn("assistant", "<think>\na greeting\n</think>\n\nhello you"),
            AGAIN[0],
            turn("assistant", "<think>\nonce more\n</think>\n\nyes, again"),
        )
    ),
    "assistant first": Conversation((turn("assistant", "Welcome!"), *HI)),
    "user twice": Conversation((HI[0], turn("user", "well?"), HI[1])),
    "assistant twice": Conversation((*HI, turn("assistant", "and you?"))),
    "user last": Conversation((*HI, AGAIN[0])),
    "system later": Conversation((*HI, turn("system", "be brief"), *AGAIN)),
}
"""The kinds of conversations."""


def templates() -> Path | None:
    """The folder of templates; None: TRL, or a version of it that has them, is not installed."""
    spec = find_spec("trl")  # finds the files without importing it
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "chat_templates"
    return folder if all((folder / f"{name}.jinja").is_file() for name in ENDS) else None


def tokenizer_for(name: str, folder: Path, *, own: bool = True) -> PreTrainedTokenizerFast:
    """A token for each byte, and with ``own`` the special tokens that the template writes; else they are text."""
    text = (folder / f"{name}.jinja").read_text(encoding="utf-8")
    written = re.findall(r"<\|\"?[\w ▁-]*\|>|<\|?\w+\|?>|<｜[^｜]+｜>|\[gMASK\]|</s>", text)
    special = {token for token in written if "think" not in token and "tool_call>" not in token}
    vocabulary = {char: at for at, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(sorted({*special, *ENDS[name], END, BOS} if own else {END, BOS}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=BOS, eos_token=END, pad_token=END)
    tokenizer.chat_template = text
    return tokenizer


def encoder_for(tokenizer: Any, **options: Any) -> TextEncoder:
    """The encoder of conversations alone."""
    end = tokenizer.convert_tokens_to_ids(END)
    base: Any = SimpleNamespace(tokenizer=tokenizer, check_tokens=lambda *_: None)
    return TextEncoder(base, 100_000, (end,), tokenizer.chat_template, "the model's own", **options)


@cache
def stock_encoder(name: str, folder: Path) -> TextEncoder:
    """The encoder with a stock template."""
    return encoder_for(tokenizer_for(name, folder))


def samples_of(*conversations: Conversation) -> Samples:
    lines = list(range(1, len(conversations) + 1))
    return Samples(list(conversations), lines, Origin("data.jsonl"), "messages", ("messages",))


@cache
def encoded(name: str, folder: Path, kind: str) -> tuple[list[Encoded], Notices] | DataError:
    """What becomes of a kind of conversation with a stock template."""
    notices = Notices()
    try:
        (texts,) = stock_encoder(name, folder).encode(samples_of(CONVERSATIONS[kind]), notices)
    except DataError as error:
        return error
    return texts, notices


NOTED = {
    "system": "system in the user's turn",
    "thinking": "thinking left out",
    "tools": "tools left out",
    "asked otherwise": "asked otherwise",
}


def outcome(name: str, folder: Path, kind: str) -> str:
    """The same in the words of the table."""
    found = encoded(name, folder, kind)
    return "refused" if isinstance(found, DataError) else "; ".join(NOTED[one] for one in found[1].found) or "yes"


def table(folder: Path) -> list[str]:
    """The lines of the table: a template each, with what becomes of each kind of conversation."""
    lines = [f"| template | {' | '.join(CONVERSATIONS)} |", f"| --- |{' --- |' * len(CONVERSATIONS)}"]
    for name in ENDS:
        lines.append(f"| {name} | {' | '.join(outcome(name, folder, kind) for kind in CONVERSATIONS)} |")
    return lines


if __name__ == "__main__":
    found = templates()
    sys.exit("TRL is not installed: pip install -e '.[dev]'") if found is None else print(*table(found), sep="\n")
