"""Inner loops of MLX's quantization, compiled by Numba: 16 groups side by side, a lane each.

Every step rounds to float32 as ``mx.quantize`` does on a CPU, so that the bytes are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen35.codecs.compiled import compiled, inlined  # first: it imports Numba in its own way
from qwen35.codecs.fp8_channel.kernels import e4m3_codes
from qwen35.codecs.lanes import (
    LANES,
    bits,
    ints,
    load,
    magnitude,
    select,
    splat,
    store,
    store_bytes,
    transpose,
)

__all__ = ["affine_codes", "affine_scales", "block_codes", "block_scales", "float_codes"]

_ZERO = np.float32(0)
_LEAST = np.float32(1e-7)
"""The smallest scale that ``mx.quantize`` takes."""

_MAGIC = np.float32(1.5 * 2**23)
"""Added and subtracted, it rounds magnitudes below 2**22 to integers, ties to even."""

_INFINITY = np.float32(np.inf)
_FRACTION = np.int32(0x7FFFFF)


@compiled
def affine_scales(values: Any, group: Any, levels: Any, scales: Any, biases: Any) -> None:
    """Choose scales and biases of groups.

    values: [n * group] float32 or bits of bfloat16 (uint16), finite; levels: the largest code ->
    scales, biases: [n] float32, not yet rounded to the dtype in which they are stored.
    """
    count = values.shape[0] // group
    xs = np.empty((group, LANES), np.float32)
    lows, highs = np.empty((1, LANES), np.float32), np.empty((1, LANES), np.float32)
    rest = np.zeros(group * LANES, values.dtype)
    for first in range(0, count, LANES):
        tiles, start = values, first * group
        if count - first < LANES:
            rest[: values.shape[0] - start] = values[start:]
            tiles, start = rest, 0
        for row in range(0, group, LANES):
            transpose(tiles, start + row, group, xs, row)
        low, high = splat(_INFINITY), splat(-_INFINITY)
        for i in range(group):
            x = load(xs, i)
            low, high = select(x < low, x, low), select(x > high, x, high)
        store(lows, 0, low)
        store(highs, 0, high)
        for k in range(min(LANES, count - first)):
            low_one, high_one = lows[0, k], highs[0, k]
            below = abs(low_one) > abs(high_one)
            scale = max((high_one - low_one) / levels, _LEAST)
            scale = scale if below else -scale
            edge = low_one if below else high_one
            steps = np.rint(edge / scale)
            if steps != _ZERO:  # so that the extreme value, and zero, are on the grid
                scales[first + k], biases[first + k] = edge / steps, edge
            else:
                scales[first + k], biases[first + k] = scale, _ZERO


@compiled
def affine_codes(
    values: Any, group: Any, levels: Any, scales: Any, biases: Any, codes: Any
) -> None:
    """Encode with given scales and biases.

    values: [n * group] float32 or bits of bfloat16 (uint16); scales, biases: [n] float32 -> codes:
    [n * group] uint8.
    """
    for number in range(scales.shape[0]):
        scale, bias = scales[number], biases[number]
        for at in range(number * group, (number + 1) * group, LANES):
            exact = (load(values, at) - bias) / scale
            code = (exact + _MAGIC) - _MAGIC
            code = select(code > levels, splat(levels), code)
            store_bytes(codes, at, ints(select(code < _ZERO, splat(_ZERO), code)))


@compiled
def block_scales(values: Any, group: Any, largest: Any, power: Any, scales: Any) -> None:
    """Choose the scales of blocks whose codes are small floats.

    values: [n * group] float32 or bits of bfloat16 (uint16), finite; largest: number of the codes'
    format, float32; power: whether scales are powers of two (E8M0), else E4M3 -> scales: [n] uint8.
    """
    count = values.shape[0] // group
    xs = np.empty((group, LANES), np.float32)
    chosen = np.empty((1, LANES), np.int32)
    rest = np.zeros(group * LANES, values.dtype)
    for first in range(0, count, LANES):
        tiles, start = values, first * group
        if count - first < LANES:
            rest[: values.shape[0] - start] = values[start:]
            tiles, start = rest, 0
        for row in range(0, group, LANES):
            transpose(tiles, start + row, group, xs, row)
        most = splat(_ZERO)
        for i in range(group):
            size = magnitude(load(xs, i))
            most = select(size > most, size, most)
        scale = most / largest
        if power:
            exponent = bits(scale) >> np.int32(23)
            above = select((bits(scale) & _FRACTION) > np.int32(0), splat(np.int32(1)), np.int32(0))
            code = exponent + above
            code = select(scale > _ZERO, code, np.int32(127))
        else:
            code = e4m3_codes(scale)
        store(chosen, 0, code)
        for k in range(min(LANES, count - first)):
            scales[first + k] = chosen[0, k]


@inlined
def _e2m1(x: Any, unit: Any) -> Any:
    """Return the codes of the nearest E2M1 numbers; ties go to the smaller, which is +0 at 0."""
    size = magnitude(x) / unit
    one = splat(np.int32(1))
    code = select(size > np.float32(0.25), one, np.int32(0))
    code = code + select(size > np.float32(0.75), one, np.int32(0))
    code = code + select(size > np.float32(1.25), one, np.int32(0))
    code = code + select(size > np.float32(1.75), one, np.int32(0))
    code = code + select(size > np.float32(2.5), one, np.int32(0))
    code = code + select(size > np.float32(3.5), one, np.int32(0))
    code = code + select(size > np.float32(5), one, np.int32(0))
    sign = (bits(x) >> np.int32(28)) & np.int32(8)
    return select(code > np.int32(0), code | sign, np.int32(0))


@compiled
def block_codes(values: Any, group: Any, units: Any, codes: Any) -> None:
    """Encode blocks as E2M1; where the unit is 0, all codes are.

    values: [n * group] float32 or bits of bfloat16 (uint16); units: [n] float32 -> codes: uint8.
    """
    for number in range(units.shape[0]):
        unit = units[number]
        usable = unit if unit > _ZERO else _INFINITY
        for at in range(number * group, (number + 1) * group, LANES):
            store_bytes(codes, at, _e2m1(load(values, at), splat(usable)))


@compiled
def float_codes(values: Any, group: Any, units: Any, codes: Any) -> None:
    """Encode blocks as E4M3; arguments as for `block_codes`."""
    for number in range(units.shape[0]):
        unit = splat(units[number])
        for at in range(number * group, (number + 1) * group, LANES):
            x = load(values, at)
            sign = (bits(x) >> np.int32(24)) & np.int32(128)
            store_bytes(codes, at, e4m3_codes(magnitude(x) / unit) | sign)
