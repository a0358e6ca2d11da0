"""Tensors of GGUF files: decoded wherever one looks, and written row by row."""

from __future__ import annotations

import numpy as np

from qwen35.array_types import F32, U8, Array
from qwen35.codecs.codec import Encoding, EncodingRequest, Piece
from qwen35.codecs.floats import f32_from
from qwen35.codecs.ggml.quantizers import encode
from qwen35.codecs.ggml.types import GgmlType
from qwen35.codecs.pieces import Readable
from qwen35.errors import TensorError
from qwen35.tensors import Weight

__all__ = ["EncodingGgml", "StoredGgml", "decode"]


def decode(data: U8, kind: GgmlType) -> F32:
    """Return the values of whole blocks, flat float32, by the `gguf` library."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(over="ignore", invalid="ignore"):
        values: F32 = dequantize(data, GGMLQuantizationType(kind.code))
    return values


class StoredGgml:
    """The values of a tensor in a type of ggml, decoded to float32."""

    def __init__(self, reader: Readable, weight: Weight, kind: GgmlType) -> None:
        self._reader, self._main, self._kind = reader, weight.main, kind

    def read_into(self, first: int, out: Array) -> None:
        """Fill flat `out` with the elements from number `first` on, decoded."""
        block = self._kind.block
        begin, end = first // block, -(-(first + out.size) // block)
        data = np.empty((end - begin) * self._kind.nbytes, np.uint8)
        self._reader.read_into(self._main, begin * self._kind.nbytes, data.data)
        skipped = first - begin * block
        out[:] = decode(data, self._kind).reshape(-1)[skipped : skipped + out.size]
        if not np.isfinite(out).all():
            subject = f"{self._main.file}: {self._main.spec.name}"
            raise TensorError(subject, "a scale or weight is not finite")


class EncodingGgml(Encoding):
    """Rows on the way to a type of ggml."""

    def __init__(self, order: EncodingRequest, kind: GgmlType) -> None:
        self._order, self._kind = order, kind

    def add(self, piece: Piece) -> None:
        """Encode and write rows."""
        name, row = self._order.outputs[0].name, piece.values.shape[1]
        rows = np.ascontiguousarray(f32_from(piece.values, piece.dtype))
        data = encode(name, rows, self._kind.name, piece.importance, self._order.encoder)
        self._order.write(name, self._kind.size((piece.first, row)), data)
