"""Inner loops of NVFP4, compiled by Numba: 16 blocks side by side, a lane each."""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen35.codecs.compiled import compiled, inlined  # first: it imports Numba in its own way
from qwen35.codecs.fp8_channel.kernels import e4m3_codes
from qwen35.codecs.lanes import (
    LANES,
    bits,
    floats,
    from_bits,
    gather,
    ints,
    load,
    magnitude,
    select,
    splat,
    store,
    transpose,
)

__all__ = ["encode"]

_BLOCK = 16
_WORDS = 2
"""Of 8 codes, in a block."""

_ZERO, _ONE, _TWO, _SIX = np.float32(0), np.float32(1), np.float32(2), np.float32(6)
_SMALLEST = np.float32(2.0**-9)
_EXPONENT = np.int32(0x7F800000)
_ONE_BITS = np.int32(0x3F800000)
_TO_MAGIC = np.int32((22 << 23) + (1 << 22))
"""Turns 2**e into 1.5 * 2**(e + 22), whose last-place unit is the E2M1 step 2**(e - 1)."""

_BELOW, _ABOVE = 3, 5
"""Scales that a search tries: the E4M3 numbers before and after that of the largest magnitude.

Three fewer clip it to 0.77 of itself; five more make it 4, the next E2M1 number below 6."""

_LEAST, _MOST = np.int32(1), np.int32(126)
"""Codes of the E4M3 numbers 2**-9 and 448."""

_OF_ZEROS = np.int32(32)
"""Code of 0.125, which compressed-tensors gives blocks of zeros."""


@inlined
def _rounded(units: Any) -> Any:
    """Return the nearest E2M1 numbers of magnitudes up to 6, ties to even."""
    exponent = bits(units) & _EXPONENT
    exponent = select(exponent < _ONE_BITS, _ONE_BITS, exponent)
    magic = from_bits(exponent + _TO_MAGIC)
    return (units + magic) - magic


@inlined
def _clipped(units: Any) -> Any:
    return select(units > _SIX, _SIX, units)


@inlined
def _scale_codes(values: Any) -> Any:
    """Return the codes of the nearest E4M3 numbers, ties to even; at least 2**-9, at most 448."""
    code = e4m3_codes(values)
    return select(code < _LEAST, _LEAST, code)


@inlined
def _scale_values(codes: Any) -> Any:
    """Return the values of positive E4M3 codes."""
    normal = from_bits((codes << np.int32(20)) + np.int32(120 << 23))
    return select(codes < np.int32(8), floats(codes) * _SMALLEST, normal)


@inlined
def _squared_error(sizes: Any, i: Any, inverse: Any) -> Any:
    exact = load(sizes, i) * inverse
    error = _rounded(_clipped(exact)) - exact
    return error * error


@compiled
def _losses(sizes: Any, ws: Any, weights: Any, first: Any, second: Any, third: Any) -> Any:
    """Return the weighted squared errors with each of three sizes of a unit."""
    # side by side: the additions of a sum wait for each other
    by_first, by_second, by_third = _ONE / first, _ONE / second, _ONE / third
    a, b, c = splat(_ZERO), splat(_ZERO), splat(_ZERO)
    for i in range(_BLOCK):
        x, y, z = (
            _squared_error(sizes, i, by_first),
            _squared_error(sizes, i, by_second),
            _squared_error(sizes, i, by_third),
        )
        if weights is not None:
            w = load(ws, i)
            x, y, z = w * x, w * y, w * z
        a, b, c = a + x, b + y, c + z
    return a * first * first, b * second * second, c * third * third


@compiled
def _search(sizes: Any, ws: Any, weights: Any, whole: Any, own: Any) -> Any:
    """Return the scales near 16 others that have the least error; the first of equals."""
    best, least = own, splat(np.float32(np.inf))
    for step in range(-_BELOW, _ABOVE + 1, 3):
        first = _nearby(own, step)
        second, third = _nearby(own, step + 1), _nearby(own, step + 2)
        losses = _losses(
            sizes,
            ws,
            weights,
            _scale_values(first) / whole,
            _scale_values(second) / whole,
            _scale_values(third) / whole,
        )
        best, least = _better(first, losses[0], best, least)
        best, least = _better(second, losses[1], best, least)
        best, least = _better(third, losses[2], best, least)
    return best


@inlined
def _nearby(codes: Any, step: Any) -> Any:
    moved = codes + np.int32(step)
    moved = select(moved < _LEAST, _LEAST, moved)
    return select(moved > _MOST, _MOST, moved)


@inlined
def _better(codes: Any, losses: Any, best: Any, least: Any) -> Any:
    fewer = losses < least
    return select(fewer, codes, best), select(fewer, losses, least)


@inlined
def _codes(x: Any, units: Any) -> Any:
    value = _rounded(_clipped(magnitude(x) / units))
    small = ints(value * _TWO)
    large = (bits(value) >> np.int32(22)) - np.int32(252)
    code = select(value < _ONE, small, large)
    return code | ((bits(x) >> np.int32(28)) & np.int32(8))


@compiled
def encode(values: Any, weights: Any, whole: Any, search: Any, words: Any, chosen: Any) -> None:
    """Choose the scales of blocks and encode.

    values: [n * 16] float32 or bits of bfloat16 (uint16), finite; weights: [columns] float32,
    importance of each column, or None; whole: float32, 2688 divided by the largest magnitude;
    search: whether to search scales -> words: [n * 2] int32, 8 codes each, chosen: [n] uint8, codes
    of scales.
    """
    count = values.shape[0] // _BLOCK
    xs, sizes = np.empty((_BLOCK, LANES), np.float32), np.empty((_BLOCK, LANES), np.float32)
    ws, scales = np.empty((_BLOCK, LANES), np.float32), np.empty((1, LANES), np.int32)
    pairs = np.empty((_WORDS, LANES), np.int32)
    rest = np.zeros(_BLOCK * LANES, values.dtype)
    for first in range(0, count, LANES):
        tiles, start = values, first * _BLOCK
        if count - first < LANES:
            rest[: values.shape[0] - start] = values[start:]
            tiles, start = rest, 0
        transpose(tiles, start, _BLOCK, xs, 0)
        most = splat(_ZERO)
        for i in range(_BLOCK):
            size = magnitude(load(xs, i))
            store(sizes, i, size)
            most = select(size > most, size, most)
        own = _scale_codes(whole * (most / _SIX))
        if search:
            if weights is not None:
                gather(weights, first, count, weights.shape[0] // _BLOCK, ws)
            own = _search(sizes, ws, weights, whole, own)
        own = select(most > _ZERO, own, _OF_ZEROS)
        store(scales, 0, own)
        units = _scale_values(own) / whole
        for word in range(_WORDS):
            found = _codes(load(xs, word * 8), units)
            for i in range(1, 8):
                code = _codes(load(xs, word * 8 + i), units)
                found = found | (code << np.int32(4 * i))
            store(pairs, word, found)
        for k in range(min(LANES, count - first)):
            chosen[first + k] = scales[0, k]
            words[2 * (first + k)] = pairs[0, k]
            words[2 * (first + k) + 1] = pairs[1, k]
