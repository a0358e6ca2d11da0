"""Unpacked weights that MLX holds in another form: norms and the patch embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from qwen35.codecs.codec import Encoding, EncodingRequest, Piece, StoredValues, stacked
from qwen35.codecs.comparison import WeightComparison
from qwen35.codecs.floats import all_finite, empty, f32_from, from_f32
from qwen35.codecs.pieces import Readable, not_finite
from qwen35.tensors import TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.array_types import F32, Array

__all__ = [
    "EncodingNorm",
    "EncodingPatches",
    "StoredGateNorm",
    "StoredNorm",
    "StoredPatches",
    "judge_gate_norm",
    "judge_norm",
]

_ONE = np.float32(1)


def _stored_one(values: Array, dtype: str) -> Array:
    """Return ``1 + w`` as it is stored."""
    with np.errstate(over="ignore"):
        return from_f32(f32_from(values, dtype) + _ONE, dtype)


class StoredNorm:
    """The values of a norm, from ``1 + w``."""

    def __init__(self, reader: Readable, weight: Weight, spec: TensorSpec) -> None:
        self._reader, self._main, self._spec = reader, weight.main, spec

    def read_into(self, first: int, out: Array) -> None:
        """Fill flat `out` with elements, starting at index `first`."""
        values = self.raw(first, out.size)
        if not all_finite(values, "F32"):
            raise not_finite(self._spec.name)
        out[:] = from_f32(values - _ONE, self._spec.dtype)

    def raw(self, first: int, count: int) -> F32:
        """Return elements as they are stored."""
        found = empty(self._spec.dtype, count)
        self._reader.read_into(self._main, first * self._spec.itemsize, found.data.cast("B"))
        return f32_from(found, self._spec.dtype)


class EncodingNorm(Encoding):
    """Writes ``1 + w``."""

    def __init__(self, request: EncodingRequest) -> None:
        self._request = request
        self._row_bytes = stacked(request.spec)[1] * request.spec.itemsize

    def add(self, piece: Piece) -> None:
        """Write a piece."""
        data = _stored_one(piece.values.reshape(-1), piece.dtype)
        name = self._request.outputs[0].name
        self._request.write(name, piece.first * self._row_bytes, data.data.cast("B"))


def judge_norm(
    reader: Readable,
    weight: Weight,
    spec: TensorSpec,
    original: Iterator[Piece],
    result: WeightComparison,
) -> None:
    """Compare a norm with ``1 + w``; arguments as for `qwen35.codecs.codec.Codec.judge`."""
    values, row = StoredNorm(reader, weight, spec), stacked(spec)[1]
    wrong = lost = 0
    for piece in original:
        flat = piece.values.reshape(-1)
        stored = values.raw(piece.first * row, flat.size)
        exact = f32_from(flat, piece.dtype)
        differ = stored != f32_from(_stored_one(flat, piece.dtype), piece.dtype)
        wrong += int(np.count_nonzero(differ))
        lost += int(np.count_nonzero(differ & (stored == exact)))
        result.add(stored - _ONE, exact)
    if wrong:
        message = f"{wrong} of {spec.numel} values differ"
        without = "; they lack the 1 that MLX adds to norms" if 2 * lost > wrong else ""
        result.found("values", f"{message}{without}")


class StoredGateNorm:
    """The values of a norm that is stored as it is."""

    def __init__(self, reader: Readable, weight: Weight, spec: TensorSpec) -> None:
        self._reader, self._main, self._spec = reader, weight.main, spec

    def read_into(self, first: int, out: Array) -> None:
        """Fill flat `out` with elements, starting at index `first`."""
        self._reader.read_into(self._main, first * self._spec.itemsize, out.data.cast("B"))
        if not all_finite(out, self._spec.dtype):
            raise not_finite(self._spec.name)


def judge_gate_norm(
    values: StoredValues, spec: TensorSpec, original: Iterator[Piece], result: WeightComparison
) -> None:
    """Compare a norm with the original, rounded to the dtype in which it is stored."""
    wrong, row = 0, stacked(spec)[1]
    for piece in original:
        found = empty(spec.dtype, piece.values.size)
        values.read_into(piece.first * row, found)
        exact = f32_from(piece.values.reshape(-1), piece.dtype)
        with np.errstate(over="ignore"):
            expected = from_f32(exact, spec.dtype)
        wrong += int(np.count_nonzero(found != expected))
        result.add(f32_from(found, spec.dtype), exact)
    if wrong:
        result.found("values", f"{wrong} of {spec.numel} values differ")


def _places(spec: TensorSpec) -> tuple[int, ...]:
    """Return (colours, frames, height, width)."""
    return spec.shape[1:]


class StoredPatches:
    """The values of a patch embedding, in the order of transformers."""

    def __init__(self, reader: Readable, weight: Weight, spec: TensorSpec) -> None:
        self._reader, self._main, self._spec = reader, weight.main, spec

    def read_into(self, first: int, out: Array) -> None:
        """Fill flat `out` with elements, starting at index `first`."""
        spec, (colours, *others) = self._spec, _places(self._spec)
        size = spec.numel // spec.shape[0]
        begin, end = first // size, -(-(first + out.size) // size)
        found = empty(spec.dtype, (end - begin) * size)
        self._reader.read_into(self._main, begin * size * spec.itemsize, found.data.cast("B"))
        if not all_finite(found, spec.dtype):
            raise not_finite(spec.name)
        kernels = found.reshape(end - begin, *others, colours).transpose(0, 4, 1, 2, 3)
        skipped = first - begin * size
        out[:] = kernels.reshape(-1)[skipped : skipped + out.size]


class EncodingPatches(Encoding):
    """Writes a patch embedding, colours last."""

    def __init__(self, request: EncodingRequest) -> None:
        self._request = request
        self._row_bytes = stacked(request.spec)[1] * request.spec.itemsize

    def add(self, piece: Piece) -> None:
        """Write the kernels of some outputs."""
        kernels = piece.values.reshape(-1, *_places(self._request.spec)).transpose(0, 2, 3, 4, 1)
        data = np.ascontiguousarray(kernels)
        name = self._request.outputs[0].name
        self._request.write(name, piece.first * self._row_bytes, data.data.cast("B"))
