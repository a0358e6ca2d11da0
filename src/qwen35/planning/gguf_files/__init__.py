"""Plan GGUF files for llama.cpp: names, types, heads and vocabulary, as its converter writes them.

Quantization belongs to `codecs.ggml`: this folder knows ggml types only by name and block size.
"""
