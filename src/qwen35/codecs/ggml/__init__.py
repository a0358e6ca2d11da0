"""The types of ggml, as GGUF files hold them: floats, and blocks from 8 bits down to 2."""
