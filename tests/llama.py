"""llama.cpp through llama-cpp-python: the oracle of the GGUF tests."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qwen35.gguf.imatrix import Imatrix
from qwen35.gguf.types import FILE_TYPES, GGML_TYPES

__all__ = ["Llama", "api", "quantize"]

_STRING, _INT = 3, 0


@cache
def api() -> Any:
    """Return the binding, with llama.cpp told to keep quiet."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    api.quiet = quiet  # type: ignore[attr-defined]
    llama_cpp.llama_backend_init()
    return llama_cpp


def quantize(
    source: Path,
    target: Path,
    file_type: str,
    *,
    overrides: Sequence[tuple[str, str]] = (),
    imatrix: Imatrix | None = None,
    threads: int = 2,
) -> Path:
    """Call ``llama_model_quantize`` as the program llama-quantize does."""
    llama = api()
    params = llama.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[file_type].code
    params.nthread = threads
    alive: list[Any] = []
    if overrides:
        array = (llama.llama_model_tensor_override * (len(overrides) + 1))()
        for slot, (pattern, kind) in zip(array, overrides, strict=False):
            slot.pattern, slot.type = pattern.encode(), GGML_TYPES[kind].code
        array[len(overrides)].pattern = None
        params.tt_overrides = array
        alive.append(array)
    if imatrix is not None:
        params.imatrix, params.kv_overrides = _importance(llama, imatrix, alive)
    status = llama.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    assert status == 0
    return target


def _importance(llama: Any, imatrix: Imatrix, alive: list[Any]) -> tuple[Any, Any]:
    array = (llama.llama_model_imatrix_data * (len(imatrix.entries) + 1))()
    for slot, (name, entry) in zip(array, imatrix.entries.items(), strict=False):
        values = np.ascontiguousarray(entry.values, np.float32)
        alive.append(values)
        slot.name, slot.size = name.encode(), values.size
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    array[len(imatrix.entries)].name = None
    keys: Mapping[str, str | int] = imatrix.keys()
    overrides = (llama.llama_model_kv_override * (len(keys) + 1))()
    for slot, (key, value) in zip(overrides, keys.items(), strict=False):
        slot.key = key.encode()
        if isinstance(value, str):
            slot.tag, slot.value.val_str = _STRING, value.encode()
        else:
            slot.tag, slot.value.val_i64 = _INT, value
    alive += [array, overrides]
    return array, overrides


class Llama:
    """A loaded model on the CPU, with the kernels that some processors break switched off.

    Args:
        path: the GGUF file.
        context: tokens at most.
        cache: type of the attention cache.
    """

    def __init__(self, path: Path, *, context: int = 1024, cache: str = "f32") -> None:
        self.llama = api()
        model = self.llama.llama_model_default_params()
        model.use_extra_bufts = False  # repacking brings in AMX code, which fails on some machines
        model.n_gpu_layers = 0
        self.model = self.llama.llama_model_load_from_file(str(path).encode(), model)
        assert self.model, f"{path} does not load"
        params = self.llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = GGML_TYPES[cache].code
        self.context = self.llama.llama_init_from_model(self.model, params)
        assert self.context, f"{path}: no context"
        self.vocabulary = self.llama.llama_model_get_vocab(self.model)
        self.tokens = self.llama.llama_vocab_n_tokens(self.vocabulary)

    def close(self) -> None:
        self.llama.llama_free(self.context)
        self.llama.llama_model_free(self.model)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return token ids; without `special`, special tokens in the text are text."""
        data = text.encode()
        ids = (self.llama.llama_token * (len(data) + 8))()
        count = self.llama.llama_tokenize(
            self.vocabulary, data, len(data), ids, len(ids), False, special
        )
        assert count >= 0
        return list(ids[:count])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        pieces = []
        buffer = ctypes.create_string_buffer(256)
        for token in ids:
            size = self.llama.llama_token_to_piece(self.vocabulary, token, buffer, 256, 0, True)
            pieces.append(buffer.raw[:size])
        return b"".join(pieces).decode(errors="replace")

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the logits after each token, [len(ids), vocabulary]."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        self._feed(ids, 0, every=True)
        rows = [self.llama.llama_get_logits_ith(self.context, i) for i in range(len(ids))]
        return np.stack([np.ctypeslib.as_array(row, (self.tokens,)).copy() for row in rows])

    def _feed(self, ids: Sequence[int], start: int, *, every: bool) -> None:
        batch = self.llama.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = every or i == len(ids) - 1
        status = self.llama.llama_decode(self.context, batch)
        self.llama.llama_batch_free(batch)
        assert status == 0

    def answer(self, prompt: Sequence[int], stop: Sequence[int], limit: int = 96) -> list[int]:
        """Continue `prompt` greedily until a stop token."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        self._feed(prompt, 0, every=False)
        said: list[int] = []
        while len(said) < limit:
            row = self.llama.llama_get_logits_ith(self.context, -1)
            token = int(np.ctypeslib.as_array(row, (self.tokens,)).argmax())
            if token in stop:
                break
            said.append(token)
            self._feed([token], len(prompt) + len(said) - 1, every=False)
        return said
