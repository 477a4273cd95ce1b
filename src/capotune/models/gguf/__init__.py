"""Language models in GGUF, llama.cpp's file format: read, checked, and converted to a Transformers folder.

A file holds metadata (architecture, tokenizer, chat template) and tensors, most of them quantised. The metadata become
a folder in the cache (``describe``); the weights are converted tensor by tensor, once, whole or straight into 4 bits,
when they are first loaded (``converted``).
"""
