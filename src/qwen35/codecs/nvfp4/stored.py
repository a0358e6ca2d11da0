"""Random-access decoding and row-by-row encoding of NVFP4 weights in files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qwen35.codecs.codec import Encoding, EncodingRequest, Piece
from qwen35.codecs.floats import f32_from
from qwen35.codecs.fp8.arrays import e4m3_values
from qwen35.codecs.nvfp4.arrays import decode_rows, encode_rows, refined, whole_scale
from qwen35.codecs.nvfp4.layout import BLOCK, RANGE, Nvfp4Layout
from qwen35.codecs.pieces import Readable, positive
from qwen35.codecs.stored_rows import StoredRows
from qwen35.errors import TensorError
from qwen35.tensors import TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.array_types import F32, U8

__all__ = ["EncodingNvfp4", "StoredNvfp4", "read_whole"]


class StoredNvfp4(StoredRows):
    """The values of a stored NVFP4 weight.

    Raises:
        TensorError: the scale of the whole is not a positive number.
    """

    def __init__(
        self, reader: Readable, weight: Weight, spec: TensorSpec, layout: Nvfp4Layout
    ) -> None:
        super().__init__(weight, spec)
        self._reader, self._layout = reader, layout
        self.whole = read_whole(reader, weight)

    def decoded(self, first: int, count: int) -> F32:
        """Return rows, decoded."""
        codes, scales = self.read_rows(first, count)
        return decode_rows(codes, self.units(scales))

    def read_rows(self, first: int, count: int) -> tuple[U8, U8]:
        """Return the codes [count, columns / 2] and the codes of scales [count, columns / 16].

        Raises:
            TensorError: a scale is NaN or negative.
        """
        columns = self.spec.shape[1]
        found = []
        for part, size in zip(self.weight.parts, (columns // 2, columns // BLOCK), strict=False):
            rows = np.empty((count, size), np.uint8)
            self._reader.read_into(part, first * size, rows.data.cast("B"))
            found.append(rows)
        if (found[1] >= 127).any():
            part = self.weight.parts[1]
            hint = "the checkpoint is damaged: convert it again"
            raise TensorError(part.spec.name, "holds a scale that is negative or NaN", hint=hint)
        return found[0], found[1]

    def units(self, scales: U8) -> F32:
        """Return the float32 size of a unit in each block, from the codes of scales."""
        return _units(scales, self.whole, self._layout)

    @property
    def largest(self) -> float:
        """The largest magnitude that the scale of the whole was made for."""
        return float(RANGE / self.whole if self._layout.divides else RANGE * self.whole)


def _units(scales: U8, whole: np.float32, layout: Nvfp4Layout) -> F32:
    values = e4m3_values()[scales]
    with np.errstate(over="ignore"):
        units: F32 = values / whole if layout.divides else values * whole
    return units


def read_whole(reader: Readable, weight: Weight) -> np.float32:
    """Return the scale of the whole.

    Raises:
        TensorError: it is not a positive number.
    """
    return np.float32(positive(reader, weight.parts[2]))


class EncodingNvfp4(Encoding):
    """Encodes rows to NVFP4; the scale of the whole is written with the first row."""

    def __init__(self, request: EncodingRequest, layout: Nvfp4Layout) -> None:
        assert request.largest is not None  # the codec surveys
        self._request, self._layout = request, layout
        self._largest = [float(request.largest[0])]
        if len(request.outputs) > 3:
            assert request.input_largest is not None  # planning refuses to go without
            self._largest.append(request.input_largest)
        self._whole = whole_scale(self._largest[0])

    def add(self, piece: Piece) -> None:
        """Encode and write rows."""
        request = self._request
        codes, scales = request.outputs[:2]
        search = request.settings is None or request.settings.mode == "search"
        found = encode_rows(piece.values, piece.dtype, self._whole, piece.importance, search=search)
        if request.refine is not None:
            units = _units(found[1], self._stored(self._largest[0]), self._layout)
            rows = f32_from(piece.values, piece.dtype)
            found = refined(request.refine, piece.first, rows, found[0], units), found[1]
        for out, data in zip((codes, scales), found, strict=True):
            request.write(out.name, piece.first * out.shape[1], data.data.cast("B"))
        if piece.first == 0:
            for out, largest in zip(request.outputs[2:], self._largest, strict=True):
                data = np.array(self._stored(largest), np.float32)
                request.write(out.name, 0, data.data.cast("B"))

    def _stored(self, largest: float) -> np.float32:
        """Return what the layout stores of a largest magnitude m: 2688 / m, or m / 2688."""
        whole_number = whole_scale(largest)
        if self._layout.divides or whole_number == 1:  # too small for its inverse
            return whole_number
        return np.float32(np.float32(largest) / np.float32(RANGE))
