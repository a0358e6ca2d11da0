"""Inner loops of NF4, compiled by Numba."""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen35.codecs.compiled import compiled, inlined
from qwen35.codecs.nf4.tables import BOUNDS, TINY

__all__ = ["encode_bf16", "encode_f32"]

_B = tuple(np.float32(bound) for bound in BOUNDS)
_B0, _B1, _B2, _B3, _B4, _B5, _B6, _B7 = _B[:8]
_B8, _B9, _B10, _B11, _B12, _B13, _B14 = _B[8:]
_TINY = np.float32(TINY)


@inlined
def _code(value: Any) -> Any:
    """Count the bounds below `value`; branch-free, so that a block compiles to vector compares."""
    low = (
        np.int32(value > _B0)
        + np.int32(value > _B1)
        + np.int32(value > _B2)
        + np.int32(value > _B3)
        + np.int32(value > _B4)
        + np.int32(value > _B5)
        + np.int32(value > _B6)
        + np.int32(value > _B7)
    )
    high = (
        np.int32(value > _B8)
        + np.int32(value > _B9)
        + np.int32(value > _B10)
        + np.int32(value > _B11)
        + np.int32(value > _B12)
        + np.int32(value > _B13)
        + np.int32(value > _B14)
    )
    return low + high


@compiled
def encode_bf16(pairs: Any, packed: Any, absmax: Any) -> Any:
    """Quantize bf16 weights, two per word.

    pairs: [n / 2] uint32, the first weight of a pair in the low half -> packed: [n / 2] uint8,
    absmax: [n / 64] float32. Returns the number of blocks that hold NaN or infinity.
    """
    bad = 0
    for block in range(absmax.shape[0]):
        start = block * 32
        # Without the sign, bf16 bits order like magnitudes, with infinity and NaN above all.
        largest = np.int32(0)
        for i in range(32):
            pair = np.int32(pairs[start + i])
            first = pair & np.int32(0x7FFF)
            second = (pair >> np.int32(16)) & np.int32(0x7FFF)
            largest = max(largest, max(first, second))
        if largest >= np.int32(0x7F80):
            bad += 1
        scale = np.int32(largest << np.int32(16)).view(np.float32)
        absmax[block] = scale
        # bitsandbytes multiplies by the inverse too: dividing could round to another code.
        inverse = np.float32(1.0) / max(scale, _TINY)
        for i in range(32):
            pair = np.int32(pairs[start + i])
            first_value = np.int32(pair << np.int32(16)).view(np.float32) * inverse
            second_value = np.int32(pair & np.int32(-65536)).view(np.float32) * inverse
            high = _code(first_value) << np.int32(4)
            packed[start + i] = np.uint8(high | _code(second_value))
    return bad


@compiled
def encode_f32(values: Any, packed: Any, absmax: Any) -> Any:
    """Quantize float32 weights.

    values: [n] float32 -> packed: [n / 2] uint8, absmax: [n / 64] float32. Returns the number of
    blocks that hold NaN or infinity.
    """
    bad = 0
    for block in range(absmax.shape[0]):
        start = block * 64
        largest = np.float32(0)
        finite = True
        for i in range(64):
            magnitude = abs(values[start + i])
            finite = finite and magnitude < np.inf
            largest = max(largest, magnitude)
        if not finite:
            bad += 1
        absmax[block] = largest
        inverse = np.float32(1.0) / max(largest, _TINY)
        for i in range(32):
            high = _code(values[start + 2 * i] * inverse) << np.int32(4)
            low = _code(values[start + 2 * i + 1] * inverse)
            packed[start // 2 + i] = np.uint8(high | low)
    return bad
