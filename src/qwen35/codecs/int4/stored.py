"""Decoding and encoding of INT4 weights in files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen35.codecs.codec import Encoding, EncodingRequest, Piece
from qwen35.codecs.floats import f32_from, from_f32
from qwen35.codecs.int4.arrays import QuantizedRows, packed, quantize_rows, unpacked
from qwen35.codecs.int4.layout import PER_WORD, Int4Format
from qwen35.codecs.pieces import Readable
from qwen35.codecs.stored_rows import StoredRows
from qwen35.errors import TensorError
from qwen35.tensors import StoredTensor, TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.array_types import F32, U8, Array

__all__ = [
    "EncodingGptq",
    "EncodingInt4",
    "StoredInt4",
    "check_shape",
    "ignored_parts",
    "open_int4",
]

_NUMPY: dict[str, type[np.generic]] = {
    "I32": np.int32,
    "F16": np.float16,
    "BF16": np.uint16,
    "F32": np.float32,
}
_SYMMETRIC = np.uint8(8)
_EIGHTS = np.int32(0x77777777)
"""Eight zero points of 8 in GPTQ's layout: one less is stored."""


def open_int4(reader: Readable, weight: Weight, spec: TensorSpec, kind: Int4Format) -> StoredInt4:
    """Open a stored weight in its layout.

    Raises:
        TensorError: `g_idx` names a group that does not exist, or `weight_shape` another shape.
    """
    if not kind.gptq:
        check_shape(reader, weight)
    return (_StoredGptq if kind.gptq else StoredInt4)(reader, weight, spec, kind)


def check_shape(reader: Readable, weight: Weight) -> None:
    """Check that `weight_shape`, by which compressed-tensors unpacks codes, is that of the codes.

    Raises:
        TensorError: it is not.
    """
    rows, words = weight.main.spec.shape
    part = next(part for part in weight.parts if part.spec.name.endswith(".weight_shape"))
    found = np.frombuffer(reader.read(part), np.dtype("<i8")).tolist()
    expected = [rows, words * PER_WORD]
    if found != expected:
        hint = "the checkpoint is damaged: convert it again"
        raise TensorError(part.spec.name, f"holds {found}", expected=f"{expected}", hint=hint)


def ignored_parts(
    reader: Readable, weight: Weight, quantization: Mapping[str, Any], kind: Int4Format
) -> Iterator[str]:
    """Yield which parts of a weight in GPTQ's layout engines ignore, although they matter.

    Without ``desc_act`` vLLM takes the groups of columns in order, and with ``sym`` its Marlin
    kernels take all zero points as 8 (``quantization/gptq_marlin.py``).
    """
    _, _, zeros, groups = weight.parts
    if quantization.get("desc_act") is not True:
        found = np.frombuffer(reader.read(groups), np.dtype("<i4"))
        if (found != np.arange(found.size) // kind.group).any():
            yield "g_idx permutes columns, but desc_act is not true: engines ignore it"
    if quantization.get("sym") is True:
        words = np.frombuffer(reader.read(zeros), np.dtype("<i4"))
        if (words != _EIGHTS).any():
            yield "qzeros has other zero points than 8, but sym is true: engines ignore them"


class StoredInt4(StoredRows):
    """The values of a stored INT4 weight, in the layout of compressed-tensors."""

    def __init__(
        self, reader: Readable, weight: Weight, spec: TensorSpec, kind: Int4Format
    ) -> None:
        super().__init__(weight, spec)
        self.reader, self.kind = reader, kind

    def decoded(self, first: int, count: int) -> F32:
        """Return rows, decoded."""
        return self.rows(first, count).values

    def rows(self, first: int, count: int) -> QuantizedRows:
        """Return rows as they are stored."""
        module = self.weight.name.removesuffix("weight")
        words = self.read(f"{module}weight_packed", first, count)
        scales = self.read(f"{module}weight_scale", first, count)
        zeros: U8 = np.full(scales.shape, _SYMMETRIC)
        if not self.kind.symmetric:
            begin, end = first // PER_WORD, -(-(first + count) // PER_WORD)
            along = self.read(f"{module}weight_zero_point", begin, end - begin)
            whole = unpacked(along.T).T  # packed along rows
            zeros = whole[first - begin * PER_WORD :][:count]
        return QuantizedRows(unpacked(words), scales, zeros)

    def read(self, name: str, first: int, count: int) -> Array:
        """Return rows of a part; floats as float32."""
        part = self._part(name)
        spec, row = part.spec, part.spec.shape[1]
        found = np.empty((count, row), _NUMPY[spec.dtype])
        self.reader.read_into(part, first * row * spec.itemsize, found.data.cast("B"))
        return found if spec.dtype == "I32" else f32_from(found, spec.dtype)

    def _part(self, name: str) -> StoredTensor:
        return next(part for part in self.weight.parts if part.spec.name == name)


class _StoredGptq(StoredInt4):
    """The same in the layout of GPTQ, which is transposed: all codes stay in memory."""

    def __init__(
        self, reader: Readable, weight: Weight, spec: TensorSpec, kind: Int4Format
    ) -> None:
        super().__init__(reader, weight, spec, kind)
        module = weight.name.removesuffix("weight")
        rows, columns = spec.shape
        groups = columns // kind.group
        self._codes = self.read(f"{module}qweight", 0, columns // PER_WORD)
        self._scales = self.read(f"{module}scales", 0, groups)
        # one less is stored, modulo 16
        zeros = unpacked(self.read(f"{module}qzeros", 0, groups))
        self._zeros: U8 = (zeros + np.uint8(1)) & np.uint8(15)
        index = self._part(f"{module}g_idx")
        group_of = np.empty(columns, np.dtype("<i4"))
        reader.read_into(index, 0, group_of.data.cast("B"))
        if ((group_of < 0) | (group_of >= groups)).any():
            raise TensorError(index.spec.name, "names a group that does not exist")
        self._group_of = group_of
        assert rows == self._scales.shape[1]

    def rows(self, first: int, count: int) -> QuantizedRows:
        """Return rows as they are stored; each column with its own scale if groups are mixed."""
        part = slice(first, first + count)
        codes = unpacked(np.ascontiguousarray(self._codes[:, part].T))
        order: Array | slice = self._group_of
        if (self._group_of == np.arange(codes.shape[1]) // self.kind.group).all():
            order = slice(None)
        return QuantizedRows(codes, self._scales[order, part].T, self._zeros[order, part].T)


class EncodingInt4(Encoding):
    """Encodes rows in the layout of compressed-tensors."""

    def __init__(self, request: EncodingRequest, kind: Int4Format) -> None:
        self._request, self._kind = request, kind
        self._outputs = {out.name.rpartition(".")[2]: out for out in request.outputs}

    def add(self, piece: Piece) -> None:
        """Encode and write whole words of rows."""
        rows, first = self.quantized(piece, self._request.spec.dtype), piece.first
        self._write("weight_packed", first, packed(rows.codes))
        self._write("weight_scale", first, from_f32(rows.scales, self._request.spec.dtype))
        if not self._kind.symmetric:
            zeros = np.ascontiguousarray(packed(np.ascontiguousarray(rows.zeros.T)).T)
            self._write("weight_zero_point", first // PER_WORD, zeros)
        if first == 0:
            shape = np.array(self._request.spec.shape, np.dtype("<i8"))
            out = self._outputs["weight_shape"]
            self._request.write(out.name, 0, shape.data.cast("B"))

    def quantized(self, piece: Piece, stored: str) -> QuantizedRows:
        """Return rows as INT4 with scales of a dtype.

        Raises:
            TensorError: the dtype cannot hold one.
        """
        settings, refine = self._request.settings, self._request.refine
        try:
            rows = quantize_rows(
                piece.values,
                piece.dtype,
                self._kind.group,
                stored,
                piece.importance,
                symmetric=self._kind.symmetric,
                search=settings is None or settings.mode == "search",
            )
        except ValueError as error:
            wider = self._kind.gptq and self._request.spec.dtype != stored
            other = ", or take --layout compressed-tensors" if wider else ""
            hint = f"leave it unpacked, by --keep{other}"
            raise TensorError(self._request.source, str(error), hint=hint) from error
        if refine is None:
            return rows
        values = f32_from(piece.values, piece.dtype)
        return replace(rows, codes=refine(piece.first, values, rows.grid))

    def _write(self, name: str, row: int, data: Array) -> None:
        out = self._outputs[name]
        offset = row * out.shape[1] * out.itemsize
        self._request.write(out.name, offset, np.ascontiguousarray(data).data.cast("B"))


class EncodingGptq(EncodingInt4):
    """Encodes to the layout of GPTQ; `finish` writes, since it is transposed."""

    def __init__(self, request: EncodingRequest, kind: Int4Format) -> None:
        super().__init__(request, kind)
        rows, columns = request.spec.shape
        self._codes = np.empty((columns // PER_WORD, rows), np.dtype("<i4"))
        self._scales = np.empty((columns // kind.group, rows), np.float16)

    def add(self, piece: Piece) -> None:
        """Encode rows and keep them."""
        rows = self.quantized(piece, "F16")
        part = slice(piece.first, piece.first + len(rows.codes))
        self._codes[:, part] = packed(rows.codes).T
        self._scales[:, part] = rows.scales.astype(np.float16).T

    def finish(self) -> None:
        """Write all parts."""
        groups, rows = self._scales.shape
        zeros = np.full((groups, rows // PER_WORD), _EIGHTS, np.dtype("<i4"))
        index = np.arange(groups * self._kind.group, dtype=np.dtype("<i4")) // self._kind.group
        parts = {"qweight": self._codes, "scales": self._scales, "qzeros": zeros, "g_idx": index}
        for name, data in parts.items():
            out = self._outputs[name]
            self._request.write(out.name, 0, np.ascontiguousarray(data).data.cast("B"))
