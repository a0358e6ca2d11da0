"""Rows: where the values of an output tensor come from, and how they are read.

An output tensor consists of rows of one weight, or of several (a stack of experts), with transforms
applied. They are read in chunks: runs of rows that are contiguous in the source too, small enough
that memory does not grow with the weight, whatever its codec.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from qwen35.checkpoint.inventory import InventoryItem
from qwen35.codecs import pieces
from qwen35.codecs.codec import Piece, StoredValues
from qwen35.codecs.pieces import Readable, not_finite
from qwen35.codecs.registry import codec_of, is_packed
from qwen35.errors import TensorError
from qwen35.planning.transforms import Transform
from qwen35.record_class import record
from qwen35.tensors import Weight

if TYPE_CHECKING:
    from qwen35.array_types import F32, Array

__all__ = ["RowChunk", "RowReader", "RowSpan", "Rows", "WeightSlab", "rows_of"]


@record
class WeightSlab:
    """Consecutive rows of one weight.

    Args:
        item: the weight.
        row: the first row, all dimensions but the last flattened.
    """

    item: InventoryItem
    row: int = 0


@dataclass(frozen=True, slots=True)
class RowChunk:
    """Rows of one slab that are read together.

    Args:
        slab: index of the slab.
        first: first row, within the slab in output order.
        count: number of rows.
        source: first row, within the stored weight.
    """

    slab: int
    first: int
    count: int
    source: int


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Rows that one thread processes: part of a slab, or several whole slabs of one weight.

    Args:
        slabs: indices of the slabs.
        first: first row within each slab, in output order.
        count: rows of each slab.
    """

    slabs: range
    first: int
    count: int


@record
class Rows:
    """The source of an output tensor's values.

    Args:
        shape: shape of the output; all slabs have equally many rows.
        slabs: one, or one per expert.
        transforms: applied to the values, in order.
        restored: the same rows by the checkpoint's weights, if the slabs take tensors that hold
            these in the output's order and under its names.
    """

    shape: tuple[int, ...]
    slabs: tuple[WeightSlab, ...]
    transforms: tuple[Transform, ...] = ()
    restored: Rows | None = None

    @property
    def by_weight(self) -> Rows:
        """The same rows, by the checkpoint's weights."""
        return self.restored or self

    @property
    def row(self) -> int:
        """Elements of a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def count(self) -> int:
        """Rows of one slab."""
        total = 1
        for size in self.shape[:-1]:
            total *= size
        return total // len(self.slabs)

    @property
    def item(self) -> InventoryItem:
        """The weight of the first slab."""
        return self.slabs[0].item

    @property
    def whole(self) -> bool:
        """Whether computing any row needs the whole weight."""
        return any(transform.whole for transform in self.transforms)

    @property
    def nbytes(self) -> int:
        """Source bytes that hold these rows."""
        return sum(self._share(slab.item) for slab in self.slabs)

    def _share(self, item: InventoryItem) -> int:
        nbytes, numel = item.weight.nbytes, item.spec.numel
        if not numel:
            return nbytes
        return nbytes * min(numel, self.count * self.row) // numel

    @property
    def whole_span(self) -> RowSpan:
        """All of the rows."""
        return RowSpan(range(len(self.slabs)), 0, self.count)

    def spans(self, grain: int, elements: int) -> Iterator[RowSpan]:
        """Cut the rows into spans of about `elements` elements, each within one weight.

        A slab whose rows are not in source order is not cut.
        """
        per_slab = max(1, self.count * self.row)
        if per_slab > elements and not self.whole and self._moved is None:
            size = max(1, elements // self.row // grain) * grain
            for number in range(len(self.slabs)):
                for first in range(0, self.count, size):
                    yield RowSpan(range(number, number + 1), first, min(size, self.count - first))
            return
        begin, most = 0, max(1, elements // per_slab)
        for end in range(1, len(self.slabs) + 1):
            last = end == len(self.slabs)
            if last or end - begin >= most or self._weight(end) is not self._weight(begin):
                yield RowSpan(range(begin, end), 0, self.count)
                begin = end

    def _weight(self, slab: int) -> Weight:
        return self.slabs[slab].item.weight

    @property
    def _moved(self) -> Transform | None:
        """The transform that reorders rows, if any."""
        return next((t for t in self.transforms if t.moves), None)

    def chunks(
        self, grain: int = 1, span: RowSpan | None = None, size: int = 1
    ) -> Iterator[RowChunk]:
        """Cut rows into chunks of whole grains, slab by slab, in source order.

        Args:
            grain: rows that belong together.
            span: the rows; all by default.
            size: of a chunk, in pieces (`qwen35.codecs.pieces.PIECE`).
        """
        span = span or self.whole_span
        # Whole grains, so that no codec block is split between chunks.
        most = max(1, size * pieces.PIECE // max(1, self.row) // grain) * grain
        for number in span.slabs:
            base = self.slabs[number].row
            if self.whole:
                yield RowChunk(number, 0, self.count, base)
                continue
            runs = list(self._runs(span))
            starts = accumulate((count for _, count in runs), initial=span.first)
            # Reordered rows are read in source order, so that the file is read forward once.
            for (source, count), begin in sorted(zip(runs, starts, strict=False)):
                for done in range(0, count, most):
                    part = min(most, count - done)
                    yield RowChunk(number, begin + done, part, base + source + done)

    def _runs(self, span: RowSpan) -> Iterator[tuple[int, int]]:
        """Yield (first row in the slab, number of rows) for a span, in output order."""
        if self._moved is None:
            yield span.first, span.count
            return
        yield from self._moved.runs(span.first, span.count)

    def bounds(self, span: RowSpan) -> tuple[str, int, int]:
        """Return the source file and the byte range of a span's main parts."""
        item = self.slabs[span.slabs[0]].item
        main, numel = item.weight.main, item.spec.numel
        if self.whole or self._moved is not None or not numel or not self.row:
            return main.file, main.begin, main.begin + main.spec.nbytes
        first = self.slabs[span.slabs[0]].row + span.first
        end = self.slabs[span.slabs[-1]].row + span.first + span.count
        start, stop = (main.spec.nbytes * n * self.row // numel for n in (first, end))
        return main.file, main.begin + start, main.begin + stop

    def share(self, span: RowSpan) -> int:
        """Return a span's share of the source bytes; disjoint spans add up to `nbytes`."""
        total = 0
        for number in span.slabs:
            item = self.slabs[number].item
            if self.whole or not self.count:
                total += self._share(item)
                continue
            # Differences of running totals, so that rounding loses no byte.
            done, nbytes = span.first, self._share(item)
            total += nbytes * (done + span.count) // self.count - nbytes * done // self.count
        return total

    def end_of(self, chunk: RowChunk) -> int:
        """Return the file offset reached after reading a chunk."""
        item = self.slabs[chunk.slab].item
        main, numel = item.weight.main, item.spec.numel
        done = numel if self.whole else (chunk.source + chunk.count) * self.row
        return main.begin + (main.spec.nbytes * done // numel if numel else 0)

    def columns(self, values: Array) -> Array:
        """Reorder [n, row] per-column values to the output's column order."""
        for transform in self.transforms:
            if not transform.values:
                values, _ = transform.apply(values, "F32")
        return values

    def open(self, reader: Readable, *, check: bool = True) -> RowReader:
        """Return a reader of these rows; with `check`, it refuses non-finite values."""
        return RowReader(self, reader, check)


def rows_of(item: InventoryItem) -> Rows:
    """Return the rows of a weight, unchanged."""
    return Rows(item.spec.shape, (WeightSlab(item),))


class RowReader:
    """Reads rows; for use by one thread.

    Args:
        rows: the rows to read.
        reader: reader of the source.
        check: whether to refuse non-finite stored values; decoded ones are always checked.
    """

    def __init__(self, rows: Rows, reader: Readable, check: bool) -> None:
        self._rows, self._reader, self._check = rows, reader, check
        self._slab = -1
        self._values: StoredValues

    def piece(self, chunk: RowChunk, importance: F32 | None = None) -> Piece:
        """Read a chunk, decoded and transformed.

        Raises:
            TensorError: the chunk cannot be read or decoded, or holds NaN or infinity.
        """
        from qwen35.codecs.floats import all_finite, empty

        rows = self._rows
        item = rows.slabs[chunk.slab].item
        if chunk.slab != self._slab:
            self._values = codec_of(item.weight).open(self._reader, item.weight, item.spec)
            self._slab = chunk.slab
        dtype = item.spec.dtype
        count = item.spec.numel if rows.whole else chunk.count * rows.row
        flat = empty(dtype, count)
        if item.replaced:  # the base may have fewer rows
            flat[:] = 0
        else:
            self._values.read_into(0 if rows.whole else chunk.source * rows.row, flat)
        checked = self._check or bool(item.changes) or is_packed(item.weight)
        if checked and not all_finite(flat, dtype):
            raise not_finite(item.weight.name)
        if item.changes:
            flat = _changed(item, flat, 0 if rows.whole else chunk.source * rows.row)
        values = flat if rows.whole else flat.reshape(chunk.count, rows.row)
        for transform in rows.transforms:
            values, dtype = transform.apply(values, dtype)
        return Piece(chunk.slab * rows.count + chunk.first, values, dtype, importance)

    def pieces(self, chunks: Iterable[RowChunk]) -> Iterator[Piece]:
        """Yield chunks one by one."""
        for chunk in chunks:
            yield self.piece(chunk)


def _changed(item: InventoryItem, flat: Array, first: int) -> Array:
    """Return values as adapters change them: computed in float32, rounded once."""
    from qwen35.codecs.floats import all_finite, f32_from, from_f32

    values = f32_from(flat, item.spec.dtype)
    for change in item.changes:
        values = change.apply(values, first)
    rounded = from_f32(values, item.spec.dtype)
    if not all_finite(rounded, item.spec.dtype):
        found = "NaN, infinity or a number too large for its dtype, once the adapter is merged"
        raise TensorError(item.weight.name, found, hint="the adapter is damaged or diverged")
    return rounded
