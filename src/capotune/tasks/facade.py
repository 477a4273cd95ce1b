"""What ``capotune.load`` returns: a base with an adapter on it, ready to be asked. A task adds what is asked of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from capotune.adapters.assemble import Assembled
from capotune.errors import SettingError


class Facade:
    """What every loaded adapter has."""

    def __init__(self, assembled: Assembled) -> None:
        self._assembled = assembled

    @property
    def model(self) -> Any:
        """The PyTorch module with the adapter inside: token ids (rows, tokens) and mask in, ``.logits`` out."""
        return self._assembled.model

    @property
    def method(self) -> Any:
        """The attached method (``capotune.methods``)."""
        return self._assembled.method

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self._assembled.task.tokenizer

    def merge(self) -> bool:
        """Write the adapter's change into plain layers, in memory. False for methods that have none to write."""
        return self._assembled.method.merge()

    def unmerge(self) -> None:
        """Undo ``merge``: base and adapter are bitwise what they were."""
        self._assembled.method.unmerge()


class Answer(Protocol):
    """What a predictor says of one text."""

    def as_line(self) -> str:
        """In one line, for people."""

    def as_json(self) -> dict[str, Any]:
        """As plain values."""


class Predictor(Facade, ABC):
    """The facade of a task whose ``command`` is ``predict``."""

    @abstractmethod
    def answer(self, texts: Sequence[Any]) -> Sequence[Answer]:
        """What there is to say of each text, as ``capo predict`` prints it."""

    def read_texts(
        self, source: str, text_column: str | None = None, pair_columns: tuple[str, str] | None = None
    ) -> list[Any]:
        """What a file holds to predict (``Task.read_texts``). Raises ``DataError``, and ``SettingError`` for columns of
        pairs where one text is read."""
        if pair_columns is not None:
            raise SettingError(
                "the adapter reads one text.", setting="pair_columns", given=", ".join(pair_columns),
                advice="Name the one to read with `text_column`.",
            )  # fmt: skip
        found: list[Any] = self._assembled.task.read_texts(source, text_column)
        return found

    def of_arguments(self, texts: Sequence[str]) -> list[Any]:
        """What there is to predict in texts that are given one after the other. Raises ``DataError``."""
        return list(texts)

    def of_line(self, line: str, where: str) -> Any:  # noqa: ARG002
        """What there is to predict in a line of text. Raises ``DataError``, which names it as ``where``."""
        return line

    def cut(self, texts: Sequence[Any]) -> list[int]:  # noqa: ARG002 - not every task has a longest text
        """Positions of the texts whose end is not read, as they are longer than ``max_length`` in training."""
        return []

    def predict(self, texts: Sequence[Any]) -> Sequence[Any]:
        """The bare result of each text; by default the whole answer."""
        return self.answer(texts)
