"""What happens to the values of a weight on the way into a file that wants them otherwise.

A transform says which rows of the weight a run of output rows comes from, and what is computed on
them. Rows alone move, and arithmetic follows, so any run of rows can be made by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from qwen35.array_types import Array

__all__ = ["NegExp", "PatchFrame", "PlusOne", "TileValueColumns", "TileValueHeads", "Transform"]


class Transform:
    """One step on the way.

    Attributes:
        whole: whether the weight is needed whole for any row of the output.
        moves: whether rows come from elsewhere.
        values: whether values change, and not only places.
    """

    whole: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    values: ClassVar[bool] = False

    def runs(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield (first row of the weight, rows) for the output rows from `first` on, in order."""
        yield first, count

    def apply(self, values: Array, dtype: str) -> tuple[Array, str]:
        """Return [rows, row] values of `dtype` as they become, and their dtype."""
        return values, dtype


@dataclass(frozen=True, slots=True)
class PlusOne(Transform):
    """A norm that is stored zero-centred: ``1 + w``."""

    values: ClassVar[bool] = True

    def apply(self, values: Array, dtype: str) -> tuple[Array, str]:
        """Return float32."""
        import numpy as np

        return _rounded(_floats(values, dtype) + np.float32(1), dtype), "F32"


@dataclass(frozen=True, slots=True)
class NegExp(Transform):
    """``A_log`` becomes ``-exp(A_log)``, taken in float64."""

    values: ClassVar[bool] = True

    def apply(self, values: Array, dtype: str) -> tuple[Array, str]:
        """Return float32."""
        import numpy as np

        exact = -np.exp(_floats(values, dtype).astype(np.float64))
        return _rounded(exact.astype(np.float32), dtype), "F32"


@dataclass(frozen=True, slots=True)
class TileValueHeads(Transform):
    """Rows of value heads, grouped by key head, are tiled, because ggml broadcasts so.

    Head ``k * r + v`` moves to ``v * n_k + k``, with ``r`` value heads a key head.

    Args:
        first: the first row that moves.
        head: rows of a value head.
        keys: key heads.
        rows: of the weight.
    """

    moves: ClassVar[bool] = True

    first: int
    head: int
    keys: int
    rows: int

    def runs(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield a run for each head, and one for the rows that stay."""
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


@dataclass(frozen=True, slots=True)
class TileValueColumns(Transform):
    """The same with columns.

    Args:
        head: columns of a value head.
        keys: key heads.
    """

    head: int
    keys: int

    def apply(self, values: Array, dtype: str) -> tuple[Array, str]:
        """Return the values with their columns in the order of the output."""
        import numpy as np

        rows, row = values.shape
        groups = row // self.head // self.keys
        heads = values.reshape(rows, self.keys, groups, self.head)
        return np.ascontiguousarray(heads.transpose(0, 2, 1, 3)).reshape(rows, row), dtype


@dataclass(frozen=True, slots=True)
class PatchFrame(Transform):
    """One time step of the patch embedding's kernel.

    Args:
        shape: of the weight: [out, colours, frames, height, width].
        step: which.
    """

    whole: ClassVar[bool] = True

    shape: tuple[int, ...]
    step: int

    def apply(self, values: Array, dtype: str) -> tuple[Array, str]:
        """Return [rows, width] of one time step; `values` is the whole weight, flat."""
        import numpy as np

        kernel = values.reshape(self.shape)[:, :, self.step]
        return np.ascontiguousarray(kernel).reshape(-1, self.shape[-1]), dtype


def _floats(values: Array, dtype: str) -> Array:
    from qwen35.codecs.floats import f32_from

    return f32_from(values, dtype)


def _rounded(values: Array, dtype: str) -> Array:
    """Round what was computed on F16 weights to F16, as llama.cpp's converter computes in it."""
    import numpy as np

    return values.astype(np.float16).astype(np.float32) if dtype == "F16" else values
