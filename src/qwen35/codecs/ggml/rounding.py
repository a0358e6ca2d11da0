"""How ggml rounds: to the nearest integer by adding a large float, to float16 by bits.

Sources: `nearest_int` of llama.cpp's ``ggml/src/ggml-quants.c`` (MIT) at 0c1e5709;
`ggml_compute_fp32_to_fp16` of ``ggml-impl.h`` there, which is Maratyszcza's FP16 (MIT).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen35.codecs.compiled import inlined
from qwen35.codecs.lanes import bits, from_bits, magnitude, select

__all__ = ["half_bits", "half_value", "level", "nearest", "nearest_one", "put_half", "truncated"]

_MAGIC = np.float32(12582912.0)
"""1.5 * 2^23: added to a float, it leaves the nearest integer (ties to even) in the low 23 bits."""

_FRACTION = np.int32(0x7FFFFF)
_ZERO = np.int32(0x400000)
_TWO_23 = np.int32(0x4B000000)
"""The bits of 2^23, whose steps are integers."""

_BEYOND = np.float32(256)


@inlined
def nearest(value: Any) -> Any:
    """Round to integers [16] int32: `nearest_int`, also where its integer wraps around.

    That is beyond 2^22, where ggml asserts only in debug builds; weights of subnormal size get
    there, as does NaN, which gives 0.
    """
    return (bits(value + _MAGIC) & _FRACTION) - _ZERO


@inlined
def nearest_one(value: Any) -> Any:
    """Round one float32 to an int32, as `nearest` does."""
    return (np.float32(value + _MAGIC).view(np.int32) & _FRACTION) - _ZERO


@inlined
def level(value: Any, low: Any, high: Any) -> Any:
    """Round as `nearest` does, to integers from `low` to `high`, as floats [16].

    The low 23 bits are made the fraction of a float in [2^23, 2^24) and clamped there: what is
    then left is one subtraction away, and exact. No conversion, and wraps where `nearest` does.
    """
    wrapped = from_bits((bits(value + _MAGIC) & _FRACTION) | _TWO_23)
    lowest, highest = low + _MAGIC, high + _MAGIC
    above = select(wrapped > lowest, wrapped, lowest)
    return select(above < highest, above, highest) - _MAGIC


@inlined
def truncated(value: Any) -> Any:
    """Return `value` [16] where C converts it to a char without overflow, 0 where it does not.

    An infinite inverse scale produces infinity and NaN, which x86-64 converts to -2^31, whose low
    byte is 0.
    """
    return select(magnitude(value) < _BEYOND, value, np.float32(0))


@inlined
def half_bits(value: Any) -> Any:
    """Round one float32 to float16, to nearest with ties to even; return its bits as int32."""
    word = np.int64(np.float32(value).view(np.uint32))
    twice = (word + word) & np.int64(0xFFFFFFFF)
    bias = max(twice & np.int64(0xFF000000), np.int64(0x71000000))
    scaled = np.float32(np.float32(abs(value) * np.float32(2.0**112)) * np.float32(2.0**-110))
    base = np.float32(np.uint32((bias >> 1) + np.int64(0x07800000)).view(np.float32) + scaled)
    rounded = np.int64(base.view(np.uint32))
    unsigned = ((rounded >> 13) & np.int64(0x7C00)) + (rounded & np.int64(0xFFF))
    if twice > np.int64(0xFF000000):
        unsigned = np.int64(0x7E00)
    return np.int32(((word & np.int64(0x80000000)) >> 16) | unsigned)


@inlined
def half_value(half: Any) -> Any:
    """Return the float32 of the bits of a float16."""
    exponent = (half >> np.int32(10)) & np.int32(31)
    fraction = half & np.int32(1023)
    if exponent == 0:
        value = np.float32(fraction) * np.float32(2.0**-24)
    elif exponent == 31:
        value = np.int32(np.int32(0x7F800000) | (fraction << np.int32(13))).view(np.float32)
    else:
        shifted = ((exponent + np.int32(112)) << np.int32(23)) | (fraction << np.int32(13))
        value = np.int32(shifted).view(np.float32)
    return -value if half & np.int32(0x8000) else value


@inlined
def put_half(out: Any, at: Any, value: Any) -> Any:
    """Store a float32 as float16 in `out` [n] uint8 from `at` on; return what that holds."""
    half = half_bits(value)
    out[at] = np.uint8(half & np.int32(255))
    out[at + 1] = np.uint8(half >> np.int32(8))
    return half_value(half)
