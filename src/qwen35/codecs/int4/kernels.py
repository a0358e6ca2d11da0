"""Inner loops of INT4, compiled by Numba: 16 groups side by side, a lane each."""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen35.codecs.compiled import compiled, inlined  # first: it imports Numba in its own way
from qwen35.codecs.lanes import LANES, gather, load, select, splat, store

__all__ = ["choose", "encode"]

_ZERO, _HALVES = np.float32(0), np.float32(7.5)
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


@compiled
def _loss(xs: Any, ws: Any, scale: Any, zero: Any) -> Any:
    """Return the weighted squared error with these scales and zero points."""
    inverse = np.float32(1) / scale
    total = splat(_ZERO)
    for i in range(xs.shape[0]):
        exact = load(xs, i) * inverse
        error = _clipped(_rounded(exact) + zero) - zero - exact
        total = total + load(ws, i) * (error * error)
    return total * scale * scale


@compiled
def choose(
    flat: Any, weights: Any, group: Any, symmetric: Any, search: Any, scales: Any, zeros: Any
) -> None:
    """Choose scales and zero points.

    flat: [n * group] float32, finite; weights: [columns] float32, importance of each column;
    symmetric: whether zero points are 0; search: whether to search scales -> scales: [n] float32, 0
    for groups of zeros; zeros: [n] float32, integers.
    """
    count, period = flat.shape[0] // group, weights.shape[0] // group
    xs, ws = np.empty((group, LANES), np.float32), np.empty((group, LANES), np.float32)
    own, zero = np.empty((1, LANES), np.float32), np.empty((1, LANES), np.float32)
    for first in range(0, count, LANES):
        gather(flat, first, count, count, xs)
        low, high = splat(_ZERO), splat(_ZERO)
        for i in range(group):
            x = load(xs, i)
            low, high = select(x < low, x, low), select(x > high, x, high)
        if symmetric:
            below = _ZERO - low
            base = select(below > high, below, high) / _HALVES
            store(zero, 0, splat(_ZERO))
        else:
            base = (high - low) / _STEPS
            unit = select(base > _ZERO, base, np.float32(1))
            store(zero, 0, _clipped(_rounded(_LEAST - low / unit)))
        best = base
        if search:
            gather(weights, first, count, period, ws)
            least = splat(np.float32(np.inf))
            for step in range(_CANDIDATES):
                scale = base * np.float32(_FIRST - np.float32(step) * _STEP)
                loss = _loss(xs, ws, select(scale > _ZERO, scale, np.float32(1)), load(zero, 0))
                better = loss < least
                best, least = select(better, scale, best), select(better, loss, least)
        store(own, 0, best)
        for k in range(min(LANES, count - first)):
            scales[first + k], zeros[first + k] = own[0, k], zero[0, k]


@compiled
def encode(flat: Any, group: Any, scales: Any, zeros: Any, codes: Any) -> None:
    """Encode with given scales and zero points.

    flat: [n * group] float32; scales, zeros: [n] float32 -> codes: [n * group] uint8, 0 to 15.
    """
    for number in range(scales.shape[0]):
        scale, zero = scales[number], zeros[number]
        for i in range(number * group, (number + 1) * group):
            value = np.float32(np.float32(flat[i] / scale + _MAGIC) - _MAGIC) + zero
            codes[i] = np.uint8(min(max(value, _LEAST), _MOST) + np.float32(8))
