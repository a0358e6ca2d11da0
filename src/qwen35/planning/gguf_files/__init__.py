"""GGUF files for llama.cpp: names, types, heads and vocabulary as its converter writes them."""
