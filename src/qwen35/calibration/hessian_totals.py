"""Sums of x x^T over parts of the text, added up in files, in the order of the text.

Sums of float32 depend on their order. So windows are summed up within parts, and parts are added,
the same way in one process as with workers: the parts are those of the plan, whoever computes them.
Both files here hold triangles of float32, for each matrix that of fitting tokens and that of
held-out ones, row by row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from qwen35.array_types import F32
from qwen35.calibration.hessian_inputs import Matrix
from qwen35.calibration.hessian_record import GramSums
from qwen35.errors import OutputError
from qwen35.planning.hessians import triangle_bytes, triangle_rows

__all__ = ["HessianTotals", "Triangles", "triangles_in", "triangles_of", "write_triangles"]

Triangles = Iterable[tuple[Matrix, Iterable[F32]]]
"""Matrices with both of their triangles, in pieces of float32."""

_ROWS = 64  # rows that are written together
_PIECE = 2**20  # numbers that are read together


class HessianTotals:
    """The sums of one pass of all windows through a block.

    Args:
        path: the file; one of an interrupted run is replaced.
        columns: width of each matrix, in the order of the file.
    """

    def __init__(self, path: Path, columns: Mapping[Matrix, int]) -> None:
        self._path, self._columns = path, columns
        self._begun: set[Matrix] = set()
        path.write_bytes(b"")

    def merge(self, later: Triangles) -> None:
        """Add the sums over the next part of the text."""
        begins = _begins(self._columns)
        with self._path.open("r+b") as file:
            for matrix, pieces in later:
                position = begins[matrix]
                for piece in pieces:
                    sums = piece
                    if matrix in self._begun:
                        file.seek(position)
                        with np.errstate(over="ignore", invalid="ignore"):  # found when written
                            sums = np.fromfile(file, np.float32, piece.size) + piece
                    file.seek(position)
                    file.write(sums.data)
                    position += sums.nbytes
                self._begun.add(matrix)

    def triangle(self, matrix: Matrix, number: int) -> Iterator[F32]:
        """Yield a triangle of a matrix, that of fitting tokens or of held-out ones (1), in pieces.

        Raises:
            OutputError: the file is too short.
        """
        nbytes = triangle_bytes(self._columns[matrix])
        begin = _begins(self._columns)[matrix] + number * nbytes
        yield from _pieces(self._path, begin, nbytes)

    def remove(self) -> None:
        """Remove the file."""
        self._path.unlink()


def _begins(columns: Mapping[Matrix, int]) -> dict[Matrix, int]:
    begins, position = dict[Matrix, int](), 0
    for matrix, width in columns.items():
        begins[matrix] = position
        position += 2 * triangle_bytes(width)
    return begins


def _pieces(path: Path, begin: int, nbytes: int) -> Iterator[F32]:
    left = nbytes // 4
    with path.open("rb") as file:
        file.seek(begin)
        while left:
            piece = np.fromfile(file, np.float32, min(left, _PIECE))
            if not piece.size:
                hint = "give --overwrite to start again"
                raise OutputError(str(path), "was changed by another process", hint=hint)
            yield piece
            left -= piece.size


def triangles_of(sums: Mapping[Matrix, GramSums]) -> Triangles:
    """Return the triangles of sums in memory."""
    return ((matrix, _packed(one)) for matrix, one in sums.items())


def _packed(sums: GramSums) -> Iterator[F32]:
    for one in sums.sums:
        rows = list(triangle_rows(one.cpu().numpy()))
        for first in range(0, len(rows), _ROWS):
            yield np.concatenate(rows[first : first + _ROWS])


def triangles_in(path: Path, columns: Mapping[Matrix, int]) -> Triangles:
    """Return the triangles of a file that `write_triangles` wrote."""
    begins = _begins(columns)
    return (
        (matrix, _pieces(path, begins[matrix], 2 * triangle_bytes(width)))
        for matrix, width in columns.items()
    )


def write_triangles(
    path: Path, sums: Mapping[Matrix, GramSums], columns: Mapping[Matrix, int], torch: Any
) -> None:
    """Write the sums over a part of the text; zeros where no token reached an expert.

    A worker taken for dead may write them too, at the same time: the same bytes.
    """
    new = path.with_name(f"{path.name}.{uuid4().hex}")
    with new.open("wb") as file:
        for matrix, width in columns.items():
            for piece in _packed(sums.get(matrix) or GramSums(torch, width, "cpu")):
                file.write(piece.data)
    new.replace(path)
