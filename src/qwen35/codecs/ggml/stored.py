"""Tensors of GGUF files: decoded at any offset, encoded by whole rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qwen35.array_types import F32, U8, Array
from qwen35.codecs.codec import Encoding, EncodingRequest, Piece
from qwen35.codecs.floats import f32_from
from qwen35.codecs.ggml.grids import grid_of, refined
from qwen35.codecs.ggml.quantizers import encode
from qwen35.codecs.ggml.types import GgmlType
from qwen35.codecs.pieces import Readable
from qwen35.codecs.refining import CodeGrid
from qwen35.errors import TensorError
from qwen35.tensors import Weight

__all__ = ["EncodingGgml", "StoredGgml", "decode"]


def decode(data: U8, kind: GgmlType) -> F32:
    """Decode whole blocks with the `gguf` library to flat float32."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    # Damaged scales overflow here; readers report non-finite values themselves.
    with np.errstate(over="ignore", invalid="ignore"):
        if kind.name in _OWN:
            return _OWN[kind.name](data)
        values: F32 = dequantize(data, GGMLQuantizationType(kind.code))
    return values


def _decode_q2_0(data: U8) -> F32:
    """Decode blocks of a float16 scale and 64 codes: 0 to 3 is -1 to 2 times the scale.

    Source: `dequantize_row_q2_0` of llama.cpp's ``ggml/src/ggml-quants.c`` at 0c1e5709; `gguf` 0.19
    does not have the type.
    """
    blocks = data.reshape(-1, 18)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
    codes = blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & np.uint8(3)
    values: F32 = (codes.reshape(-1, 64).astype(np.float32) - 1) * scales
    return values.reshape(-1)


def _decode_q1_0(data: U8) -> F32:
    """Decode blocks of a float16 scale and 128 signs, 1 for the scale, 0 for its opposite.

    Source: `dequantize_row_q1_0` there; `gguf` 0.19 has the type, but does not decode it.
    """
    blocks = data.reshape(-1, 18)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
    positive = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").astype(bool)
    values: F32 = np.where(positive, scales, -scales)
    return values.reshape(-1)


def _decode_q8_k(data: U8) -> F32:
    """Decode blocks of a float32 scale, 256 signed codes and sums of these.

    Source: `dequantize_row_q8_K` there.
    """
    blocks = data.reshape(-1, 292)
    scales = blocks[:, :4].copy().view("<f4")
    codes = blocks[:, 4:260].copy().view(np.int8)
    values: F32 = codes.astype(np.float32) * scales
    return values.reshape(-1)


def _decode_numbers(dtype: str) -> Callable[[U8], F32]:
    """Return a decoder of plain numbers, which are rounded to float32."""
    return lambda data: np.ascontiguousarray(data).view(dtype).astype(np.float32)


_OWN: dict[str, Callable[[U8], F32]] = {
    "q1_0": _decode_q1_0,
    "q2_0": _decode_q2_0,
    "q8_K": _decode_q8_k,
    **{f"i{8 * size}": _decode_numbers(f"<i{size}") for size in (1, 2, 4, 8)},
    "f64": _decode_numbers("<f8"),
}
"""Types that the `gguf` library does not decode."""

_UNREADABLE = ("q8_1",)
"""Types of activations in memory: llama.cpp decodes no tensor of them."""


class StoredGgml:
    """The values of a tensor stored in a ggml type, decoded to float32."""

    def __init__(self, reader: Readable, weight: Weight, kind: GgmlType) -> None:
        self._reader, self._main, self._kind = reader, weight.main, kind
        if kind.name in _UNREADABLE:
            subject = f"{self._main.file}: {self._main.spec.name}"
            found = f"stored as {kind.name}, which only llama.cpp's memory holds"
            raise TensorError(subject, found, expected="a type of files")

    def read_into(self, first: int, out: Array) -> None:
        """Fill flat `out` with decoded elements, starting at index `first`."""
        # Only whole blocks can be decoded: read those that cover the range, then cut.
        block = self._kind.block
        begin, end = first // block, -(-(first + out.size) // block)
        data = np.empty((end - begin) * self._kind.nbytes, np.uint8)
        self._reader.read_into(self._main, begin * self._kind.nbytes, data.data)
        skipped = first - begin * block
        out[:] = decode(data, self._kind).reshape(-1)[skipped : skipped + out.size]
        self.refuse_infinite(out)

    def grid(self, first: int, shape: tuple[int, int]) -> CodeGrid:
        """Return what the codes of rows stand for, in a type whose codes can be refined.

        Args:
            first: the number of the first row.
            shape: rows and columns.
        """
        data = np.empty(self._kind.size(shape), np.uint8)
        self._reader.read_into(self._main, self._kind.size((first, shape[1])), data.data)
        return grid_of(data, self._kind.name, shape)

    def refuse_infinite(self, values: Array) -> None:
        """Raise a `TensorError` if `values` hold NaN or infinity."""
        if not np.isfinite(values).all():
            subject = f"{self._main.file}: {self._main.spec.name}"
            raise TensorError(subject, "a scale or weight is not finite")


class EncodingGgml(Encoding):
    """Encodes rows to a ggml type."""

    def __init__(self, request: EncodingRequest, kind: GgmlType) -> None:
        self._request, self._kind = request, kind

    def add(self, piece: Piece) -> None:
        """Encode and write rows."""
        name, row = self._request.outputs[0].name, piece.values.shape[1]
        rows = np.ascontiguousarray(f32_from(piece.values, piece.dtype))
        data = encode(name, rows, self._kind.name, piece.importance, self._request.encoder)
        if self._request.refine is not None:
            data = refined(self._request.refine, piece.first, rows, data, self._kind.name)
        self._request.write(name, self._kind.size((piece.first, row)), data)
