"""llama.cpp's quantizer through llama-cpp-python: the oracle of the GGUF tests."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen35.codecs.ggml.types import GGML_TYPES
from qwen35.engines.llama import llama_cpp
from qwen35.planning.gguf_files.imatrix import Imatrix
from qwen35.planning.gguf_files.mixes import FILE_TYPES

__all__ = ["chosen_types", "quantize"]

_STRING, _INT = 3, 0


def quantize(
    source: Path,
    target: Path,
    file_type: str,
    *,
    overrides: Sequence[tuple[str, str]] = (),
    imatrix: Imatrix | None = None,
    pure: bool = False,
    threads: int = 2,
    again: bool = False,
) -> Path:
    """Call ``llama_model_quantize`` as the program llama-quantize does.

    With `again`, the source may be quantized (``--allow-requantize``).
    """
    llama = llama_cpp()
    params = llama.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[file_type].code
    params.nthread, params.pure, params.allow_requantize = threads, pure, again
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


_LINE = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) .*, type = +(\w+), size = .*?(?:\((\w+)\))?$", re.M)
"""A line of the log about a tensor: its name, its type, and the type that it would get."""


def chosen_types(source: Path, file_type: str, *, imatrix: bool) -> dict[str, str]:
    """Return the types that llama-quantize would choose, by name, without reading any weight."""
    llama = llama_cpp()
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.dry_run = FILE_TYPES[file_type].code, True
    nothing = (llama.llama_model_imatrix_data * 1)()
    if imatrix:
        params.imatrix = nothing
    log: list[bytes] = []
    listen = llama.llama_log_callback(lambda _level, text, _data: log.append(text))
    llama.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        status = llama.llama_model_quantize(str(source).encode(), b"", ctypes.byref(params))
    finally:
        llama.llama_log_set(llama_cpp.quiet, ctypes.c_void_p(0))  # type: ignore[attr-defined]
    assert status == 0
    return {name: new or old for name, old, new in _LINE.findall(b"".join(log).decode())}


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
