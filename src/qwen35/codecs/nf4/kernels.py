"""Inner loops of NF4, compiled by Numba."""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen35.codecs.compiled import compiled, inlined
from qwen35.codecs.lanes import (
    LANES,
    bits,
    from_bits,
    largest,
    load,
    select,
    splat,
    store,
    store_bytes,
)
from qwen35.codecs.nf4.tables import BOUNDS, TINY

__all__ = ["encode_bf16", "encode_f32", "error_sums_bf16", "error_sums_f32"]

_B = tuple(np.float32(bound) for bound in BOUNDS)
_B0, _B1, _B2, _B3, _B4, _B5, _B6, _B7 = _B[:8]
_B8, _B9, _B10, _B11, _B12, _B13, _B14 = _B[8:]
_TINY = np.float32(TINY)
_MAGNITUDE = np.int32(0x7FFF)
_HIGH = np.int32(-65536)
_HALF = np.int32(16)


@inlined
def _either(mask: Any, a: Any, b: Any) -> Any:
    """Return one of two numbers in each lane."""
    return select(mask, splat(a), b)


@inlined
def _codes(values: Any) -> Any:
    """Count the bounds below each value, by bisection: a bit at a time, from the highest."""
    high = values > _B7
    second = values > _either(high, _B11, _B3)
    upper, lower = _either(second, _B13, _B9), _either(second, _B5, _B1)
    third = values > select(high, upper, lower)
    upper = select(second, _either(third, _B14, _B12), _either(third, _B10, _B8))
    lower = select(second, _either(third, _B6, _B4), _either(third, _B2, _B0))
    low = values > select(high, upper, lower)
    nothing = np.int32(0)
    return (
        _either(high, np.int32(8), nothing)
        | _either(second, np.int32(4), nothing)
        | _either(third, np.int32(2), nothing)
        | _either(low, np.int32(1), nothing)
    )


@inlined
def _larger(a: Any, b: Any) -> Any:
    return select(a > b, a, b)


@inlined
def _largest_of(pairs: Any) -> Any:
    """Return the larger magnitude of each pair."""
    return _larger(pairs & _MAGNITUDE, (pairs >> _HALF) & _MAGNITUDE)


@inlined
def _packed_pairs(pairs: Any, inverse: Any) -> Any:
    """Return the packed codes of pairs; `inverse` is that of their block's scale."""
    first = from_bits(pairs << _HALF) * inverse
    second = from_bits(pairs & _HIGH) * inverse
    return (_codes(first) << np.int32(4)) | _codes(second)


@compiled
def encode_bf16(pairs: Any, packed: Any, absmax: Any) -> Any:
    """Quantize bf16 weights, two per word.

    pairs: [n / 2] uint32, the first weight of a pair in the low half -> packed: [n / 2] uint8,
    absmax: [n / 64] float32. Returns the number of blocks that hold NaN or infinity.
    """
    bad = 0
    for block in range(absmax.shape[0]):
        start = block * 2 * LANES
        low, high = load(pairs, start), load(pairs, start + LANES)
        # Without the sign, bf16 bits order like magnitudes, with infinity and NaN above all.
        top = largest(_larger(_largest_of(low), _largest_of(high)))
        if top >= np.int32(0x7F80):
            bad += 1
        scale = np.int32(top << _HALF).view(np.float32)
        absmax[block] = scale
        # bitsandbytes multiplies by the inverse too: dividing could round to another code.
        inverse = splat(np.float32(np.float32(1.0) / max(scale, _TINY)))
        store_bytes(packed, start, _packed_pairs(low, inverse))
        store_bytes(packed, start + LANES, _packed_pairs(high, inverse))
    return bad


@compiled
def encode_f32(values: Any, packed: Any, absmax: Any) -> Any:
    """Quantize float32 weights.

    values: [n] float32 -> packed: [n / 2] uint8, absmax: [n / 64] float32. Returns the number of
    blocks that hold NaN or infinity.
    """
    codes = np.empty(64, np.int32)
    bad = 0
    for block in range(absmax.shape[0]):
        start = block * 64
        most = splat(np.int32(0))
        for i in range(start, start + 64, LANES):  # bits order as in bf16
            most = _larger(most, bits(load(values, i)) & np.int32(0x7FFFFFFF))
        top = largest(most)
        if top >= np.int32(0x7F800000):
            bad += 1
        scale = np.int32(top).view(np.float32)
        absmax[block] = scale
        inverse = splat(np.float32(np.float32(1.0) / max(scale, _TINY)))
        for i in range(0, 64, LANES):
            store(codes, i, _codes(load(values, start + i) * inverse))
        for i in range(32):
            packed[start // 2 + i] = np.uint8(codes[2 * i] << 4 | codes[2 * i + 1])
    return bad


@inlined
def _difference(level: Any, scale: Any, value: Any) -> Any:
    """Return how far a decoded weight is from its original; rounded as float32, as decoding is."""
    return np.float64(np.float32(np.float32(level * scale) - value))


@compiled
def error_sums_bf16(pairs: Any, packed: Any, absmax: Any, levels: Any, sums: Any) -> None:
    """Add up the errors of packed bf16 weights.

    pairs: [n / 2] uint32, the original, the first weight of a pair in the low half; packed: [n / 2]
    uint8; absmax: [n / 64] float32; levels: [16] float32 -> sums: [2, 32] float64, which receive
    squared differences and squares of the original, by the place of a pair in its block.
    """
    for block in range(absmax.shape[0]):
        start, scale = block * 32, absmax[block]
        for i in range(32):
            pair, codes = np.int32(pairs[start + i]), packed[start + i]
            first = np.int32(pair << _HALF).view(np.float32)
            second = np.int32(pair & _HIGH).view(np.float32)
            a = _difference(levels[codes >> 4], scale, first)
            b = _difference(levels[codes & 15], scale, second)
            sums[0, i] += a * a + b * b
            sums[1, i] += np.float64(first) * np.float64(first)
            sums[1, i] += np.float64(second) * np.float64(second)


@compiled
def error_sums_f32(values: Any, packed: Any, absmax: Any, levels: Any, sums: Any) -> None:
    """Add up the errors of packed float32 weights: [n]; the rest as in `error_sums_bf16`."""
    for block in range(absmax.shape[0]):
        start, scale = block * 32, absmax[block]
        for i in range(32):
            codes = packed[start + i]
            first, second = values[2 * (start + i)], values[2 * (start + i) + 1]
            a = _difference(levels[codes >> 4], scale, first)
            b = _difference(levels[codes & 15], scale, second)
            sums[0, i] += a * a + b * b
            sums[1, i] += np.float64(first) * np.float64(first)
            sums[1, i] += np.float64(second) * np.float64(second)
