"""LoRA: W stays frozen, two small matrices carry the change.

``settings`` loads without PyTorch, so that a command's help is quick; ``method`` is the code."""
