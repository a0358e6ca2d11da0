"""The arithmetic of adapters, in float32 and in one fixed order: the same bytes on any machine."""

from __future__ import annotations

import numpy as np

from qwen35.array_types import F32
from qwen35.codecs.compiled import compiled

__all__ = ["add_product", "scale_rows"]


@compiled
def add_product(values: F32, left: F32, right: F32, scale: np.float32) -> None:
    """Add ``scale * (left @ right)`` to `values`, summing over the rank from its first index on.

    Args:
        values: [rows, columns], changed in place.
        left: [rows, rank].
        right: [rank, columns].
        scale: factor of the product.
    """
    rows, columns = values.shape
    total = np.empty(columns, np.float32)
    for row in range(rows):
        total[:] = 0
        for k in range(right.shape[0]):
            factor = np.float64(left[row, k])
            for column in range(columns):
                # exact in float64, so that it is rounded once, as by processors that fuse the two
                product = factor * np.float64(right[k, column])
                total[column] = np.float32(product + np.float64(total[column]))
        for column in range(columns):
            values[row, column] += scale * total[column]


@compiled
def scale_rows(values: F32, lengths: F32) -> None:
    """Scale each row of `values` [rows, columns] to a Euclidean length, in place.

    The sum of squares is taken in float64, from the first column on.
    """
    rows, columns = values.shape
    for row in range(rows):
        squares = 0.0
        for column in range(columns):
            value = np.float64(values[row, column])
            squares += value * value
        factor = lengths[row] / np.float32(np.sqrt(squares))
        for column in range(columns):
            values[row, column] *= factor
