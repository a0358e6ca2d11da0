"""ggml's quantizers, called in the library that llama-cpp-python brings; torch-free, no model.

Only functions of scalars and pointers are used (``ggml_quantize_chunk`` and two more), which have
kept their form for years. Whether the library is the one our tables describe is checked when it is
opened. ctypes releases the interpreter's lock during a call.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np

from qwen35.array_types import F32, U8
from qwen35.codecs.floats import bf16_from_f32
from qwen35.codecs.ggml.types import ENCODABLE, FLOATS, GGML_TYPES
from qwen35.errors import TensorError, UsageError

__all__ = ["Kernel", "encode", "open_kernel"]


_LIBRARIES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")


class Kernel:
    """The quantizers of one shared library.

    Args:
        path: ``libggml-base``.

    Raises:
        UsageError: it cannot be opened, or its types are not those of our tables.
    """

    def __init__(self, path: Path) -> None:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise UsageError(str(path), f"cannot be opened ({error})") from error
        self._quantize = library.ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        size, pointer = ctypes.c_int64, ctypes.c_void_p
        self._quantize.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
        self._validate = library.ggml_validate_row_data
        self._validate.restype = ctypes.c_bool
        self._validate.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t]
        self._row_size = library.ggml_row_size
        self._row_size.restype = ctypes.c_size_t
        self._row_size.argtypes = [ctypes.c_int, size]
        self._check(path)

    def _check(self, path: Path) -> None:
        for name in ENCODABLE:
            kind = GGML_TYPES[name]
            found = self._row_size(kind.code, 1024)
            if found != kind.size((1024,)):
                raise UsageError(
                    str(path),
                    f"rows of 1024 {name} take {found} bytes",
                    expected=str(kind.size((1024,))),
                    hint="install the llama-cpp-python that this version was tested with",
                )

    def quantize(self, rows: F32, kind: str, importance: F32 | None) -> U8:
        """Quantize `rows` [count, row] to `kind`, weighted by `importance` [row]; return bytes.

        Raises:
            ValueError: a scale came out that is not finite.
        """
        code = GGML_TYPES[kind].code
        count, row = rows.shape
        assert rows.flags.c_contiguous
        out = np.empty(GGML_TYPES[kind].size(rows.shape), np.uint8)
        weights = importance.ctypes.data if importance is not None else None
        written = self._quantize(code, rows.ctypes.data, out.ctypes.data, 0, count, row, weights)
        assert written == out.nbytes
        if not self._validate(code, out.ctypes.data, out.nbytes):
            raise ValueError(kind)
        return out


@cache
def open_kernel() -> Kernel:
    """Open the quantizers of the installed llama-cpp-python, without importing it.

    Raises:
        UsageError: it is not installed.
    """
    spec = importlib.util.find_spec("llama_cpp")
    for folder in spec.submodule_search_locations or () if spec else ():
        for name in _LIBRARIES:
            path = Path(folder) / "lib" / name
            if path.is_file():
                return Kernel(path)
    raise UsageError(
        "quantizing to GGUF",
        "llama-cpp-python is not installed",
        hint="pip install 'qwen35[gguf]' (it is built from source: a C++ compiler and minutes)",
    )


def encode(name: str, rows: F32, kind: str, importance: F32 | None) -> memoryview:
    """Return `rows` [count, row] of the tensor called `name` as the bytes of type `kind`.

    Raises:
        TensorError: a value is beyond the type's range.
    """
    if kind not in FLOATS:
        try:
            return open_kernel().quantize(rows, kind, importance).data
        except ValueError as error:
            raise _out_of_range(name, kind) from error
    if kind == "f32":
        return rows.data.cast("B")
    if kind == "bf16":
        return bf16_from_f32(rows.reshape(-1)).data.cast("B")
    with np.errstate(over="ignore"):
        half = rows.astype(np.float16)
    if np.isinf(half).any():
        raise _out_of_range(name, kind)
    return half.data.cast("B")


def _out_of_range(name: str, kind: str) -> TensorError:
    return TensorError(
        name,
        f"a value beyond the range of {kind}",
        hint="give it bf16 or f32, by --tensor-type in a quantized file",
    )
