"""Inner loops of INT4, compiled by Numba: 16 groups side by side, a lane each."""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen35.codecs.compiled import compiled, inlined  # first: it imports Numba in its own way
from qwen35.codecs.lanes import (
    LANES,
    gather,
    ints,
    load,
    select,
    splat,
    store,
    store_bytes,
    transpose,
)

__all__ = ["choose", "encode"]

_ZERO, _ONE, _EIGHT, _HALVES = np.float32(0), np.float32(1), np.float32(8), np.float32(7.5)
_LEAST, _MOST = np.float32(-8), np.float32(7)
_STEPS = np.float32(15)
_MAGIC = np.float32(1.5 * 2**23)
"""Added and subtracted, it rounds magnitudes below 2**22 to integers, ties to even."""

_FIRST, _STEP, _CANDIDATES = np.float32(1.07), np.float32(0.03), 15
"""Scales that a search tries, relative to those of the extremes: from 7.5 / 7, which takes the
largest magnitude to 7, down to 0.65, which clips it."""


@inlined
def _rounded(value: Any) -> Any:
    return (value + _MAGIC) - _MAGIC


@inlined
def _clipped(value: Any) -> Any:
    value = select(value > _MOST, _MOST, value)
    return select(value < _LEAST, _LEAST, value)


@inlined
def _squared_error(x: Any, inverse: Any, zero: Any) -> Any:
    exact = x * inverse
    error = _clipped(_rounded(exact) + zero) - zero - exact
    return error * error


@compiled
def _losses(xs: Any, ws: Any, weights: Any, zero: Any, scales: Any) -> Any:
    """Return the weighted squared errors with three sets of scales, and these zero points."""
    # side by side, since each addition to a sum waits for the one before
    first, second, third = scales
    by_first, by_second, by_third = _ONE / first, _ONE / second, _ONE / third
    a, b, c = splat(_ZERO), splat(_ZERO), splat(_ZERO)
    for i in range(xs.shape[0]):
        x = load(xs, i)
        d, e, f = (
            _squared_error(x, by_first, zero),
            _squared_error(x, by_second, zero),
            _squared_error(x, by_third, zero),
        )
        if weights is not None:
            w = load(ws, i)
            d, e, f = w * d, w * e, w * f
        a, b, c = a + d, b + e, c + f
    return a * first * first, b * second * second, c * third * third


@inlined
def _candidate(base: Any, step: Any) -> Any:
    return base * np.float32(_FIRST - np.float32(step) * _STEP)


@inlined
def _usable(scale: Any) -> Any:
    return select(scale > _ZERO, scale, _ONE)


@inlined
def _better(scale: Any, losses: Any, best: Any, least: Any) -> Any:
    fewer = losses < least
    return select(fewer, scale, best), select(fewer, losses, least)


@compiled
def _search(xs: Any, ws: Any, weights: Any, zero: Any, base: Any) -> Any:
    """Return the scales with the least error; the first of equals."""
    best, least = base, splat(np.float32(np.inf))
    for step in range(0, _CANDIDATES, 3):
        first, second = _candidate(base, step), _candidate(base, step + 1)
        third = _candidate(base, step + 2)
        usable = (_usable(first), _usable(second), _usable(third))
        losses = _losses(xs, ws, weights, zero, usable)
        best, least = _better(first, losses[0], best, least)
        best, least = _better(second, losses[1], best, least)
        best, least = _better(third, losses[2], best, least)
    return best


@compiled
def choose(
    values: Any, weights: Any, group: Any, symmetric: Any, search: Any, scales: Any, zeros: Any
) -> None:
    """Choose scales and zero points.

    values: [n * group] float32 or bits of bfloat16 (uint16), finite; weights: [columns] float32,
    importance of each column, or None; symmetric: whether zero points are 0; search: whether to
    search scales -> scales: [n] float32, 0 for groups of zeros; zeros: [n] float32, integers.
    """
    count = values.shape[0] // group
    xs, ws = np.empty((group, LANES), np.float32), np.empty((group, LANES), np.float32)
    own, zero = np.empty((1, LANES), np.float32), np.zeros((1, LANES), np.float32)
    rest = np.zeros(group * LANES, values.dtype)
    for first in range(0, count, LANES):
        tiles, start = values, first * group
        if count - first < LANES:
            rest[: values.shape[0] - start] = values[start:]
            tiles, start = rest, 0
        low, high = splat(_ZERO), splat(_ZERO)
        for row in range(0, group, LANES):
            transpose(tiles, start + row, group, xs, row)
        for i in range(group):
            x = load(xs, i)
            low, high = select(x < low, x, low), select(x > high, x, high)
        if symmetric:
            below = _ZERO - low
            base = select(below > high, below, high) / _HALVES
        else:
            base = (high - low) / _STEPS
            store(zero, 0, _clipped(_rounded(_LEAST - low / _usable(base))))
        best = base
        if search:
            if weights is not None:
                gather(weights, first, count, weights.shape[0] // group, ws)
            best = _search(xs, ws, weights, load(zero, 0), base)
        store(own, 0, best)
        for k in range(min(LANES, count - first)):
            scales[first + k], zeros[first + k] = own[0, k], zero[0, k]


@compiled
def encode(values: Any, group: Any, scales: Any, zeros: Any, codes: Any) -> None:
    """Encode with given scales and zero points.

    values: [n * group] float32 or bits of bfloat16 (uint16); scales, zeros: [n] float32 -> codes:
    [n * group] uint8, 0 to 15.
    """
    for number in range(scales.shape[0]):
        scale, zero = scales[number], zeros[number]
        for at in range(number * group, (number + 1) * group, LANES):
            value = _rounded(load(values, at) / scale) + zero
            store_bytes(codes, at, ints(_clipped(value) + _EIGHT))
