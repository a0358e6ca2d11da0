"""Weights whose rows are stored in another order, or in several tensors, and as other numbers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from qwen35.codecs.codec import Codec, Encoding, EncodingRequest, Piece, StoredValues
from qwen35.errors import TensorError
from qwen35.record_class import record
from qwen35.tensors import TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.array_types import F32, Array
    from qwen35.codecs.comparison import WeightComparison
    from qwen35.codecs.input_quantizers import InputQuantizer
    from qwen35.codecs.pieces import Readable

__all__ = ["Arranged", "ArrangedWeight", "RowRun", "RowSource"]


class RowRun(NamedTuple):
    """Rows of a weight that follow each other in a stored tensor.

    Args:
        source: index of the tensor.
        first: first row in it.
        length: number of rows.
    """

    source: int
    first: int
    length: int


class RowSource(Protocol):
    """A stored tensor that holds rows of a weight."""

    @property
    def weight(self) -> Weight:
        """The tensor, in its own codec, with its own name."""

    def runs(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield (row in the tensor, number of rows) for rows as the weight has them, in order."""

    def restored(self, values: F32) -> F32:
        """Return [rows, row] decoded values as the weight has them."""

    def columns(self, values: F32) -> F32:
        """Return [rows, row] values of the tensor's columns in the weight's order of columns."""


@record
class ArrangedWeight(Weight):
    """A weight that other tensors hold.

    Args:
        sources: these tensors.
        order: where its rows are, in its order; each run is as the `sources` would have it, had
            they its order.
    """

    sources: tuple[RowSource, ...]
    order: tuple[RowRun, ...]

    def cut(self, name: str, first: int, count: int) -> ArrangedWeight:
        """Return `count` rows as a weight of their own; they lie in one run."""
        done = 0
        for run in self.order:
            if done <= first and first + count <= done + run.length:
                held = self.sources[run.source]
                order = (RowRun(0, run.first + first - done, count),)
                parts = held.weight.parts
                return ArrangedWeight(name, held.weight.storage, parts, (held,), order)
            done += run.length
        raise AssertionError(name)


class Arranged(Codec):
    """Decodes arranged weights; nothing is written so.

    Args:
        stored: the codec of the tensors.
    """

    independent = False

    def __init__(self, stored: Codec) -> None:
        self.stored = stored
        self.name = stored.name  # type: ignore[misc]  # one class for the tensors of any codec

    @property
    def label(self) -> str:
        """The name of the tensors' codec."""
        return self.stored.label

    def numel(self, weight: Weight) -> int:
        """Return the number of weights, of all tensors."""
        assert isinstance(weight, ArrangedWeight)
        row = weight.main.spec.shape[-1]
        return sum(run.length for run in weight.order) * row

    def mismatch(self, weight: Weight, expected: TensorSpec) -> TensorError | None:
        """Return None: whatever arranges rows knows their shape."""
        del weight, expected
        return None

    def open(self, reader: Readable, weight: Weight, spec: TensorSpec) -> StoredValues:
        """Return a reader that decodes rows, and restores their order and values."""
        assert isinstance(weight, ArrangedWeight)
        return _RestoredValues(reader, weight, spec)

    def input_quantizer(self, reader: Readable, weight: Weight) -> InputQuantizer:
        """Return that of the tensors' codec, for inputs in the weight's order of columns."""
        import numpy as np

        assert isinstance(weight, ArrangedWeight)
        source = weight.sources[0]
        quantizer = self.stored.input_quantizer(reader, source.weight)
        numbers = np.arange(weight.main.spec.shape[-1])
        # Column i of the weight is column `back[i]` of the tensor: exact in float32.
        back = source.columns(numbers.astype(np.float32)[None])[0].astype(np.int64)
        if np.array_equal(back, numbers):
            return quantizer
        there = np.argsort(back)
        return lambda x: quantizer(x[..., there])[..., back]

    def layout(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return nothing: no weight is written so."""
        raise AssertionError(spec.name)

    def encode(self, request: EncodingRequest) -> Encoding:
        """Return nothing: no weight is written so."""
        raise AssertionError(request.source)

    def judge(
        self,
        reader: Readable,
        weight: Weight,
        spec: TensorSpec,
        original: Iterator[Piece],
        result: WeightComparison,
    ) -> None:
        """Return nothing: no artifact is stored so."""
        del reader, spec, original, result
        raise AssertionError(weight.name)


class _RestoredValues:
    """The values of an arranged weight."""

    def __init__(self, reader: Readable, weight: ArrangedWeight, spec: TensorSpec) -> None:
        from qwen35.codecs.registry import CODECS  # late: the registry imports this module

        self._weight, self._spec = weight, spec
        self._row = spec.shape[-1] if spec.shape else 1
        self._begins = list(accumulate((run.length for run in weight.order), initial=0))
        self._opened: list[Any] = []
        for source in weight.sources:
            held = source.weight
            decoded = TensorSpec(held.name, "F32", held.main.spec.shape)
            self._opened.append(CODECS[held.storage].open(reader, held, decoded))

    def read_into(self, first: int, out: Array) -> None:
        """Fill flat `out` with whole rows, starting at element `first`."""
        from qwen35.codecs.floats import from_f32

        begin, done = first // self._row, 0
        rows = out.size // self._row
        for source, row, count in self._within(begin, rows):
            values = self._decoded(source, row, count)
            part = out[done * self._row : (done + count) * self._row]
            part[:] = from_f32(values.reshape(-1), self._spec.dtype)
            done += count

    def _within(self, first: int, count: int) -> Iterator[RowRun]:
        """Yield the runs of some rows."""
        at, end = bisect_right(self._begins, first) - 1, first + count
        while first < end:
            source, row, length = self._weight.order[at]
            skipped = first - self._begins[at]
            taken = min(end - first, length - skipped)
            yield RowRun(source, row + skipped, taken)
            first, at = first + taken, at + 1

    def _decoded(self, source: int, first: int, count: int) -> F32:
        import numpy as np

        values = np.empty((count, self._row), np.float32)
        held, done = self._weight.sources[source], 0
        for row, length in held.runs(first, count):
            self._opened[source].read_into(
                row * self._row, values[done : done + length].reshape(-1)
            )
            done += length
        return held.restored(values)
