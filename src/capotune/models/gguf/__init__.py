"""Language models in GGUF, llama.cpp's file format: read, checked, and converted to a Transformers folder.

A file holds metadata (architecture, tokenizer, chat template) and tensors, most of them quantised. It is converted
once, tensor by tensor, into the cache (``cache``), and is a Transformers folder from then on.
"""
