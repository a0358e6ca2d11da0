"""Blocks laid side by side for the searches, and the weights of their errors.

Formulas are those of llama.cpp's ``ggml/src/ggml-quants.c`` (MIT) at 0c1e5709.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen35.codecs.compiled import compiled, inlined
from qwen35.codecs.lanes import load, magnitude, root, splat, store

__all__ = ["weigh", "weigh_by", "weigh_magnitudes", "weigh_offsets", "weigh_squares"]

_ZERO = np.float32(0)


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
