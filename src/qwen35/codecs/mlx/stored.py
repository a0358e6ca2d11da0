"""Random-access decoding and row-by-row encoding of MLX's weights in files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qwen35.codecs.codec import Encoding, EncodingRequest, Piece
from qwen35.codecs.floats import all_finite, empty, f32_from
from qwen35.codecs.mlx.arrays import MlxRows, packed, quantize_rows, rounded, units_of, unpacked
from qwen35.codecs.mlx.layout import MlxFormat
from qwen35.codecs.pieces import Readable
from qwen35.codecs.stored_rows import StoredRows
from qwen35.errors import TensorError
from qwen35.tensors import StoredTensor, TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.array_types import F32, U8, Array

__all__ = ["EncodingMlx", "StoredMlx"]

_NAN = {"nvfp4": 127, "mxfp4": 255, "mxfp8": 255}
"""Codes of scales from here on are NaN; for E4M3, also negative."""

_LARGEST = 6 * 448
"""The largest magnitude that NVFP4 holds without a scale of the whole, which MLX does not write."""


class StoredMlx(StoredRows):
    """The values of a stored weight.

    Args:
        reader: reads the artifact.
        weight: the stored weight.
        spec: the decoded weight.
        kind: its format.
    """

    def __init__(self, reader: Readable, weight: Weight, spec: TensorSpec, kind: MlxFormat) -> None:
        super().__init__(weight, spec)
        self._reader, self._kind = reader, kind

    def decoded(self, first: int, count: int) -> F32:
        """Return rows, decoded."""
        return self.rows(first, count).values

    def rows(self, first: int, count: int) -> MlxRows:
        """Return rows as they are stored.

        Raises:
            TensorError: a scale is NaN, or negative where that is no number of its format.
        """
        kind, parts = self._kind, self.weight.parts
        words = self._bytes(parts[0], first, count)
        codes = unpacked(words, kind.bits)
        if kind.affine:
            scales, biases = (self._floats(part, first, count) for part in parts[1:])
            return MlxRows(kind, codes, scales, biases)
        stored = self._bytes(parts[1], first, count)
        if (stored >= _NAN[kind.mode]).any():
            hint = "the checkpoint is damaged: convert it again"
            raise TensorError(parts[1].spec.name, "holds a scale that is no number", hint=hint)
        units = units_of(kind, stored)
        return MlxRows(kind, codes, units, np.zeros_like(units), stored)

    def _bytes(self, part: StoredTensor, first: int, count: int) -> U8:
        size = part.spec.shape[1] * part.spec.itemsize
        found = np.empty((count, size), np.uint8)
        self._reader.read_into(part, first * size, found.data.cast("B"))
        return found

    def _floats(self, part: StoredTensor, first: int, count: int) -> F32:
        spec, groups = part.spec, part.spec.shape[1]
        found = empty(spec.dtype, count * groups)
        self._reader.read_into(part, first * groups * spec.itemsize, found.data.cast("B"))
        return f32_from(found, spec.dtype).reshape(count, groups)


class EncodingMlx(Encoding):
    """Encodes rows as ``mx.quantize`` does."""

    def __init__(self, request: EncodingRequest, kind: MlxFormat) -> None:
        self._request, self._kind = request, kind

    def add(self, piece: Piece) -> None:
        """Encode and write rows.

        Raises:
            TensorError: values are too large for the format.
        """
        rows = quantize_rows(piece.values, piece.dtype, self._kind)
        self._check(rows, piece)
        outputs = self._request.outputs
        found: list[Array] = [packed(rows.codes, self._kind.bits)]
        if rows.stored is None:
            found += [rounded(part, outputs[1].dtype) for part in (rows.scales, rows.biases)]
            if not all(all_finite(part, outputs[1].dtype) for part in found[1:]):
                raise self._too_large()
        else:
            found.append(rows.stored)
        for out, data in zip(outputs, found, strict=True):
            offset = piece.first * out.shape[1] * out.itemsize
            self._request.write(out.name, offset, np.ascontiguousarray(data).data.cast("B"))

    def _check(self, rows: MlxRows, piece: Piece) -> None:
        largest = np.abs(f32_from(piece.values, piece.dtype)).max(initial=0)
        limit = _LARGEST if self._kind.mode == "nvfp4" else np.inf
        if largest > limit or not all_finite(rows.values, "F32"):
            raise self._too_large()

    def _too_large(self) -> TensorError:
        return TensorError(
            self._request.source,
            f"holds values too large for {self._kind.name}",
            hint="keep it unpacked: --keep with its role (`qwen35 plan --roles`)",
        )
