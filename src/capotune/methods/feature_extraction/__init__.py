"""Feature extraction: early layers stay fixed, the last blocks or a head alone adapt.

``settings`` loads without PyTorch, so that a command's help is quick; ``method`` is the code."""
