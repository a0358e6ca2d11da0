"""Blocks laid side by side for the searches, and the weights of their errors.

Formulas are those of llama.cpp's ``ggml/src/ggml-quants.c`` (MIT) at 0c1e5709.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen35.codecs.compiled import compiled, inlined
from qwen35.codecs.ggml.lanes import LANES, load, magnitude, root, splat, store

__all__ = ["gather", "weigh", "weigh_by", "weigh_magnitudes", "weigh_offsets", "weigh_squares"]

_ZERO = np.float32(0)


@compiled
def gather(flat: Any, first: Any, count: Any, period: Any, tile: Any) -> Any:
    """Put 16 blocks into the columns of a tile.

    Args:
        flat: blocks, one after the other, float32.
        first: number of the first block.
        count: how many there are; where fewer than 16 are left, the last takes the other columns.
        period: blocks after which `flat` begins again (importance does, for every row).
        tile: [elements of a block, 16] float32.
    """
    size = tile.shape[0]
    for k in range(LANES):
        start = min(first + k, count - 1) % period * size
        block = flat[start : start + size]
        for i in range(size):
            tile[i, k] = block[i]


@inlined
def weigh_by(xs: Any, ws: Any, variance: Any) -> Any:
    """Compute error weights: importance times ``sqrt(variance + x^2)``, a variance a lane."""
    for i in range(xs.shape[0]):
        x = load(xs, i)
        store(ws, i, load(ws, i) * root(variance + x * x))


@compiled
def weigh(xs: Any, ws: Any, factor: Any) -> Any:
    """Compute error weights: importance times ``sqrt(factor * mean(x^2) + x^2)``, over all rows."""
    total = splat(_ZERO)
    for i in range(xs.shape[0]):
        x = load(xs, i)
        total = total + x * x
    weigh_by(xs, ws, factor * total / np.float32(xs.shape[0]))


@compiled
def weigh_offsets(xs: Any, ws: Any, count: Any) -> Any:
    """Make weights ``sqrt(mean(x^2)) + abs(x)``, over `count` rows at a time."""
    for at in range(0, xs.shape[0], count):
        total = splat(_ZERO)
        for i in range(at, at + count):
            x = load(xs, i)
            total = total + x * x
        average = root(total / np.float32(count))
        for i in range(at, at + count):
            store(ws, i, average + magnitude(load(xs, i)))


@compiled
def weigh_magnitudes(xs: Any, ws: Any) -> Any:
    """Make weights ``abs(x)``."""
    for i in range(xs.shape[0]):
        store(ws, i, magnitude(load(xs, i)))


@compiled
def weigh_squares(xs: Any, ws: Any) -> Any:
    """Make weights ``x^2``."""
    for i in range(xs.shape[0]):
        x = load(xs, i)
        store(ws, i, x * x)
