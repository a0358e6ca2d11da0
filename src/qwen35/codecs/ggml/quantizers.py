"""Choose who encodes a ggml type: our kernels, or the ggml library.

Our kernels are several times faster and need no library, but cover only some types. If the library
is installed, one tile is encoded both ways: a library built with fused multiply-add gives other
bytes. Then it encodes everything, so that files equal those of the user's own llama-quantize.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from qwen35.array_types import F32, U8
from qwen35.codecs.floats import bf16_from_f32, f32_from
from qwen35.codecs.ggml.library import INSTALL, find_library, open_library
from qwen35.codecs.ggml.types import COMPILED, FLOATS
from qwen35.errors import TensorError, UsageError

__all__ = ["ENCODERS", "Quantize", "differs", "encode", "quantizer"]

ENCODERS = ("auto", "ggml")
"""Values of ``--encoder``: our kernels where they exist, or the library for every type."""

Quantize = Callable[[F32, str, F32 | None], U8]
"""Quantizes rows [count, row] to a type, weighted by importance [row]; ValueError: not finite."""

_SENTINEL = "q5_K"
"""The type most sensitive to how the library was built.

A ggml compiled with -mfma differs in 3 of 10 blocks of q5_K without importance, but in 1 of 250 of
q6_K: 64 blocks of q5_K reveal more than thousands of q6_K.
"""

_UNMOVED = "q8_0"
"""A type without sums, which fused multiply-add cannot change."""


def quantizer(kind: str, encoder: str = "auto") -> Quantize:
    """Return the quantizer of a type that is not a float.

    Args:
        kind: the type.
        encoder: one of `ENCODERS`.

    Raises:
        UsageError: the library is needed, but missing or not the one our tables describe.
    """
    if encoder == "auto" and kind in COMPILED and not differs(kind):
        from qwen35.codecs.ggml.kernels import quantize

        return quantize
    if encoder == "auto" and find_library() is None:
        found = f"{kind} needs llama-cpp-python, which is not installed"
        raise UsageError("quantizing to GGUF", found, hint=INSTALL)
    return open_library().quantize


@cache
def differs(kind: str) -> bool:
    """Whether the library, if installed, encodes a type of `COMPILED` to other bytes than we do.

    Tested on one tile, with importance and without.
    """
    try:
        library = open_library()
    except UsageError:
        return False
    from qwen35.codecs.ggml.kernels import quantize

    rows, importance = _tile()
    return any(
        not np.array_equal(quantize(rows, one, weights), library.quantize(rows, one, weights))
        for one in dict.fromkeys((kind, kind if kind == _UNMOVED else _SENTINEL))
        for weights in (importance, None)
    )


def _tile() -> tuple[F32, F32]:
    """Return 64 super-blocks of bf16 weights and an importance, the same in every process."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal((16, 1024), np.float32)
    rows = f32_from(bf16_from_f32(values.reshape(-1)), "BF16").reshape(values.shape)
    return rows, generator.standard_exponential(1024, np.float32)


def encode(
    name: str, rows: F32, kind: str, importance: F32 | None, encoder: str = "auto"
) -> memoryview:
    """Return `rows` [count, row] of the tensor called `name` as the bytes of type `kind`.

    Raises:
        TensorError: a value is beyond the type's range.
        UsageError: the library is needed and not installed.
    """
    if kind not in FLOATS:
        try:
            return quantizer(kind, encoder)(rows, kind, importance).data
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
