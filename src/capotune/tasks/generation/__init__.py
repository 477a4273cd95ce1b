"""Generation: a causal language model writes text. Its own output layer stays; the loss is per token."""

from capotune.tasks.generation.facade import Generator
from capotune.tasks.generation.task import Generation

__all__ = ["TASK", "Generation", "Generator"]

TASK = Generation
