"""Encode and decode values in memory, to measure what a codec does to them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwen35.codecs.codec import Codec, EncodingRequest, Kernel, Piece
from qwen35.tensors import StoredTensor, TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.array_types import F32

__all__ = ["RoundTrip"]


class RoundTrip:
    """A run of rows, encoded to memory and decoded again.

    Args:
        codec: the codec.
        spec: the decoded rows, as a weight.
        first: index of the first row in the full weight.
        settings: how to choose scales, for codecs with `chooses_scales`.
        kernel: the device's kernel, for codecs that have kernels.
        largest: as in `EncodingRequest`.
    """

    def __init__(
        self,
        codec: Codec,
        spec: TensorSpec,
        *,
        first: int = 0,
        settings: Any = None,
        kernel: Kernel | None = None,
        largest: F32 | None = None,
    ) -> None:
        self._codec, self._spec, self._first = codec, spec, first
        outputs = codec.layout(spec)
        self._memory = _Memory(outputs)
        parts = tuple(StoredTensor(out, "", 0) for out in outputs)
        self._weight = Weight(spec.name, codec.name, parts)
        request = EncodingRequest(
            spec.name, spec, outputs, self._memory.write, settings, kernel, largest=largest
        )
        self._encoding = codec.encode(request)

    def add(self, piece: Piece) -> None:
        """Encode a piece.

        Raises:
            TensorError: it holds NaN, infinity or values the codec cannot represent.
        """
        self._encoding.add(replace(piece, first=piece.first - self._first))

    def finish(self) -> None:
        """Finish encoding; afterwards the rows can be decoded."""
        self._encoding.finish()
        # F32, so that the error measured is the codec's and not the checkpoint dtype's.
        spec = TensorSpec(self._spec.name, "F32", self._spec.shape)
        self._values = self._codec.open(self._memory, self._weight, spec)

    def decoded(self, piece: Piece) -> F32:
        """Return the decoded values of a piece, not rounded to its dtype."""
        import numpy as np

        rows, row = piece.values.shape
        out = np.empty(rows * row, np.float32)
        self._values.read_into((piece.first - self._first) * row, out)
        return out.reshape(rows, row)


class _Memory:
    """The encoded tensors of one weight, in memory."""

    def __init__(self, outputs: tuple[TensorSpec, ...]) -> None:
        self._data = {out.name: bytearray(out.nbytes) for out in outputs}

    def write(self, name: str, offset: int, data: memoryview) -> None:
        data = data.cast("B")
        self._data[name][offset : offset + len(data)] = data

    def read_into(self, tensor: StoredTensor, offset: int, buffer: memoryview) -> None:
        target = buffer.cast("B")
        target[:] = memoryview(self._data[tensor.spec.name])[offset : offset + len(target)]

    def read(self, tensor: StoredTensor) -> bytearray:
        return self._data[tensor.spec.name]
