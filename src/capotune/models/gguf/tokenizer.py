"""The tokenizer that a GGUF file describes, as a fast tokenizer of Transformers.

Two kinds are read: byte-level BPE (``gpt2``), whose text is first split by one of the rules in ``splits``, and
SentencePiece's BPE (``llama``), whose merges follow from the tokens and their scores. Ids are those of the file.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from capotune.models.gguf.file import GgufFile
from capotune.models.gguf.splits import BOS_BY_DEFAULT, WHOLE_WORDS, split

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "▁"
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def build_tokenizer(file: GgufFile, max_length: int | None) -> Any:
    """A ``PreTrainedTokenizerFast`` with the file's special tokens and chat template.

    Raises ``ModelError`` for a file without tokenizer, or one of a kind that is not read.
    """
    from transformers import PreTrainedTokenizerFast

    tokens = _tokens(file)
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(file, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(file, tokens)
    else:
        raise file.error(
            f"its tokenizer is of the kind '{kind}'; gpt2 (byte-level BPE) and llama (SentencePiece) are read.",
            advice="Give the Transformers folder of the model instead.",
        )
    special = {name: tokens[number] for name, kind in _SPECIAL.items() if (number := token_id(file, kind)) is not None}
    _add_tokens(tokenizer, file, tokens, set(special.values()))
    tokenizer.post_processor = _ends(file, tokenizer, special)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=max_length, **special
    )
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        made.chat_template = template
    return made


def token_id(file: GgufFile, kind: str) -> int | None:
    """The id of a special token, ``bos``, ``eos`` …; None where the file names none, or one that is not there."""
    number = file.metadata.get(f"tokenizer.ggml.{kind}_token_id")
    return number if isinstance(number, int) and 0 <= number < len(file.metadata["tokenizer.ggml.tokens"]) else None


def end_tokens(file: GgufFile) -> list[int]:
    """Tokens that end a text, a turn, or a message."""
    found = (token_id(file, kind) for kind in ("eos", "eot", "eom"))
    return list(dict.fromkeys(number for number in found if number is not None))


def _tokens(file: GgufFile) -> list[str]:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise file.error(
            "it holds no tokenizer (tokenizer.ggml.tokens).",
            advice="Convert the model again with its tokenizer, or give its Transformers folder.",
        )
    return [token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]


def _vocabulary(file: GgufFile, tokens: list[str]) -> dict[str, int]:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise file.error("two of its tokens are the same.", advice="Convert the model again.")
    return vocabulary


def _byte_level(file: GgufFile, tokens: list[str]) -> Tokenizer:
    merges = file.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise file.error("its tokenizer lacks its merges (tokenizer.ggml.merges).", advice="Convert the model again.")
    name = str(file.metadata.get("tokenizer.ggml.pre", "default"))
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        bpe = models.BPE(_vocabulary(file, tokens), pairs, ignore_merges=name in WHOLE_WORDS)
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exceptions
        problem = f"its tokenizer's merges do not fit its tokens: {error}"
        raise file.error(problem, advice="Download it again.") from None
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = split(file, name)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    types = _types(file, tokens)
    spelled = [
        _SPACE * len(token) if kind == _USER_DEFINED and token.strip(" ") == "" else token
        for token, kind in zip(tokens, types, strict=True)
    ]  # converters write runs of spaces as they look, and the merges make them
    vocabulary = _vocabulary(file, spelled)
    unknown = token_id(file, "unknown")
    bpe = models.BPE(
        vocabulary,
        _merges(file, vocabulary),
        unk_token=None if unknown is None else spelled[unknown],
        fuse_unk=True,
        byte_fallback="<0x0A>" in vocabulary,
    )
    tokenizer = Tokenizer(bpe)
    spaces = normalizers.Replace(" ", _SPACE)
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    after = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*after, decoders.Strip(" ", 1, 0)] if prefix else after)
    return tokenizer


def _merges(file: GgufFile, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, the best first: by the score of what they make (SentencePiece's order;
    Gemma's scores are not its order, its ids are), then by the length of the parts, as Transformers does."""
    stored = file.metadata.get("tokenizer.ggml.merges")
    if isinstance(stored, list):
        return [(left, right) for left, _, right in (merge.partition(" ") for merge in stored)]
    scores = file.metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(vocabulary) or file.architecture.startswith("gemma"):
        scores = [-number for number in range(len(vocabulary))]
    found = []
    for token, number in vocabulary.items():
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in vocabulary and right in vocabulary:
                found.append((float(scores[number]), at, left, right))
    found.sort(key=lambda one: one[:2], reverse=True)
    return [(left, right) for _, _, left, right in found]


def _types(file: GgufFile, tokens: list[str]) -> list[int]:
    types = file.metadata.get("tokenizer.ggml.token_type")
    return [1] * len(tokens) if types is None or len(types) != len(tokens) else [int(kind) for kind in types]


def _add_tokens(tokenizer: Tokenizer, file: GgufFile, tokens: list[str], special: set[str]) -> None:
    """Tokens that stay whole wherever they stand: control tokens, which are special, and user-defined ones."""
    types = zip(tokens, _types(file, tokens), strict=True)
    of_kind = [(token, kind) for token, kind in types if kind in (_CONTROL, _USER_DEFINED) or token in special]
    for token, kind in of_kind:
        if tokenizer.token_to_id(token) is None:
            continue  # a run of spaces, which has another spelling
        if kind == _USER_DEFINED and token not in special:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])
        else:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])


def _ends(file: GgufFile, tokenizer: Tokenizer, special: dict[str, str]) -> Any:
    """Begin-of-text before a text, end-of-text after it, where the file asks for them."""
    is_sentencepiece = file.metadata.get("tokenizer.ggml.model") == "llama"
    by_default = is_sentencepiece or file.metadata.get("tokenizer.ggml.pre") in BOS_BY_DEFAULT
    adds_bos = file.metadata.get("tokenizer.ggml.add_bos_token", by_default) and "bos_token" in special
    adds_eos = file.metadata.get("tokenizer.ggml.add_eos_token", False) and "eos_token" in special
    before = [special["bos_token"]] if adds_bos else []
    after = [special["eos_token"]] if adds_eos else []
    if not before and not after:
        return None if is_sentencepiece else processors.ByteLevel(trim_offsets=False)
    second = [f"{part}:1" for part in (*before, "$B", *after)]
    ids = [(token, tokenizer.token_to_id(token)) for token in {*before, *after}]
    first = [*before, "$A", *after]
    return processors.TemplateProcessing(single=first, pair=[*first, *second], special_tokens=ids)
