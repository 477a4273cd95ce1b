"""Tags of words and the entities that they mark.

A tag is ``O`` (outside of every entity) or a prefix, alone or with a type: ``B``, ``B-PER``. The schemes in use say the
same things with different prefixes (Ramshaw and Marcus 1995; Tjong Kim Sang and Veenstra 1999; Ratinov and Roth 2009):

    IOB2    B begins an entity, I goes on
    IOB1    I begins and goes on; B only where an entity follows another one of its type
    IOBES   B begins, I goes on, E ends, S is an entity of one word; BILOU writes L and U for E and S, BMES M for I

All of them are read by one rule, that of CoNLL-2000's ``conlleval`` and of seqeval's default mode: a word goes on with
the entity before it where its prefix is I or E, the word before has the prefix B or I, and the types are equal. Any
other word with a prefix begins an entity. So every sequence of tags has a meaning, also one that a model predicted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

OUTSIDE: Final = "O"
NO_TYPE: Final = "_"
"""Type of an entity whose tags are prefixes alone."""

_TAG: Final = re.compile(r"O|([BIESLUM])(?:-(.+))?", re.DOTALL)
_AS_IOBES: Final = {"L": "E", "U": "S", "M": "I"}


@dataclass(frozen=True)
class Entity:
    """Words ``start`` to ``end`` (not included) of one sentence, and what they name."""

    type: str
    start: int
    end: int


@dataclass(frozen=True)
class EntityCounts:
    """How predicted entities meet the true ones: right in type, first and last word, or not. Those of rows add up."""

    tp: int = 0
    """Entities found."""
    fp: int = 0
    """Predicted entities that are none."""
    fn: int = 0
    """Entities missed."""

    def __add__(self, other: EntityCounts) -> EntityCounts:
        return EntityCounts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)

    @property
    def precision(self) -> float:
        """The part of the predicted entities that are right; 0 where none was predicted."""
        return self.tp / (self.tp + self.fp) if self.tp else 0.0

    @property
    def recall(self) -> float:
        """The part of the true entities that were found; 0 where there is none."""
        return self.tp / (self.tp + self.fn) if self.tp else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * self.tp / (2 * self.tp + self.fp + self.fn) if self.tp else 0.0


def is_tag(tag: str) -> bool:
    """Whether ``tag`` is ``O`` or has a prefix that some scheme knows."""
    return _TAG.fullmatch(tag) is not None


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence, in order; tags must be such (``is_tag``)."""
    found: list[Entity] = []
    prefix_before, type_before = OUTSIDE, ""
    for at, tag in enumerate(tags):
        prefix, type_ = _parts(tag)
        if prefix in "IE" and prefix_before in "BI" and type_ == type_before:
            found[-1] = Entity(type_, found[-1].start, at + 1)
        elif prefix != OUTSIDE:
            found.append(Entity(type_, at, at + 1))
        prefix_before, type_before = prefix, type_
    return found


def as_iob2(tags: Sequence[str]) -> list[str]:
    """The same entities in IOB2."""
    found = [OUTSIDE] * len(tags)
    for entity in entities(tags):
        for at in range(entity.start, entity.end):
            prefix = "B" if at == entity.start else "I"
            found[at] = prefix if entity.type == NO_TYPE else f"{prefix}-{entity.type}"
    return found


def scheme(sentences: Iterable[Sequence[str]]) -> str:
    """Name of the scheme that the tags are written in, for people: IOBES, BILOU, BMES, IOB1 or IOB2."""
    prefixes: set[str] = set()
    begins_with_i = False
    for tags in sentences:
        prefixes.update(tag[0] for tag in tags)
        begins_with_i |= any(tags[entity.start][0] == "I" for entity in entities(tags))
    if prefixes & set("LU"):
        return "BILOU"
    if "M" in prefixes:
        return "BMES"
    if prefixes & set("ES"):
        return "IOBES"
    return "IOB1" if begins_with_i else "IOB2"


def count(true: Sequence[str], predicted: Sequence[str]) -> EntityCounts:
    """Counts of one sentence. Raises ``ValueError`` when the two differ in length."""
    return sum(count_by_type(true, predicted).values(), EntityCounts())


def count_by_type(true: Sequence[str], predicted: Sequence[str]) -> dict[str, EntityCounts]:
    """Counts of one sentence for each type that is in it, true or predicted, in the order in which the types come."""
    if len(true) != len(predicted):
        raise ValueError(f"{len(true)} tags and {len(predicted)} predicted ones")
    wanted, found = set(entities(true)), set(entities(predicted))
    tp, fp, fn = (_by_type(part) for part in (wanted & found, found - wanted, wanted - found))
    types = dict.fromkeys(entity.type for entity in (*entities(true), *entities(predicted)))
    return {type_: EntityCounts(tp[type_], fp[type_], fn[type_]) for type_ in types}


def _by_type(found: Iterable[Entity]) -> Counter[str]:
    return Counter(entity.type for entity in found)


def _parts(tag: str) -> tuple[str, str]:
    """Prefix, as IOBES has it, and type."""
    match = _TAG.fullmatch(tag)
    if match is None:
        raise ValueError(f"{tag!r} is no tag")
    return _AS_IOBES.get(match[1], match[1] or OUTSIDE), match[2] or NO_TYPE
