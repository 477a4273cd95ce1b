"""Several labels a text, or none: each label's own yes or no, from a probability and a threshold of its own."""

from capotune.tasks.multi_label.task import MultiLabel

__all__ = ["TASK", "MultiLabel"]

TASK = MultiLabel
