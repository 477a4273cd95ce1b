"""Ordinal classification: one label of an order a text, where a near label is better than a far one."""

from capotune.tasks.ordinal.task import Ordinal

__all__ = ["TASK", "Ordinal"]

TASK = Ordinal
