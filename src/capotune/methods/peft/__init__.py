"""Adapters that PEFT wrote, of whatever kind: read, never trained.

``settings`` loads without PyTorch; ``parts`` says what the stored tensors do to a base; ``method`` does it."""
