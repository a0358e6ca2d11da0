"""The largest magnitudes of whole weights, for codecs whose scales depend on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from threading import Lock
from typing import TYPE_CHECKING

from qwen35.codecs.codec import Piece
from qwen35.codecs.pieces import Readable
from qwen35.codecs.registry import CODECS
from qwen35.planning.rows import Rows
from qwen35.planning.step import Step

if TYPE_CHECKING:
    from qwen35.array_types import F32

__all__ = ["Survey"]


@dataclass(frozen=True)
class Survey:
    """Finds the largest magnitudes of steps; each weight is read once for it, by one thread."""

    _found: dict[Rows, F32] = field(default_factory=dict)
    _locks: dict[Rows, Lock] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def of(self, step: Step, reader: Readable) -> F32 | None:
        """Return [matrices] the largest magnitudes, or None if no target needs them.

        Raises:
            TensorError: a weight cannot be read, or holds NaN or infinity.
        """
        surveyed = any(CODECS[target.codec].surveys for target in step.targets)
        return self.of_rows(step, reader) if surveyed else None

    def of_rows(self, step: Step, reader: Readable) -> F32:
        """Return [matrices] the largest magnitudes of a step and of what is tied to it."""
        import numpy as np

        largest = self._largest(step.rows, reader)
        for rows in step.tied:
            largest = np.maximum(largest, self._largest(rows, reader))
        return largest

    def _largest(self, rows: Rows, reader: Readable) -> F32:
        with self._lock:
            lock = self._locks.setdefault(rows, Lock())
        with lock:
            if rows not in self._found:
                self._found[rows] = _measured(rows, reader)
            return self._found[rows]


def _measured(rows: Rows, reader: Readable) -> F32:
    import numpy as np

    height = rows.shape[-2]
    found = np.zeros(prod(rows.shape[:-2]), np.float32)
    opened = rows.open(reader)
    for chunk in rows.chunks():
        for matrix, values in _by_matrix(opened.piece(chunk), height):
            found[matrix] = max(found[matrix], values)
    return found


def _by_matrix(piece: Piece, height: int) -> Iterator[tuple[int, float]]:
    """Yield the number of each matrix that a piece has rows of, and their largest magnitude."""
    from qwen35.codecs.floats import largest

    done = 0
    while done < len(piece.values):
        matrix, row = divmod(piece.first + done, height)
        end = done + height - row
        yield matrix, largest(piece.values[done:end], piece.dtype)
        done = end
