"""Words and sub-words, with tokenizers of four kinds that are made here: equal to what each makes of words alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from capotune.errors import ModelError
from capotune.tasks.token_classification.alignment import NOWHERE, align

TEXT = ["Anna lives in Paris .", "the ventricular fibrillation isn't due to clindamycin ( I ) , 3.5 mg", "a b c d e f"]
WORDS = ["Anna", "lives", "in", "Paris", ".", "isn't", "3.5", "fibrillation", "a", "Zürich", "日本", "🙂", "(", "x" * 9]


def trained(model: Any, trainer: Any, pre_tokenizer: Any, **parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return tokenizer


def wordpiece() -> Any:
    """As BERT's: lower case, [CLS] and [SEP], no trace of spaces, control characters vanish."""
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tokenizer = trained(
        models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.BertPreTokenizer(),
        normalizer=normalizers.BertNormalizer(),
    )  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def byte_level(prefix: bool, trim: bool = True) -> Any:
    """As GPT-2's and RoBERTa's: a word and the space before it are one."""
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer = trained(
        models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=prefix),
        post_processor=processors.ByteLevel(trim_offsets=trim), decoder=decoders.ByteLevel(),
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece(kind: str) -> Any:
    """As T5's (Unigram) and Llama 2's (BPE with bytes for what has no piece, a space put before the text)."""
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(
            vocab_size=70, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        )
        tokenizer = trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(prepend_scheme="always"))
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    specials = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=specials, show_progress=False)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "wordpiece": wordpiece,
    "byte-level": lambda: byte_level(prefix=False),
    "byte-level-prefix": lambda: byte_level(prefix=True),
    "byte-level-untrimmed": lambda: byte_level(prefix=True, trim=False),
    "unigram": lambda: sentencepiece("unigram"),
    "bytes-for-unknown": lambda: sentencepiece("bytes"),
}
WORD_BY_WORD = [name for name in TOKENIZERS if name != "byte-level"]
"""Those that take words one by one and put a space before each by themselves."""


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {name: make() for name, make in TOKENIZERS.items()}


sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9)


@pytest.mark.parametrize("name", WORD_BY_WORD)
@given(words=sentences)
def test_tokens_are_those_of_words_given_one_by_one(name: str, words: list[str], made: dict[str, Any]) -> None:
    expected = made[name](words, is_split_into_words=True)
    found = align(made[name], [words], 512, "base")[0]
    assert found.ids == expected["input_ids"]
    assert (found.tokens, found.cut) == (len(found.ids), 0)
    for number, at in enumerate(found.first):
        own = [place for place, word in enumerate(expected.word_ids()) if word == number]
        own = [place for place in own if expected.tokens()[place] not in ("▁", "Ġ")] or own
        assert at == own[0], (number, expected.tokens())


def test_byte_level_words_have_the_space_before_them(made: dict[str, Any]) -> None:
    """Given words one by one, this tokenizer would write them as if no space stood between them."""
    tokenizer, words = made["byte-level"], ["Anna", "lives", "in", "Paris"]
    found = align(tokenizer, [words], 512, "base")[0]
    assert found.ids == tokenizer("Anna lives in Paris")["input_ids"] != tokenizer(words, is_split_into_words=True)
    tokens = tokenizer.convert_ids_to_tokens(found.ids)
    assert all(tokens[at].startswith("Ġ") for at in found.first[1:]), tokens


@pytest.mark.parametrize("name", TOKENIZERS)
@given(words=sentences, limit=st.integers(4, 40))
def test_what_is_too_long_is_cut_between_words(name: str, words: list[str], limit: int, made: dict[str, Any]) -> None:
    whole = align(made[name], [words], 10_000, "base")[0]
    found = align(made[name], [words], limit, "base")[0]
    kept = len(words) - found.cut
    assert len(found.ids) <= limit
    assert found.tokens == whole.tokens == len(whole.ids)
    assert found.first[:kept] == whole.first[:kept]
    assert found.first[kept:] == [NOWHERE] * found.cut
    assert kept >= 1
    if found.cut and kept > 1:  # one more word would not have fitted
        assert len(align(made[name], [words[: kept + 1]], 10_000, "base")[0].ids) > limit
        assert found.ids == align(made[name], [words[:kept]], 10_000, "base")[0].ids
    if len(whole.ids) <= limit:
        assert found == whole


@pytest.mark.parametrize("name", TOKENIZERS)
def test_words_without_a_token_are_nowhere(name: str, made: dict[str, Any]) -> None:
    words = ["in", "\x01", "Paris"]
    found = align(made[name], [words], 512, "base")[0]
    assert found.first[0] != NOWHERE != found.first[2]
    assert (found.first[1] == NOWHERE) == (name == "wordpiece")
    assert found.cut == 0


def test_a_sentence_of_which_no_token_comes(made: dict[str, Any]) -> None:
    found = align(made["wordpiece"], [["\x01", "\x02"]], 512, "base")[0]
    assert found.ids == [1, 2]
    assert found.first == [NOWHERE, NOWHERE]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_word_may_hold_spaces(name: str, made: dict[str, Any]) -> None:
    found = align(made[name], [["in", "Paris lives", "in"]], 512, "base")[0]
    assert found.ids == made[name]("in Paris lives in")["input_ids"]
    assert found.first[2] > found.first[1] + 1


def test_order_is_kept_over_many_sentences(made: dict[str, Any]) -> None:
    rows = [WORDS[: 1 + number % len(WORDS)] for number in range(1500)]
    found = align(made["wordpiece"], rows, 512, "base")
    assert [len(one.first) for one in found] == [len(row) for row in rows]
    assert [key for key, _ in groupby(found[::14], key=lambda one: one.ids)] == [found[0].ids]


def test_a_tokenizer_that_does_not_tell_places_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be found again in its tokens"):
        align(object(), [["a"]], 512, "base")
