"""Weights as they are: read, converted between dtypes, compared value by value."""

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
    """A weight that is not quantized."""

    name = "plain"
    packed = False
    meaning = "copied; if packed (NF4, FP8), decoded to the checkpoint's dtype"
    checks = True  # what is plain is copied, and what is packed is checked as it is decoded
    spared: ClassVar[frozenset[str]] = frozenset()
    described = "unquantized"
    trains = True
    loads = True
    library = "transformers"
    toolkit = "f16"

    @property
    def label(self) -> str:
        """What people call it."""
        return self.name

    @property
    def op(self) -> str:
        """What a plan says is done: a packed weight is decoded."""
        return "decode"

    def open(self, reader: Readable, weight: Weight, spec: TensorSpec) -> StoredValues:
        """Return the values as they are stored; they are not checked."""
        return _Stored(reader, weight, spec.itemsize)

    def layout(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the weight itself."""
        return (spec,)

    def packs(self, role: Role) -> bool:
        """Whether weights of this role may be held so: all."""
        del role
        return True

    def encode(self, order: EncodingRequest) -> Encoding:
        """Return what writes values as they are."""
        return _Written(order)

    def judge(
        self,
        reader: Readable,
        weight: Weight,
        spec: TensorSpec,
        original: Iterator[Piece],
        result: WeightComparison,
    ) -> None:
        """Compare values; they must be equal."""
        judge_values(self.open(reader, weight, spec), spec, original, result)


class _Stored:
    """Elements of a stored tensor."""

    def __init__(self, reader: Readable, weight: Weight, itemsize: int) -> None:
        self._reader, self._main, self._itemsize = reader, weight.main, itemsize

    def read_into(self, first: int, out: Array) -> None:
        """Fill flat `out` with the elements from number `first` on."""
        self._reader.read_into(self._main, first * self._itemsize, out.data.cast("B"))


class _Written(Encoding):
    """Values on their way into a tensor of their own dtype."""

    def __init__(self, order: EncodingRequest) -> None:
        self._order = order
        self._row = stacked(order.spec)[1] * order.spec.itemsize

    def add(self, piece: Piece) -> None:
        """Write a piece."""
        data = piece.values.data.cast("B")
        self._order.write(self._order.outputs[0].name, piece.first * self._row, data)


def judge_values(
    values: StoredValues,
    spec: TensorSpec,
    original: Iterator[Piece],
    result: WeightComparison,
    *,
    report: bool = True,
) -> None:
    """Compare decoded values with the original's; count those that are not equal.

    Args:
        values: of the artifact.
        spec: the weight, decoded.
        original: in pieces.
        result: the sums of differences go there, and with `report` a finding.
        report: whether a difference is a finding.
    """
    import numpy as np

    from qwen35.codecs.floats import empty, f32_from

    wrong, row = 0, stacked(spec)[1]
    for piece in original:
        here = empty(spec.dtype, piece.values.size)
        values.read_into(piece.first * row, here)
        got = f32_from(here, spec.dtype)
        expected = f32_from(piece.values.reshape(-1), piece.dtype)
        wrong += int(np.count_nonzero(got != expected))
        result.add(got, expected)
    if wrong and report:
        result.found("values", f"{wrong} of {spec.numel} values differ")
