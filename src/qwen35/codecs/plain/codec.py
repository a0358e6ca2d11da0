"""Unquantized weights: read, written and compared value by value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from qwen35.codecs.codec import Codec, Encoding, EncodingRequest, Piece, StoredValues, stacked
from qwen35.tensors import TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.array_types import Array
    from qwen35.codecs.comparison import WeightComparison
    from qwen35.codecs.pieces import Readable
    from qwen35.model.roles import Role

__all__ = ["Plain", "judge_values"]


class Plain(Codec):
    """An unquantized weight."""

    name = "plain"
    packed = False
    meaning = "copied; if packed, decoded to the checkpoint's dtype"
    checks = True  # plain sources are copied as they are; decoding checks packed ones
    spared: ClassVar[frozenset[str]] = frozenset()
    described = "unquantized"
    trains = True
    loads = True
    library = "transformers"
    toolkit = "f16"

    @property
    def label(self) -> str:
        """The display name."""
        return self.name

    @property
    def op(self) -> str:
        """The operation shown in a plan: a packed weight is decoded."""
        return "decode"

    def open(self, reader: Readable, weight: Weight, spec: TensorSpec) -> StoredValues:
        """Open the stored values, unchecked."""
        return _Stored(reader, weight, spec.itemsize)

    def layout(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the weight itself."""
        return (spec,)

    def packs(self, role: Role) -> bool:
        """Return True: every role may stay plain."""
        del role
        return True

    def encode(self, request: EncodingRequest) -> Encoding:
        """Start writing values unchanged."""
        return _PlainEncoding(request)

    def judge(
        self,
        reader: Readable,
        weight: Weight,
        spec: TensorSpec,
        original: Iterator[Piece],
        result: WeightComparison,
    ) -> None:
        """Compare values, which must be equal."""
        judge_values(self.open(reader, weight, spec), spec, original, result)


class _Stored:
    """The elements of a stored tensor."""

    def __init__(self, reader: Readable, weight: Weight, itemsize: int) -> None:
        self._reader, self._main, self._itemsize = reader, weight.main, itemsize

    def read_into(self, first: int, out: Array) -> None:
        """Fill flat `out` with elements, starting at index `first`."""
        self._reader.read_into(self._main, first * self._itemsize, out.data.cast("B"))


class _PlainEncoding(Encoding):
    """Writes values to a tensor of the same dtype."""

    def __init__(self, request: EncodingRequest) -> None:
        self._request = request
        self._row_bytes = stacked(request.spec)[1] * request.spec.itemsize

    def add(self, piece: Piece) -> None:
        """Write a piece."""
        data = piece.values.data.cast("B")
        self._request.write(self._request.outputs[0].name, piece.first * self._row_bytes, data)


def judge_values(
    values: StoredValues,
    spec: TensorSpec,
    original: Iterator[Piece],
    result: WeightComparison,
    *,
    report: bool = True,
) -> None:
    """Compare decoded values with the original's; count those that differ.

    Args:
        values: the values in the artifact.
        spec: the decoded weight.
        original: the original in pieces.
        result: receives the sums of differences and, with `report`, a finding.
        report: whether a difference is a finding.
    """
    import numpy as np

    from qwen35.codecs.floats import empty, f32_from

    wrong, row = 0, stacked(spec)[1]
    for piece in original:
        buffer = empty(spec.dtype, piece.values.size)
        values.read_into(piece.first * row, buffer)
        got = f32_from(buffer, spec.dtype)
        expected = f32_from(piece.values.reshape(-1), piece.dtype)
        wrong += int(np.count_nonzero(got != expected))
        result.add(got, expected)
    if wrong and report:
        result.found("values", f"{wrong} of {spec.numel} values differ")
