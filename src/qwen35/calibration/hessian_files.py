"""The Hessians of a block on their way into files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
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
)
from qwen35.calibration.hessian_record import GramSums, HessianRecord
from qwen35.errors import InputError
from qwen35.planning.hessians import MeasuredInput, hessian_head, triangle_rows
from qwen35.sinks.staging import os_errors

__all__ = ["BlockHessians"]


class BlockHessians:
    """The Hessians of a block: those of all tokens in a first pass, those of experts in more.

    Args:
        torch: the library.
        device: where to compute.
        block: its name.
        inputs: of the block.
        windows: returns the windows that pass at the moment.
        group: bytes of experts' sums that may be in memory.
        folder: to write files in; those of an interrupted run are replaced.
        provenance: for the files.
    """

    def __init__(
        self,
        torch: Any,
        device: str,
        block: str,
        inputs: Mapping[str, PlannedInput],
        windows: Callable[[], range],
        group: int,
        folder: Path,
        provenance: Mapping[str, Any],
    ) -> None:
        self._torch, self._device, self._block = torch, device, block
        self._inputs, self._windows, self._group = inputs, windows, group
        self._folder, self._provenance = folder, provenance
        self._files: dict[str, _HessianFile] = {}
        self._left: list[Matrix] = []
        self.record = self._recording(None)

    def _recording(self, wanted: list[Matrix] | None) -> HessianRecord:
        return HessianRecord(self._torch, self._device, self._inputs, self._windows, wanted)

    def passed(self) -> bool:
        """Write what a pass of all windows summed up; return whether another one is needed.

        Raises:
            InputError: a sum overflowed.
            OutputError: the disk is full.
        """
        with os_errors(self._folder):
            if not self._files:
                self._begin(self.record.tokens)
            for matrix, sums in self.record.sums.items():
                file, name = self._place(matrix)
                if name in self._files[file]:
                    self._files[file].put(name, sums)
            self.record.sums.clear()  # before those of the next group are allocated
            if not self._left:
                for written in self._files.values():
                    written.finish()
                return False
        self.record = self._recording(self._next_group())
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

    def put(self, name: str, sums: GramSums) -> None:
        """Write both triangles of an input."""
        with self._path.open("r+b") as file:
            file.seek(self._begins[name])
            self._hashes[name] = [self._write(name, one, file) for one in sums.sums]

    def _write(self, name: str, sums: Any, file: BinaryIO) -> str:
        matrix: F32 = sums.cpu().numpy()
        digest = hashlib.sha256()
        for row in triangle_rows(matrix):
            if not np.isfinite(row).all():
                found = "a sum of products of two inputs is beyond float32"
                raise InputError(f"{self._subject}, {name}", found, hint="the weights are damaged")
            digest.update(row.data)
            file.write(row.data)
        return digest.hexdigest()

    def finish(self) -> None:
        """Write the head: the file is complete, and on disk."""
        with self._path.open("r+b") as file:
            file.write(hessian_head(self._inputs, self._hashes, self._provenance))
            file.flush()
            os.fsync(file.fileno())
