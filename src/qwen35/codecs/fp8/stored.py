"""Random-access decoding and encoding, by rows of tiles, of FP8 weights in files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qwen35.codecs.codec import Encoding, EncodingRequest, Piece, stacked
from qwen35.codecs.floats import f32_from
from qwen35.codecs.fp8.arrays import decode_rows, refined
from qwen35.codecs.fp8.layout import BLOCK, SCALE
from qwen35.codecs.pieces import Readable, not_finite, whole
from qwen35.codecs.stored_rows import StoredRows
from qwen35.errors import TensorError
from qwen35.tensors import TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.array_types import F32, U8, U16

__all__ = ["EncodingFp8", "StoredFp8", "read_scales"]


def read_scales(reader: Readable, weight: Weight) -> F32:
    """Return the scales of an FP8 weight, [ceil(rows / 128), ceil(columns / 128)].

    Raises:
        TensorError: a scale is not finite or not positive.
    """
    stored_scale = weight.need(SCALE)
    scales = whole(reader, stored_scale)
    if not (np.isfinite(scales).all() and (scales > 0).all()):
        raise TensorError(
            stored_scale.spec.name,
            "holds a scale that is not finite or not positive",
            hint="the checkpoint is damaged: convert it again",
        )
    return scales.reshape(stored_scale.spec.shape)


class StoredFp8(StoredRows):
    """The decoded values of a stored FP8 weight; its scales stay in memory."""

    def __init__(self, reader: Readable, weight: Weight, spec: TensorSpec) -> None:
        super().__init__(weight, spec)
        self._reader = reader
        self._scales = read_scales(reader, weight)

    def decoded(self, first: int, count: int) -> F32:
        """Return rows, decoded."""
        columns = self.spec.shape[1]
        codes = np.empty((count, columns), np.uint8)
        self._reader.read_into(self.weight.main, first * columns, codes.data.cast("B"))
        return self._decoded(codes, first)

    def _decoded(self, codes: U8, begin: int) -> F32:
        """Decode rows starting at row `begin`, which may lie inside a tile."""
        head = min(-begin % BLOCK, len(codes))
        tile = begin // BLOCK
        if not head:
            return decode_rows(codes, self._scales[tile : tile - (-len(codes) // BLOCK)])
        rest = codes[head:]
        parts = [decode_rows(codes[:head], self._scales[tile : tile + 1])]
        if len(rest):
            parts.append(self._decoded(rest, begin + head))
        return np.concatenate(parts)


def _wide(scales: U16) -> F32:
    """Return the scale of each row in each tile, from those of tiles."""
    wide: F32 = np.repeat(f32_from(scales, "BF16"), BLOCK, axis=0)
    return wide


class EncodingFp8(Encoding):
    """Encodes rows of tiles to FP8."""

    def __init__(self, request: EncodingRequest) -> None:
        self._request = request
        self._codes, self._scales = (out.name for out in request.outputs)
        self._columns = stacked(request.spec)[1]

    def add(self, piece: Piece) -> None:
        """Encode and write rows of tiles."""
        request, values = self._request, piece.values
        assert request.kernel is not None  # FP8 has kernels for every device
        codes = np.empty(values.shape, np.uint8)
        scales = np.empty((len(values) // BLOCK, self._columns // BLOCK), np.uint16)
        settings, weights = request.settings, piece.importance
        if not request.kernel(values, piece.dtype, settings, weights, codes, scales):
            raise not_finite(request.source)
        if request.refine is not None:
            rows = f32_from(values, piece.dtype)
            codes = refined(request.refine, piece.first, rows, codes, _wide(scales))
        done = piece.first * self._columns
        request.write(self._codes, done, codes.data.cast("B"))
        request.write(self._scales, done // BLOCK**2 * 2, scales.data.cast("B"))
