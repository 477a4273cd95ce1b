"""Prompt tuning: trained vectors, or words that people wrote, before the input embeddings.

``settings`` loads without PyTorch, so that a command's help is quick; ``method`` is the code."""
