"""Random-access decoding and block-by-block encoding of NF4 weights in files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qwen35.codecs.codec import Encoding, EncodingRequest, Piece
from qwen35.codecs.floats import all_finite, f32_from, from_f32
from qwen35.codecs.nf4.arrays import (
    AbsmaxStatistics,
    QuantState,
    decode_absmax,
    decode_blocks,
    parse_state,
    refined,
    searched,
)
from qwen35.codecs.nf4.layout import BLOCK, STATE, parts_layout
from qwen35.codecs.pieces import Readable, not_finite, whole
from qwen35.errors import TensorError
from qwen35.tensors import TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.array_types import U8, Array

__all__ = ["EncodingNf4", "StoredNf4", "read_absmax", "read_state"]


def read_state(reader: Readable, weight: Weight, spec: TensorSpec) -> QuantState:
    """Read the JSON blob of an NF4 weight; check it and the companions' shapes.

    Raises:
        TensorError: they do not match `spec`.
    """
    blob = weight.need(f".{STATE}")
    state = parse_state(bytes(reader.read(blob)), weight.name)
    if state.shape != spec.shape:
        raise TensorError(
            blob.spec.name, f"shape {list(state.shape)}", expected=f"{list(spec.shape)}"
        )
    for suffix, (dtype, shape) in parts_layout(spec, nested=state.nested).items():
        part = weight.part(suffix)
        if part is None or (part.spec.dtype, part.spec.shape) != (dtype, shape):
            found = f"{part.spec.dtype} {list(part.spec.shape)}" if part else "missing"
            raise TensorError(f"{weight.name}{suffix}", found, expected=f"{dtype} {list(shape)}")
    return state


def read_absmax(reader: Readable, weight: Weight, state: QuantState) -> Array:
    """Return the absmax values of an NF4 weight as float32."""
    absmax = whole(reader, weight.need(".absmax"))
    if not state.nested:
        return absmax
    return decode_absmax(
        absmax,
        whole(reader, weight.need(".nested_absmax")),
        whole(reader, weight.need(".nested_quant_map")),
        state.offset,
    )


class StoredNf4:
    """The decoded values of a stored NF4 weight; its scales stay in memory."""

    def __init__(self, reader: Readable, weight: Weight, spec: TensorSpec) -> None:
        if spec.numel % BLOCK:
            expected = f"a multiple of {BLOCK}"
            raise TensorError(weight.name, f"{spec.numel} weights", expected=expected)
        self._reader, self._weight, self._dtype = reader, weight, spec.dtype
        self._absmax = read_absmax(reader, weight, read_state(reader, weight, spec))
        self._levels = whole(reader, weight.need(".quant_map"))

    def read_into(self, first: int, out: Array) -> None:
        """Fill flat `out` with decoded elements, starting at index `first`."""
        begin = first // BLOCK
        end = -(-(first + out.size) // BLOCK)
        packed = np.empty((end - begin) * BLOCK // 2, np.uint8)
        self._reader.read_into(self._weight.main, begin * BLOCK // 2, packed.data)
        values = decode_blocks(packed, self._absmax[begin:end], self._levels)
        skipped = first - begin * BLOCK
        values = values[skipped : skipped + out.size]
        with np.errstate(over="ignore"):  # F16 may overflow: refused below
            out[:] = from_f32(values, self._dtype)
        if not (all_finite(values, "F32") and all_finite(out, self._dtype)):
            raise not_finite(self._weight.name)


@dataclass(frozen=True)
class _WaitingPiece:
    """A piece that was encoded plainly, until its codes are refined."""

    first: int
    values: Array
    dtype: str
    packed: U8


class EncodingNf4(Encoding):
    """Encodes a weight to NF4; `finish` writes the scales, which need all blocks."""

    def __init__(self, request: EncodingRequest) -> None:
        self._request = request
        self._absmax = np.empty(request.spec.numel // BLOCK, np.float32)
        self._held: list[_WaitingPiece] = []

    def add(self, piece: Piece) -> None:
        """Encode and write whole blocks."""
        request = self._request
        assert request.kernel is not None  # NF4 has kernels for every device
        values = piece.values.reshape(-1)
        done = piece.first * piece.values.shape[1]
        packed = np.empty(values.size // 2, np.uint8)
        blocks = self._absmax[done // BLOCK : (done + values.size) // BLOCK]
        if not request.kernel(values, piece.dtype, blocks, packed):
            raise not_finite(request.source)
        if request.refine or request.search:  # by scales that are not known yet
            self._held.append(_WaitingPiece(piece.first, piece.values.copy(), piece.dtype, packed))
            return
        request.write(request.outputs[0].name, done // 2, packed.data)

    def finish(self) -> None:
        """Quantize the scales and write them."""
        statistics = AbsmaxStatistics.of(self._absmax)
        for held in self._held:
            self._refine(held, statistics)
        parts = statistics.parts(self._request.spec)
        for out, part in zip(self._request.outputs[1:], parts, strict=True):
            self._request.write(out.name, 0, part.data.cast("B"))

    def _refine(self, held: _WaitingPiece, statistics: AbsmaxStatistics) -> None:
        """Choose codes for the scales as they are decoded, and write them."""
        request, done = self._request, held.first * held.values.shape[1]
        blocks = slice(done // BLOCK, (done + held.values.size) // BLOCK)
        rows = f32_from(held.values, held.dtype)
        if request.search is not None:
            found = searched(request.search, held.first, rows, held.packed, statistics, blocks)
        else:
            assert request.refine is not None
            found = refined(
                request.refine, held.first, rows, held.packed, statistics.decoded[blocks]
            )
        request.write(request.outputs[0].name, done // 2, found.data)
