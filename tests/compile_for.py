"""Compile the FP8 kernel for a GPU that need not be present; prints problems as JSON."""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qwen35.codecs.fp8.kernels import MODES
from qwen35.codecs.fp8.triton import OPTIONS, encode_tiles

TYPES = {
    "weights": "*fp32",
    "levels": "*fp32",
    "parameters": "*fp64",
    "scratch": "*fp32",
    "codes": "*u8",
    "stored": "*fp32",
    "bad": "*i32",
    "columns": "i32",
    "mode": "constexpr",
    "candidates": "constexpr",
}


def problem(values: str, mode: int, capability: int) -> str:
    """Return why a mode does not compile, or inexact instructions in its code."""
    types = {"values": values, **TYPES}
    names = encode_tiles.arg_names
    constants = {(names.index("mode"),): mode, (names.index("candidates"),): 50}
    source = ASTSource(encode_tiles, {name: types[name] for name in names}, constants)
    target = GPUTarget("cuda", capability, 32)
    try:
        compiled = triton.compile(source, target=target, options=dict(OPTIONS))
    except Exception as error:  # noqa: BLE001 - any compiler error counts
        return f"{type(error).__name__}: {error}"
    words = ("fma.rn", ".ftz", ".approx", "div.full")
    return ", ".join(word for word in words if word in compiled.asm["ptx"])


def main(capabilities: list[int]) -> None:
    """Print the problems of all modes."""
    found = {
        f"{capability} {values} {mode}": said
        for capability in capabilities
        for values in ("*bf16", "*fp32")
        for number, mode in enumerate(MODES)
        if (said := problem(values, number, capability))
    }
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main([int(capability) for capability in sys.argv[1:]])
