"""ggml's quantizers, called through ctypes in the library that llama-cpp-python installs.

Only functions of scalars and pointers are used (``ggml_quantize_chunk`` and two more), whose
signatures have been stable for years. Opening the library checks that it matches our tables. ctypes
releases the GIL during a call.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np

from qwen35.array_types import F32, U8
from qwen35.codecs.ggml.types import ENCODABLE, GGML_TYPES
from qwen35.errors import UsageError, extra_hint

__all__ = ["INSTALL", "Library", "find_library", "open_library"]


INSTALL = f"{extra_hint('llama-cpp')} (it is built from source: a C++ compiler and minutes)"
"""The hint where it is missing."""

_FILES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")


class Library:
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
            ValueError: a scale is not finite.
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


def find_library() -> Path | None:
    """Return ``libggml-base`` of the installed llama-cpp-python, without importing it."""
    spec = importlib.util.find_spec("llama_cpp")
    for folder in spec.submodule_search_locations or () if spec else ():
        for name in _FILES:
            path = Path(folder) / "lib" / name
            if path.is_file():
                return path
    return None


@cache
def open_library() -> Library:
    """Open the quantizers of the installed llama-cpp-python.

    Raises:
        UsageError: it is not installed, or not the one our tables describe.
    """
    path = find_library()
    if path is None:
        raise UsageError("quantizing to GGUF", "llama-cpp-python is not installed", hint=INSTALL)
    return Library(path)
