"""The Hessians of a block on their way into files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qwen35.array_types import F32
from qwen35.calibration.hessian_inputs import (
    Matrix,
    PlannedInput,
    Tokens,
    assigned,
    file_of,
    matrix_name,
    passed_matrices,
)
from qwen35.calibration.hessian_totals import HessianTotals, Triangles
from qwen35.errors import InputError
from qwen35.planning.hessians import MeasuredInput, hessian_head
from qwen35.sinks.staging import os_errors

__all__ = ["BlockHessians", "without_values"]

_ENDING = "grams"
"""Of the names of files that hold sums of x x^T until they are added up."""


class BlockHessians:
    """The Hessians of a block: those of all tokens in a first pass, those of experts in more.

    Args:
        block: its name.
        inputs: of the block.
        group: bytes of experts' sums that may be in memory.
        folder: to write files in; those of an interrupted run are replaced.
        work: folder of what is dropped when the block is done.
        provenance: for the files.

    Attributes:
        wanted: experts to sum up in this pass; None in the first.
    """

    def __init__(
        self,
        block: str,
        inputs: Mapping[str, PlannedInput],
        group: int,
        folder: Path,
        work: Path,
        provenance: Mapping[str, Any],
    ) -> None:
        self._block, self._inputs, self._group = block, inputs, group
        self._folder, self._work, self._provenance = folder, work, provenance
        self._files: dict[str, _HessianFile] = {}
        self._left: list[Matrix] = []
        self._passes = 0
        with os_errors(folder):
            folder.mkdir(exist_ok=True)
            for part in work.glob(f"{block}.*{_ENDING}*"):  # of an interrupted run
                part.unlink()
        self._begin_pass(None)

    def _begin_pass(self, wanted: list[Matrix] | None) -> None:
        self.wanted = wanted
        self.columns = passed_matrices(self._inputs, wanted)
        self._passes += 1
        with os_errors(self._work):
            self._totals = HessianTotals(self._work / f"{self._block}.{_ENDING}", self.columns)

    @property
    def names(self) -> list[str]:
        """The files, once they are laid out."""
        return list(self._files)

    def part(self, first: int) -> Path:
        """Return the file of a worker's sums over the part with this first window."""
        return self._work / f"{self._block}.{self._passes}.{first}.{_ENDING}"

    def merge(self, later: Triangles) -> None:
        """Add the sums over the next part of the text.

        Raises:
            OutputError: the disk is full.
        """
        with os_errors(self._work):
            self._totals.merge(later)

    def passed(self, tokens: Mapping[Matrix, Tokens]) -> bool:
        """Write what a pass of all windows summed up; return whether another one is needed.

        Args:
            tokens: how many the sums are over; it is the first pass that tells.

        Raises:
            InputError: a sum overflowed.
            OutputError: the disk is full.
        """
        with os_errors(self._folder):
            if not self._files:
                self._begin(tokens)
            for matrix in self.columns:
                file, name = self._place(matrix)
                if name in self._files.get(file, ()):
                    self._files[file].put(name, self._totals, matrix)
            if not self._left:
                self._totals.remove()
                for written in self._files.values():
                    written.finish()
                return False
        self._begin_pass(self._next_group())
        return True

    def _place(self, matrix: Matrix) -> tuple[str, str]:
        return file_of(self._block, matrix_name(matrix))

    def _begin(self, tokens: Mapping[Matrix, Tokens]) -> None:
        """Lay out the files: from the counts of tokens it follows which experts have their own."""
        by_file: dict[str, dict[str, MeasuredInput]] = {}
        for matrix, measured in assigned(self._inputs, tokens).items():
            file, name = self._place(matrix)
            by_file.setdefault(file, {})[name] = measured
            if matrix.expert is not None:
                self._left.append(matrix)
        self._files = {
            file: _HessianFile(
                self._folder / file, f"{self._block} ({file})", inputs, self._provenance
            )
            for file, inputs in by_file.items()
        }

    def _next_group(self) -> list[Matrix]:
        group, nbytes = list[Matrix](), 0
        while self._left:
            nbytes += self._inputs[self._left[0].name].nbytes
            if group and nbytes > self._group:
                break
            group.append(self._left.pop(0))
        return group


def without_values(path: Path) -> None:
    """Free the space of a file's values; its head, which tells their hashes, stays as it is."""
    size, new = path.stat().st_size, path.with_suffix(".new")
    with path.open("rb") as file:
        length = file.read(8)
        head = length + file.read(int.from_bytes(length, "little"))
    with new.open("wb") as file:
        file.write(head)
        file.truncate(size)  # a hole
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


class _HessianFile:
    """A file of Hessians; triangles may come in any order."""

    def __init__(
        self,
        path: Path,
        subject: str,
        inputs: Mapping[str, MeasuredInput],
        provenance: Mapping[str, Any],
    ) -> None:
        self._path, self._subject = path, subject
        self._inputs, self._provenance = inputs, provenance
        self._hashes: dict[str, list[str]] = {}
        path.write_bytes(b"")
        position, self._begins = len(hessian_head(inputs, {}, provenance)), dict[str, int]()
        for name, one in inputs.items():
            self._begins[name] = position
            position += one.nbytes

    def __contains__(self, name: str) -> bool:
        return name in self._inputs

    def put(self, name: str, totals: HessianTotals, matrix: Matrix) -> None:
        """Write both triangles of an input."""
        with self._path.open("r+b") as file:
            file.seek(self._begins[name])
            triangles = (totals.triangle(matrix, number) for number in range(2))
            self._hashes[name] = [self._write(name, one, file) for one in triangles]

    def _write(self, name: str, triangle: Iterable[F32], file: BinaryIO) -> str:
        digest = hashlib.sha256()
        for piece in triangle:
            if not np.isfinite(piece).all():
                found = "a sum of products of two inputs is beyond float32"
                raise InputError(f"{self._subject}, {name}", found, hint="the weights are damaged")
            digest.update(piece.data)
            file.write(piece.data)
        return digest.hexdigest()

    def finish(self) -> None:
        """Write the head: the file is complete, and on disk."""
        with self._path.open("r+b") as file:
            file.write(hessian_head(self._inputs, self._hashes, self._provenance))
            file.flush()
            os.fsync(file.fileno())
