"""GGUF: the files of llama.cpp, planned from headers and written in one pass over a checkpoint."""
