"""QLoRA: LoRA over a base held in 4 bits.

``settings`` loads without PyTorch, so that a command's help is quick; ``method`` is the code."""
