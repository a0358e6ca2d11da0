"""Transforms of a weight's values between source and output.

A transform maps a run of output rows to rows of the weight, and computes their values. It reorders
whole rows first, then computes within them, so any run of rows can be produced independently.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from qwen35.errors import TensorError

if TYPE_CHECKING:
    from qwen35.array_types import Array

__all__ = [
    "LogNeg",
    "MinusOne",
    "NegExp",
    "PatchFrame",
    "PlusOne",
    "Scaled",
    "TileValueColumns",
    "TileValueHeads",
    "Transform",
]


class Transform:
    """The identity; base class of all transforms.

    Attributes:
        whole: whether any output row needs the whole weight.
        moves: whether rows are reordered.
        values: whether values change, not only their positions.
    """

    whole: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    values: ClassVar[bool] = False

    def runs(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield (first row of the weight, number of rows) for `count` output rows, in order."""
        yield first, count

    def apply(self, values: Array, dtype: str) -> tuple[Array, str]:
        """Transform [rows, row] values of `dtype`; return them with their new dtype."""
        return values, dtype

    def inverse(self, shape: tuple[int, ...]) -> Transform:
        """Return the transform that undoes this one on an output of `shape`."""
        del shape
        return self

    def taken(self) -> Iterator[tuple[int, int, int]]:
        """Yield (row of the weight, row of the output, count) of what a `whole` one takes."""
        yield from ()


@dataclass(frozen=True, slots=True)
class PlusOne(Transform):
    """A zero-centred norm weight: ``1 + w``."""

    values: ClassVar[bool] = True

    def apply(self, values: Array, dtype: str) -> tuple[Array, str]:
        """Return float32."""
        import numpy as np

        # The converter writes norms as F32; BF16 could not hold 1 + w.
        return _rounded(_floats(values, dtype) + np.float32(1), dtype), "F32"

    def inverse(self, shape: tuple[int, ...]) -> Transform:
        """Return `MinusOne`."""
        del shape
        return MinusOne()


@dataclass(frozen=True, slots=True)
class MinusOne(Transform):
    """Undoes `PlusOne`: exact for every value from 0.5 on."""

    values: ClassVar[bool] = True

    def apply(self, values: Array, dtype: str) -> tuple[Array, str]:
        """Return float32."""
        import numpy as np

        return _floats(values, dtype) - np.float32(1), "F32"


@dataclass(frozen=True, slots=True)
class NegExp(Transform):
    """``A_log`` becomes ``-exp(A_log)``, computed in float64.

    Rounding that to float32 is the same on every processor; float32 ``exp`` is not.
    """

    values: ClassVar[bool] = True

    def apply(self, values: Array, dtype: str) -> tuple[Array, str]:
        """Return float32."""
        import numpy as np

        exact = -np.exp(_floats(values, dtype).astype(np.float64))
        return _rounded(exact.astype(np.float32), dtype), "F32"

    def inverse(self, shape: tuple[int, ...]) -> Transform:
        """Return `LogNeg`."""
        del shape
        return LogNeg()


@dataclass(frozen=True, slots=True)
class LogNeg(Transform):
    """Undoes `NegExp`: of the numbers that give the stored one, a short one.

    Several float32 numbers have the same exponential. Trained ones were mostly BF16 first.
    """

    values: ClassVar[bool] = True

    def apply(self, values: Array, dtype: str) -> tuple[Array, str]:
        """Return float32; NaN or infinity for values that are no such exponential."""
        import numpy as np

        from qwen35.codecs.floats import bf16_from_f32, f32_from

        stored = _floats(values, dtype)
        with np.errstate(divide="ignore", invalid="ignore"):
            exact = np.log(-stored.astype(np.float64)).astype(np.float32)
        finite = np.isfinite(exact)
        short = f32_from(bf16_from_f32(np.where(finite, exact, np.float32(0))), "BF16")
        again, _ = NegExp().apply(short, "F32")
        return np.where(finite & (again == stored), short, exact), "F32"


@dataclass(frozen=True, slots=True)
class Scaled(Transform):
    """Values times a factor, in float32.

    Args:
        factor: the factor.
        name: what the values are, in errors.
    """

    values: ClassVar[bool] = True

    factor: float
    name: str

    def apply(self, values: Array, dtype: str) -> tuple[Array, str]:
        """Return float32.

        Raises:
            TensorError: a product is too large for float32.
        """
        import numpy as np

        with np.errstate(over="ignore"):
            scaled = _floats(values, dtype) * np.float32(self.factor)
        if not np.isfinite(scaled).all():
            raise TensorError(self.name, f"too large for F32 once multiplied by {self.factor:g}")
        return scaled, "F32"


@dataclass(frozen=True, slots=True)
class TileValueHeads(Transform):
    """Reorder rows of value heads from grouped by key head to tiled, as ggml broadcasts them.

    Head ``k * r + v`` moves to ``v * n_k + k``, with ``r`` value heads per key head.

    Args:
        first: the first row that moves.
        head: rows per value head.
        keys: number of key heads.
        rows: rows of the weight.
    """

    moves: ClassVar[bool] = True

    first: int
    head: int
    keys: int
    rows: int

    def runs(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield one run per head, and one for the rows that stay in place."""
        row, end = first, first + count
        groups = (self.rows - self.first) // self.head // self.keys
        while row < end:
            if row < self.first:
                stop, source = min(end, self.first), row
            else:
                number, within = divmod(row - self.first, self.head)
                stop = min(end, row - within + self.head)
                value, key = divmod(number, self.keys)
                source = self.first + (key * groups + value) * self.head + within
            yield source, stop - row
            row = stop

    def inverse(self, shape: tuple[int, ...]) -> Transform:
        """Return the same with the numbers of keys and of values for each exchanged."""
        del shape
        groups = (self.rows - self.first) // self.head // self.keys
        return TileValueHeads(self.first, self.head, groups, self.rows)


@dataclass(frozen=True, slots=True)
class TileValueColumns(Transform):
    """Reorder columns of value heads, as `TileValueHeads` does rows.

    Args:
        head: columns per value head.
        keys: number of key heads.
    """

    head: int
    keys: int

    def apply(self, values: Array, dtype: str) -> tuple[Array, str]:
        """Return the values with reordered columns."""
        import numpy as np

        rows, row = values.shape
        groups = row // self.head // self.keys
        heads = values.reshape(rows, self.keys, groups, self.head)
        return np.ascontiguousarray(heads.transpose(0, 2, 1, 3)).reshape(rows, row), dtype

    def inverse(self, shape: tuple[int, ...]) -> Transform:
        """Return the same with the numbers of keys and of values for each exchanged."""
        return TileValueColumns(self.head, shape[-1] // self.head // self.keys)


@dataclass(frozen=True, slots=True)
class PatchFrame(Transform):
    """One time step of the patch embedding's kernel.

    Args:
        shape: the weight's shape: [out, colours, frames, height, width].
        step: index of the time step.
    """

    whole: ClassVar[bool] = True

    shape: tuple[int, ...]
    step: int

    def apply(self, values: Array, dtype: str) -> tuple[Array, str]:
        """Return one time step as [rows, width]; `values` is the whole weight, flat."""
        import numpy as np

        kernel = values.reshape(self.shape)[:, :, self.step]
        return np.ascontiguousarray(kernel).reshape(-1, self.shape[-1]), dtype

    def taken(self) -> Iterator[tuple[int, int, int]]:
        """Yield the rows of one time step."""
        channels, colours, frames, height, _ = self.shape
        for number in range(channels * colours):
            yield (number * frames + self.step) * height, number * height, height


def _floats(values: Array, dtype: str) -> Array:
    from qwen35.codecs.floats import f32_from

    return f32_from(values, dtype)


def _rounded(values: Array, dtype: str) -> Array:
    """Round results on F16 weights to F16, because llama.cpp's converter computes in F16."""
    import numpy as np

    return values.astype(np.float16).astype(np.float32) if dtype == "F16" else values
