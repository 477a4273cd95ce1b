"""Token classification as a task: a tag for each word, by a linear head on the state of its first sub-word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pydantic
import torch

from capotune.adapters.assemble import Assembled
from capotune.adapters.store import StoredRecord
from capotune.adapters.task_model import CardWords, Objective
from capotune.data.batches import IGNORE_INDEX, Encoded, TokenRows, without_loss
from capotune.data.wording import quoted
from capotune.data_blocks import Block
from capotune.errors import DataError
from capotune.evaluation.forward import Examples
from capotune.events import Reporter, Warned, counter
from capotune.methods.base import Method
from capotune.models.base import Base
from capotune.sections import Section
from capotune.settings import DataSettings, EvaluateSettings, TrainingSettings, TrainSettings
from capotune.tasks.base import Scored, TaskRun, untested
from capotune.tasks.linear_head import LinearHeadTask, inner_states, spread_layers
from capotune.tasks.room import text_length
from capotune.tasks.token_classification.alignment import NOWHERE, Aligned, align
from capotune.tasks.token_classification.data import TaggedRows, check_types, is_tagged, read_to_score, read_words
from capotune.tasks.token_classification.facade import Tagger
from capotune.tasks.token_classification.inspect import TagReport, describe_tags, lost_sentences
from capotune.tasks.token_classification.model import TokenClassifier
from capotune.tasks.token_classification.objective import WordCrossEntropy
from capotune.tasks.token_classification.page import page_sections
from capotune.tasks.token_classification.score import logits_of, score_rows
from capotune.tasks.token_classification.spans import NO_TYPE, OUTSIDE

_MOST_FEATURES = 2**27
"""Values of a head's features, all words together, that are held in memory at once: 512 MiB."""
_SHOWN_TYPES = 20


class _Record(StoredRecord):
    labels: list[str] = pydantic.Field(min_length=3)
    feature_layers: list[int] = pydantic.Field(min_length=1)


@dataclass(frozen=True)
class TokenClassification(LinearHeadTask):
    """The task: its tags and lengths."""

    base: Base
    labels: tuple[str, ...]
    """Tags in IOB2: O, then B and I of each type; a target is a position in this tuple."""
    max_length: int
    """Longest sentence in tokens; of longer ones the last words are not read."""
    layers: int
    """How many hidden states a head reads that reads several."""

    name: ClassVar[str] = "token-classification"
    title: ClassVar[str] = "tagged words"
    gives: ClassVar[str] = "finds entities and writes no text"
    base_note: ClassVar[str] = (
        "Each word of a test row gets the tag whose training words have the nearest mean, in the frozen base's last "
        "states; nothing is trained."
    )
    peft_task_type: ClassVar[str] = "TOKEN_CLS"
    Record = _Record

    @classmethod
    def on(
        cls, base: Base, types: Sequence[str], max_length: int | None, virtual_tokens: int, words: int
    ) -> TokenClassification:
        """The task on a base; ``max_length`` None is all that the base takes beside ``virtual_tokens``.

        ``words`` are those to train on: with more of them a head reads fewer hidden states of each.
        """
        length = text_length(base, max_length, virtual_tokens, base.tokenizer.num_special_tokens_to_add())
        layers = max(1, _MOST_FEATURES // (base.hidden_size * max(words, 1)))
        return cls(base, labels_of(types), length, layers)

    @property
    def objective(self) -> Objective:  # type: ignore[override]
        """Cross-entropy of words, F1 of entities."""
        return WordCrossEntropy(self.labels)

    @property
    def types(self) -> tuple[str, ...]:
        """Types of entities."""
        return _types(self.labels)

    # ------------------------------------------------------------------------------------------------------ from data

    @classmethod
    def recognises(cls, settings: DataSettings) -> bool:
        """CoNLL text, or rows with lists of words and tags."""
        return is_tagged(settings.data)

    @classmethod
    def prepare(cls, settings: TrainSettings, method: TrainingSettings, base: Base, report: Reporter) -> TaskRun:
        """Tagged sentences, tokenised and split."""
        from capotune.tasks.token_classification.run import TokenClassificationRun

        return TokenClassificationRun(settings, method, base, report)

    @classmethod
    def read_texts(cls, source: str, text_column: str | None) -> list[Any]:
        """The words of CoNLL text or of a column of lists; else texts, as other tasks read them."""
        return read_words(source, text_column) or super().read_texts(source, text_column)

    def align(self, sentences: Sequence[Sequence[str]], names: Sequence[str] | None = None) -> list[Aligned]:
        """Tokens of each sentence and where its words begin. ``DataError`` for a sentence of which no token comes, and
        for one with a token that the base has no embedding for.

        ``names`` say where the sentences are from, ``file:line`` each, for the message.
        """
        found = align(self.tokenizer, sentences, self.max_length, self.base.name)
        for number, (words, one) in enumerate(zip(sentences, found, strict=True)):
            where = names[number] if names else f"text {number + 1} of {len(sentences)}"
            self.base.check_tokens(one.ids, where)
            if not one.ids:
                raise DataError(
                    f"the base's tokenizer makes no token of {quoted(words)}.", where=where, advice="Remove it."
                )
        return found

    def align_rows(self, rows: TaggedRows) -> list[Aligned]:
        """``align`` of the sentences of a source."""
        return self.align(rows.words, [rows.where(row) for row in range(len(rows))])

    def examples(
        self, aligned: Sequence[Aligned], tags: Sequence[Sequence[str]] | None, prefix: Sequence[int] = ()
    ) -> Examples:
        """Rows with a target at the first sub-word of every word that is read; without ``tags``, any target."""
        number = {label: at for at, label in enumerate(self.labels)}
        targets = []
        for row, one in enumerate(aligned):
            of_row = [IGNORE_INDEX] * len(one.ids)
            for word, at in enumerate(one.first):
                if at != NOWHERE:
                    of_row[at] = number[tags[row][word]] if tags else 0
            targets.append(of_row)
        return Examples(TokenRows([one.ids for one in aligned], self.pad_id, prefix), targets)

    # --------------------------------------------------------------------------------------------------------- the head

    def put_head(self, loaded: Any, method: Method) -> tuple[Any, str]:
        """A ``TokenClassifier``."""
        layers = method.feature_layers or spread_layers(inner_states(loaded), self.layers)
        model = TokenClassifier(loaded, len(self.labels), layers)
        return model, model.text_part

    # --------------------------------------------------------------------------------------------- to and from adapters

    def record(self, model: Any) -> dict[str, Any]:
        """Tags, layers and length, as stored beside an adapter."""
        return {
            "task": self.name,
            "labels": list(self.labels),
            "max_length": self.max_length,
            "feature_layers": list(model.feature_layers),
        }

    @classmethod
    def restore(cls, base: Base, record: dict[str, Any]) -> TokenClassification:
        """The task of a stored adapter."""
        return cls(base, tuple(record["labels"]), record["max_length"], len(record["feature_layers"]))

    def rows_to_compare(self, data: Any, count: int) -> list[Encoded]:
        """Sentences; their tags are not looked at."""
        return without_loss([one.ids for one in self.align_rows(read_to_score(data))[:count]])

    def facade(self, assembled: Assembled) -> Tagger:
        """A ``Tagger``."""
        return Tagger(assembled)

    def golden_logits(self, assembled: Assembled, text: str) -> torch.Tensor:
        """(words, tags)."""
        examples = self.examples(self.align([text.split()]), None, assembled.method.virtual_token_ids)
        return logits_of(assembled, examples)

    def logits_of_ids(self, assembled: Assembled, sequences: list[list[int]]) -> torch.Tensor:
        """(all tokens, tags)."""
        rows = TokenRows(sequences, self.pad_id, assembled.method.virtual_token_ids)
        return logits_of(assembled, Examples(rows, [[0] * len(ids) for ids in sequences]))

    def evaluate(self, assembled: Assembled, settings: EvaluateSettings, report: Reporter) -> Scored:
        """F1, precision, recall and loss. ``DataError`` for a type that the adapter does not know."""
        rows = read_to_score(settings.data, word_column=settings.text_column, tag_column=settings.label_column)
        check_types(rows, self.types)
        for text in lost_sentences(rows, self.align_rows(rows), self.max_length):
            report(Warned(text=text))
        return score_rows(assembled, rows, progress=counter(report))

    # ------------------------------------------------------------------------------------------------------------ words

    @classmethod
    def describe_data(cls, report: Mapping[str, Any]) -> list[Block]:
        """The report in words, and every type's entities."""
        return describe_tags(pydantic.TypeAdapter(TagReport).validate_python(report))

    @classmethod
    def card(cls, record: dict[str, Any]) -> CardWords:
        """Types, F1 and how to predict."""
        trained, types = record["trained"], _types(record["labels"])
        more = f" and {len(types) - _SHOWN_TYPES} more" if len(types) > _SHOWN_TYPES else ""
        score = untested(trained, "f1")
        if trained["test_rows"]:
            score = f"F1 of entities {trained['score']:.2%} on {trained['test_rows']:,} test sentences"
        return CardWords(
            f"Finds entities of {len(types)} types in text: {', '.join(types[:_SHOWN_TYPES])}{more}.",
            score,
            'capo predict ADAPTER "your text"',
            'tagger = capotune.load(adapter)\ntagger.predict(["your text"])',
        )

    @classmethod
    def facts(cls, record: dict[str, Any]) -> dict[str, Any]:
        """Tags and length."""
        return {name: record[name] for name in ("labels", "max_length")}

    @classmethod
    def facts_in_words(cls, facts: dict[str, Any]) -> list[tuple[str, str]]:
        """The first types, and what is read of a text."""
        types = _types(facts["labels"])
        return [
            ("entities", f"{len(types)} types: {', '.join(types[:12])}{', …' if len(types) > 12 else ''}"),
            ("text", f"up to {facts['max_length']} tokens"),
        ]

    @classmethod
    def further_columns(cls, metric: str, scores: Mapping[str, float]) -> tuple[str, ...]:  # noqa: ARG003
        """Precision and recall."""
        return tuple(name for name in ("precision", "recall") if name in scores)

    @classmethod
    def page_sections(
        cls,
        record: dict[str, Any],  # noqa: ARG003
        recommended: str,
        predictions: Mapping[str, Sequence[Mapping[str, Any]]],
        of_base: Sequence[Mapping[str, Any]],  # noqa: ARG003
    ) -> list[Section]:
        """Entities that the recommended technique finds, by type, and sentences with mistakes."""
        return page_sections(recommended, predictions[recommended])


def labels_of(types: Sequence[str]) -> tuple[str, ...]:
    """O, then B and I of each type."""
    return (OUTSIDE, *(prefix if kind == NO_TYPE else f"{prefix}-{kind}" for kind in types for prefix in "BI"))


def _types(labels: Sequence[str]) -> tuple[str, ...]:
    """Types of entities, by the tags that begin one."""
    return tuple(label[2:] or NO_TYPE for label in labels if label[0] == "B")
