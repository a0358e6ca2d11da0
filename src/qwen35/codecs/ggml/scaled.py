"""Tensors of a type with a scale of its own, such as NVFP4.

A block's scale is an E4M3 number, from 2^-9 to 448, and weights are so small that most of their
blocks would have one of its few subnormal numbers, or zero. So weights are divided by 1/2688 of the
largest: its block then has the scale 448, and itself the value 6, the largest numbers of E4M3 and
E2M1. The blocks of these quotients are ggml's.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qwen35.array_types import F32, Array
from qwen35.codecs.codec import Encoding, EncodingRequest, Piece, stacked
from qwen35.codecs.floats import f32_from
from qwen35.codecs.ggml.grids import refined
from qwen35.codecs.ggml.quantizers import encode
from qwen35.codecs.ggml.stored import StoredGgml
from qwen35.codecs.ggml.types import GgmlType
from qwen35.codecs.pieces import Readable
from qwen35.codecs.refining import CodeGrid
from qwen35.errors import TensorError
from qwen35.tensors import TensorSpec, Weight

__all__ = ["EncodingScaled", "StoredScaled", "scale_of"]

_RANGE = np.float32(6 * 448)
"""The largest E2M1 number times the largest E4M3 number."""

_SMALLEST = np.finfo(np.float32).tiny


def scale_of(largest: np.float32) -> np.float32:
    """Return the scale of values up to `largest` in magnitude."""
    return max(np.float32(largest / _RANGE), _SMALLEST) if largest else np.float32(1)


class StoredScaled(StoredGgml):
    """The values of a tensor and its scales, decoded to float32.

    Raises:
        TensorError: the scales are not those of `scales`, or cannot be read.
    """

    def __init__(
        self, reader: Readable, weight: Weight, kind: GgmlType, scales: TensorSpec
    ) -> None:
        super().__init__(reader, weight, kind)
        self._scales: F32 = np.ones(scales.numel, np.float32)
        self._each = weight.main.spec.numel // scales.numel
        for part in weight.parts:
            if part.spec.name != scales.name:
                continue
            found, expected = (f"{s.dtype} {list(s.shape)}" for s in (part.spec, scales))
            if found != expected:
                raise TensorError(f"{part.file}: {scales.name}", found, expected=expected)
            reader.read_into(part, 0, self._scales.data.cast("B"))

    def read_into(self, first: int, out: Array) -> None:
        """Fill flat `out` with decoded elements, starting at index `first`."""
        super().read_into(first, out)
        done = 0
        while done < out.size:
            number, skipped = divmod(first + done, self._each)
            end = done + self._each - skipped
            with np.errstate(over="ignore", invalid="ignore"):
                out[done:end] *= self._scales[number]
            done = end
        self.refuse_infinite(out)

    def grid(self, first: int, shape: tuple[int, int]) -> CodeGrid:
        """Return what the codes of rows stand for; as `StoredGgml.grid`."""
        relative, height = super().grid(first, shape), self._each // shape[1]
        scales = self._scales[(first + np.arange(shape[0])) // height]
        return replace(relative, scales=relative.scales * scales[:, None])


class EncodingScaled(Encoding):
    """Encodes rows relative to the largest weight of the tensor, or of their expert."""

    def __init__(self, request: EncodingRequest, kind: GgmlType) -> None:
        assert request.largest is not None  # the codec surveys
        self._request, self._kind = request, kind
        self._scales = np.array([scale_of(one) for one in request.largest], np.float32)
        self._height = stacked(request.spec)[0] // self._scales.size

    def add(self, piece: Piece) -> None:
        """Encode and write rows; the scales with the first."""
        request, (count, row) = self._request, piece.values.shape
        scales = self._scales[(piece.first + np.arange(count)) // self._height]
        # importance is not for these types: ggml has no use for it
        quotients = f32_from(piece.values, piece.dtype) / scales[:, None]
        data = encode(request.outputs[0].name, quotients, self._kind.name, None)
        if request.refine is not None:
            data = refined(request.refine, piece.first, quotients, data, self._kind.name)
        request.write(request.outputs[0].name, self._kind.size((piece.first, row)), data)
        if piece.first == 0:
            request.write(request.outputs[1].name, 0, self._scales.data.cast("B"))
