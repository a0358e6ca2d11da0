"""Rows of a GGUF tensor, read from the checkpoint and transformed, as float32."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from qwen35.checkpoint.source import Reader
from qwen35.codecs.floats import all_finite, empty, f32_from
from qwen35.gguf.names import Tensor

__all__ = ["Strip", "read_strip", "source_end", "strips", "tiled_columns"]

F32 = npt.NDArray[np.float32]

STRIP = 2**20
"""Elements of a strip, if a row is not longer."""


class Strip:
    """Some rows of one slab of a tensor.

    Args:
        tensor: which.
        slab: number of the slab.
        first: first row, counted in the slab.
        count: rows.
    """

    __slots__ = ("count", "first", "slab", "tensor")

    def __init__(self, tensor: Tensor, slab: int, first: int, count: int) -> None:
        self.tensor = tensor
        self.slab = slab
        self.first = first
        self.count = count

    @property
    def start(self) -> int:
        """The first row, counted in the tensor."""
        return self.slab * self.tensor.rows + self.first


def strips(tensor: Tensor) -> Iterator[Strip]:
    """Cut a tensor into strips, in the order of the source; a strip has rows of one slab.

    Rows that move in groups are cut where their groups end, so that a strip is one run of rows in
    the source. A packed source is decoded whole, so its weights are not cut.
    """
    rows = tensor.rows
    step = max(1, STRIP // tensor.row)
    whole = tensor.transform == "frame"
    for number, slab in enumerate(tensor.slabs):
        if whole or slab.item.weight.storage != "plain":
            yield Strip(tensor, number, 0, rows)
            continue
        runs = list(_runs(Strip(tensor, number, 0, rows)))
        starts = accumulate((count for _, count in runs), initial=0)
        for (_, count), begin in sorted(zip(runs, starts, strict=False)):
            for first in range(begin, begin + count, step):
                yield Strip(tensor, number, first, min(step, begin + count - first))


def source_end(strip: Strip) -> int:
    """Return how many elements of its weight lie before the end of a strip's rows.

    Of a weight that is read whole, all of them do.
    """
    item = strip.tensor.slabs[strip.slab].item
    if strip.tensor.transform == "frame" or item.weight.storage != "plain":
        return item.spec.numel
    return max(row + count for row, count in _runs(strip)) * strip.tensor.row


def read_strip(reader: Reader, strip: Strip) -> F32:
    """Return the rows of `strip` as float32 [count, row], transformed.

    Raises:
        TensorError: the source cannot be read, or holds a NaN or an infinity.
    """
    tensor = strip.tensor
    item = tensor.slabs[strip.slab].item
    if tensor.transform == "frame":
        values = _plain(reader, strip, [(0, item.spec.numel)]).reshape(item.spec.shape)
        return np.ascontiguousarray(values[:, :, tensor.first]).reshape(-1, tensor.row)
    if item.weight.storage != "plain":
        values = _packed(reader, strip)
    else:
        runs = [(row * tensor.row, n * tensor.row) for row, n in _runs(strip)]
        values = _plain(reader, strip, runs)
    values = values.reshape(strip.count, tensor.row)
    if tensor.head and (tensor.transform == "columns" or len(tensor.shape) == 1):
        values = tiled_columns(values, tensor)
    return _computed(values, tensor, item.spec.dtype)


def _plain(reader: Reader, strip: Strip, runs: list[tuple[int, int]]) -> F32:
    """Read runs of (first element, count) one after the other."""
    item = strip.tensor.slabs[strip.slab].item
    spec = item.spec
    values = empty(spec.dtype, sum(count for _, count in runs))
    view = values.data.cast("B")
    position = 0
    for first, count in runs:
        nbytes = count * spec.itemsize
        target = view[position : position + nbytes]
        reader.read_into(item.weight.main, first * spec.itemsize, target)
        position += nbytes
    if not all_finite(values, spec.dtype):
        from qwen35.strips import not_finite

        raise not_finite(spec.name)
    return f32_from(values, spec.dtype)


def _packed(reader: Reader, strip: Strip) -> F32:
    """Decode a packed weight and return the rows of a strip, in their order."""
    from qwen35.strips import decoded  # brings numba, which plain sources do not need

    slab = strip.tensor.slabs[strip.slab]
    spec = slab.item.spec
    pieces = decoded(reader, slab.item.weight, spec)
    values = np.concatenate([f32_from(piece, spec.dtype) for piece in pieces])
    row = strip.tensor.row
    rows = values.reshape(-1, row)
    return np.concatenate([rows[first : first + count] for first, count in _runs(strip)])


def _runs(strip: Strip) -> Iterator[tuple[int, int]]:
    """Yield (first row, count) in the source weight for the rows of a strip, in order."""
    tensor = strip.tensor
    base = tensor.slabs[strip.slab].row
    if tensor.transform != "heads" or len(tensor.shape) == 1:
        yield base + strip.first, strip.count
        return
    row, end = strip.first, strip.first + strip.count
    groups = (tensor.rows - tensor.first) // tensor.head // tensor.keys
    while row < end:
        if row < tensor.first:
            stop, source = min(end, tensor.first), row
        else:
            head, within = divmod(row - tensor.first, tensor.head)
            stop = min(end, row - within + tensor.head)
            value, key = divmod(head, tensor.keys)
            source = tensor.first + (key * groups + value) * tensor.head + within
        yield base + source, stop - row
        row = stop


def tiled_columns(values: F32, tensor: Tensor) -> F32:
    """Return [rows, row] with the columns of value heads in the order of the GGUF tensor."""
    rows, row = values.shape
    groups = row // tensor.head // tensor.keys
    heads = values.reshape(rows, tensor.keys, groups, tensor.head)
    return np.ascontiguousarray(heads.transpose(0, 2, 1, 3)).reshape(rows, row)


def _computed(values: F32, tensor: Tensor, dtype: str) -> F32:
    """Apply arithmetic; on F16 weights it is done in F16, as the converter does."""
    if tensor.transform == "plus_one":
        values = values + np.float32(1)
    elif tensor.transform == "neg_exp":
        values = (-np.exp(values.astype(np.float64))).astype(np.float32)
    else:
        return values
    return values.astype(np.float16).astype(np.float32) if dtype == "F16" else values
