"""What llama.cpp multiplies its weights with, watched from within: an oracle of calibration."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qwen35.engines.llama import llama_cpp

__all__ = ["Importance"]


@cache
def _products() -> tuple[int, int]:
    """Return the codes of MUL_MAT and MUL_MAT_ID."""
    path = Path(llama_cpp().__file__).parent / "lib" / "libggml-base.so"
    name = ctypes.CDLL(str(path)).ggml_op_name
    name.restype = ctypes.c_char_p
    names = [name(code).decode() for code in range(80)]
    return names.index("MUL_MAT"), names.index("MUL_MAT_ID")


class _Tensor(ctypes.Structure):
    """``struct ggml_tensor`` (llama.cpp 0c1e5709, ``ggml/include/ggml.h``)."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )

    def source(self, number: int) -> _Tensor:
        return _Tensor.from_address(self.src[number])

    def values(self, dtype: Any) -> Any:
        """Return the values, outermost dimension first, wherever their rows lie."""
        assert self.nb[0] == np.dtype(dtype).itemsize
        span = sum((n - 1) * step for n, step in zip(self.ne, self.nb, strict=True)) + self.nb[0]
        raw = np.frombuffer((ctypes.c_char * span).from_address(self.data), np.uint8)
        return np.ndarray(tuple(self.ne)[::-1], dtype, raw, 0, tuple(self.nb)[::-1])


class Importance:
    """What llama.cpp multiplies its weights with: an oracle of importance matrices.

    Attributes:
        squares: tensor name to sums of squares [slices, row].
        counts: tensor name to tokens [slices].
    """

    def __init__(self, path: Path, windows: Any) -> None:
        self.squares: dict[str, Any] = {}
        self.counts: dict[str, Any] = {}
        self._failed: list[BaseException] = []
        llama = llama_cpp()
        model_params = llama.llama_model_default_params()
        model_params.use_extra_bufts = False
        model_params.n_gpu_layers = 0
        model = llama.llama_model_load_from_file(str(path).encode(), model_params)
        options = llama.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = windows.shape[1]
        options.n_threads = options.n_threads_batch = 1
        options.type_k = options.type_v = options.flash_attn_type = 0  # float32, and all of it
        callback = llama.llama_cpp.ggml_backend_sched_eval_callback(self._seen)
        options.cb_eval = callback
        context = llama.llama_init_from_model(model, options)
        for window in windows:
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
            batch = llama.llama_batch_init(len(window), 0, 1)
            batch.n_tokens = len(window)
            for i, token in enumerate(window.tolist()):
                batch.token[i], batch.pos[i] = token, i
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, True
            assert llama.llama_decode(context, batch) == 0
            llama.llama_batch_free(batch)
        llama.llama_free(context)
        llama.llama_model_free(model)
        if self._failed:
            raise self._failed[0]

    def _seen(self, address: int, ask: bool, _: Any) -> bool:
        tensor = _Tensor.from_address(address)
        name = _Tensor.from_address(tensor.src[0]).name.decode() if tensor.src[0] else ""
        wanted = name.endswith(".weight") and tensor.src[1] and tensor.op in _products()
        if wanted and not ask:
            try:
                self._add(name, tensor)
            except (AssertionError, ValueError) as error:  # a callback cannot raise
                self._failed.append(error)
        return bool(wanted) if ask else True

    def _add(self, name: str, tensor: _Tensor) -> None:
        x = tensor.source(1).values(np.float32).astype(np.float64)
        stack = tensor.source(0).ne[2]
        squares = self.squares.setdefault(name, np.zeros((stack, x.shape[-1])))
        counts = self.counts.setdefault(name, np.zeros(stack))
        if tensor.op == _products()[0]:
            assert stack == 1
            rows = x.reshape(-1, x.shape[-1])
            squares[0] += (rows**2).sum(0)
            counts[0] += len(rows)
            return
        chosen = tensor.source(2).values(np.int32)[0, 0]  # [tokens, top-k]
        for place in range(chosen.shape[1]):
            for token, expert in enumerate(chosen[:, place].tolist()):
                squares[expert] += x[0, token, place % x.shape[2]] ** 2
                counts[expert] += 1
