"""The ggml types of GGUF files: floats, and blocks of 8 to 2 bits a weight.

`kernels` encodes with our own Numba code, 16 blocks side by side (`qwen35.codecs.lanes`,
`searches`), and gives ggml's bytes; `library` calls ggml itself for the other types; `quantizers`
chooses between them. `scaled` is for NVFP4, which needs a scale beside the tensor.
"""
