"""What an adapter does to the values of one weight, computed for any run of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Protocol

from qwen35.codecs.pieces import PIECE, Readable
from qwen35.tensors import StoredTensor, TensorSpec, Weight
from qwen35.threads import default_threads

if TYPE_CHECKING:
    from qwen35.array_types import F32
    from qwen35.codecs.roundtrip import RoundTrip

__all__ = [
    "LowRank",
    "ReplacedRows",
    "Replacement",
    "RoundedValues",
    "ShiftedChange",
    "StackedLowRank",
    "WeightChange",
]


class WeightChange(Protocol):
    """A change of a weight's values."""

    def apply(self, values: F32, first: int) -> F32:
        """Return the changed values of whole rows.

        Args:
            values: flat; may be changed in place.
            first: index of the first element within the weight.
        """


@dataclass(frozen=True)
class Replacement:
    """Values that an adapter holds whole (``modules_to_save``).

    Args:
        reader: reads the adapter.
        stored: the values.
    """

    reader: Readable
    stored: StoredTensor

    def apply(self, values: F32, first: int) -> F32:
        """Return the adapter's values."""
        return _floats(self.reader, self.stored, first, values.size)


@dataclass(frozen=True)
class ReplacedRows:
    """Some rows of a weight, held whole (``trainable_token_indices``).

    Args:
        reader: reads the adapter.
        stored: [rows, columns].
        rows: their indices in the weight, in stored order.
    """

    reader: Readable
    stored: StoredTensor
    rows: tuple[int, ...]

    def apply(self, values: F32, first: int) -> F32:
        """Return the values with the adapter's rows among them."""
        columns = self.stored.spec.shape[1]
        matrix = values.reshape(-1, columns)
        begin = first // columns
        for place, row in enumerate(self.rows):
            if begin <= row < begin + len(matrix):
                stored = _floats(self.reader, self.stored, place * columns, columns)
                matrix[row - begin] = stored
        return values


@dataclass(frozen=True)
class RoundedValues:
    """The base's values as a codec holds them, decoded.

    Args:
        reader: reads the base; None if only its headers are here.
        weight: the weight, not quantized.
        spec: of the weight.
        codec: the codec's name.
        dtype: what packed weights are decoded to.
    """

    reader: Readable | None
    weight: Weight
    spec: TensorSpec
    codec: str
    dtype: str

    def apply(self, values: F32, first: int) -> F32:
        """Return the decoded values."""
        from qwen35.codecs.codec import Piece
        from qwen35.codecs.floats import f32_from, from_f32

        columns = self.spec.shape[-1]
        piece = Piece(first // columns, values.reshape(-1, columns), "F32")
        with _ENCODING:
            trip = _encoded(self)
        decoded = from_f32(trip.decoded(piece).reshape(-1), self.dtype)
        return f32_from(decoded, self.dtype)


_ENCODING = Lock()


@lru_cache(maxsize=default_threads())  # one weight for each thread: a scale depends on all of it
def _encoded(change: RoundedValues) -> RoundTrip:
    """Return a weight in its codec."""
    from qwen35.codecs.codec import Piece
    from qwen35.codecs.devices import kernels_for
    from qwen35.codecs.floats import empty
    from qwen35.codecs.registry import CODECS, codec_of
    from qwen35.codecs.roundtrip import RoundTrip

    assert change.reader is not None  # values are read of local files alone
    [kernels] = kernels_for("cpu")
    codec, spec = CODECS[change.codec], change.spec
    trip = RoundTrip(codec, spec, kernel=kernels.of(codec.name))
    columns = spec.shape[-1]
    rows, grain = spec.numel // columns, codec.grain(spec)
    step = max(1, PIECE // columns // grain) * grain
    stored = codec_of(change.weight).open(change.reader, change.weight, spec)
    for row in range(0, rows, step):
        count = min(step, rows - row)
        flat = empty(spec.dtype, count * columns)
        stored.read_into(row * columns, flat)
        trip.add(Piece(row, flat.reshape(count, columns), spec.dtype))
    trip.finish()
    return trip


@dataclass(frozen=True)
class ShiftedChange:
    """The part of a stack's change that concerns one of its matrices.

    Args:
        whole: the change of the stack.
        offset: index of the matrix's first element within the stack.
    """

    whole: WeightChange
    offset: int

    def apply(self, values: F32, first: int) -> F32:
        """Return the changed values."""
        return self.whole.apply(values, self.offset + first)


@dataclass(frozen=True)
class StackedLowRank:
    """A product of two matrices for each expert, added to a stack of [experts, rows, columns].

    Args:
        reader: reads the adapter.
        left: [rows, rank * experts]: a row of it has the experts side by side for each rank, or, if
            `grouped`, the ranks for each expert.
        right: [experts * rank, columns]: the experts one after the other.
        experts: their number.
        scale: factor of the products.
        grouped: the order of `left`.
    """

    reader: Readable
    left: StoredTensor
    right: StoredTensor
    experts: int
    scale: float
    grouped: bool = False

    def apply(self, values: F32, first: int) -> F32:
        """Return the values with the products added."""
        import numpy as np

        from qwen35.checkpoint.low_rank import add_product

        columns, rows = self.right.spec.shape[1], self.left.spec.shape[0]
        rank = self.left.spec.shape[1] // self.experts
        matrix, done = values.reshape(-1, columns), 0
        while done < len(matrix):
            expert, row = divmod(first // columns + done, rows)
            count = min(rows - row, len(matrix) - done)
            begin = expert * rank * columns
            right = _floats(self.reader, self.right, begin, rank * columns).reshape(rank, columns)
            left = _by_expert(self)[expert, row : row + count]
            add_product(matrix[done : done + count], left, right, np.float32(self.scale))
            done += count
        return values


@lru_cache(maxsize=2)  # every expert has a value in each run of `experts` values
def _by_expert(change: StackedLowRank) -> F32:
    """Return the left matrix as [experts, rows, rank]."""
    import numpy as np

    rows, width = change.left.spec.shape
    values = _floats(change.reader, change.left, 0, rows * width)
    rank = width // change.experts
    if change.grouped:
        values = values.reshape(rows, change.experts, rank).transpose(1, 0, 2)
    else:
        values = values.reshape(rows, rank, change.experts).transpose(2, 0, 1)
    return np.ascontiguousarray(values)


@dataclass(frozen=True)
class LowRank:
    """A product of two matrices, added to a weight of [rows, columns].

    Args:
        reader: reads the adapter.
        left: [rows, rank]; [rank, rows] if `swapped`.
        right: [rank, columns]; [columns, rank] if `swapped`.
        scale: factor of the product.
        swapped: whether both are stored with rows and columns swapped, as for embeddings.
        lengths: DoRA: the Euclidean length of each row afterwards; None to leave them.
    """

    reader: Readable
    left: StoredTensor
    right: StoredTensor
    scale: float
    swapped: bool = False
    lengths: StoredTensor | None = None

    def apply(self, values: F32, first: int) -> F32:
        """Return the values with the product added."""
        import numpy as np

        from qwen35.checkpoint.low_rank import add_product, scale_rows

        right = self._right()
        matrix = values.reshape(-1, right.shape[1])
        row = first // right.shape[1]
        left = self._left(row, len(matrix))
        add_product(matrix, left, right, np.float32(self.scale))
        if self.lengths is not None:
            scale_rows(matrix, _floats(self.reader, self.lengths, row, len(matrix)))
        return values

    def _right(self) -> F32:
        import numpy as np

        shape = self.right.spec.shape
        matrix = _floats(self.reader, self.right, 0, self.right.spec.numel).reshape(shape)
        return np.ascontiguousarray(matrix.T) if self.swapped else matrix

    def _left(self, row: int, count: int) -> F32:
        """Return `count` rows of the left matrix."""
        import numpy as np

        if not self.swapped:
            rank = self.left.spec.shape[1]
            return _floats(self.reader, self.left, row * rank, count * rank).reshape(count, rank)
        rank, rows = self.left.spec.shape
        columns = [_floats(self.reader, self.left, k * rows + row, count) for k in range(rank)]
        return np.ascontiguousarray(np.stack(columns, 1))


def _floats(reader: Readable, stored: StoredTensor, first: int, count: int) -> F32:
    """Read elements of a stored tensor as float32."""
    from qwen35.codecs.floats import empty, f32_from

    spec = stored.spec
    array = empty(spec.dtype, count)
    reader.read_into(stored, first * spec.itemsize, array.data.cast("B"))
    return f32_from(array, spec.dtype)
