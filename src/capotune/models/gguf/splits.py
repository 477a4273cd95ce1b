"""How byte-level tokenizers split a text before merging, by the names that GGUF files give the rules.

The rules are those of the models' own tokenizer.json; the names are llama.cpp's (``tokenizer.ggml.pre``).
"""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, pre_tokenizers

from capotune.models.gguf.file import GgufFile

_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FRONT = r"[^\r\n\p{L}\p{N}]?"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SIGNS_OR_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

_THREE_DIGITS = rf"{_CONTRACTED}|{_FRONT}\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_ONE_DIGIT = rf"{_CONTRACTED}|{_FRONT}\p{{L}}+|\p{{N}}|{_SIGNS}|{_SPACES}"
_BY_CASE = rf"{_FRONT}{_UPPER}*{_LOWER}+|{_FRONT}{_UPPER}+{_LOWER}*|\p{{N}}|{_SIGNS_OR_SLASH}|{_SPACES}"
_BY_CASE_CONTRACTED = (
    rf"{_FRONT}{_UPPER}*{_LOWER}+{_CONTRACTED}?|{_FRONT}{_UPPER}+{_LOWER}*{_CONTRACTED}?|\p{{N}}{{1,3}}"
    rf"|{_SIGNS_OR_SLASH}|{_SPACES}"
)
_MARKS = rf"{_CONTRACTED}|{_FRONT}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"

_LLAMA3_NAMES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
_REGULAR = {
    **dict.fromkeys((*_LLAMA3_NAMES, "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _THREE_DIGITS),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
        _ONE_DIGIT,
    ),
    "qwen35": _MARKS,
    "tekken": _BY_CASE,
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), _BY_CASE_CONTRACTED),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), _BLOOM),
}
_GPT2 = ("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "jais", "trillion", "default")
_GPT2_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
WHOLE_WORDS = frozenset({*_LLAMA3_NAMES, "tekken"})
"""A word that is a token is that token, whatever the merges would make."""
BOS_BY_DEFAULT = WHOLE_WORDS
"""Texts begin with the begin-of-text token unless the file says that they do not."""


def names() -> tuple[str, ...]:
    """Every rule that is known, those that many models have before others."""
    return ("default", *_GPT2, *_GPT2_DIGITS, *_REGULAR, "falcon")


def split(file: GgufFile, name: str) -> Any:
    """The pre-tokenizer by the rule ``name``. ``ModelError`` for one that is not known."""
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if name in _REGULAR:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_REGULAR[name]), "isolated"), whole])
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _GPT2:
        return gpt2
    if name in _GPT2_DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if name == "falcon":
        signs, digits = (
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        )
        return pre_tokenizers.Sequence([signs, gpt2, pre_tokenizers.Digits(individual_digits=False), digits])
    raise file.error(
        f"its tokenizer splits texts by the rule '{name}' (tokenizer.ggml.pre), which is not known here.",
        advice="Give the Transformers folder of the model instead.",
    )
