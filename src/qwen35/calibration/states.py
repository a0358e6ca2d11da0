"""The work folder of a calibration, which keeps the sums of finished blocks too."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from qwen35.calibration.hessian_inputs import Matrix
from qwen35.calibration.hessian_record import GramSums
from qwen35.calibration.hessian_totals import write_triangles
from qwen35.calibration.sums import Sums, load_sums, merge_sums, save_sums
from qwen35.forward.stream_folder import StreamFolder
from qwen35.planning.hessians import HESSIANS
from qwen35.sinks.staging import os_errors

__all__ = ["CalibrationFolder", "work_folder"]


def work_folder(out: Path) -> Path:
    """Return the folder beside `out` that holds unfinished work."""
    absolute = out.absolute()
    return absolute.with_name(f".{absolute.name}.calibrating")


class CalibrationFolder(StreamFolder):
    """The hidden states of one calibration, and the sums of its finished blocks."""

    @property
    def hessians(self) -> Path:
        """The folder of the files of Hessians, of finished blocks and of the current one."""
        return self.folder / HESSIANS

    def remove(self) -> None:
        """Remove the folder, with the files of Hessians that are still in it."""
        if self.hessians.is_dir():
            shutil.rmtree(self.hessians)
        super().remove()

    def save(self, block: str, sums: Mapping[str, Sums]) -> None:
        """Save the sums of a block, before it is listed as finished."""
        with os_errors(self.folder):
            save_sums(self.folder / f"{block}.npz", sums)

    def save_part(self, block: str, first: int, batches: Sequence[Mapping[str, Sums]]) -> None:
        """Save the sums of some windows of a block, batch by batch.

        A worker taken for dead may save them too, at the same time: the same sums.
        """
        keyed = {f"{i}/{name}": one for i, sums in enumerate(batches) for name, one in sums.items()}
        new = self.folder / f"{block}.{first}.{uuid4().hex}"
        with os_errors(self.folder):
            save_sums(new, keyed)
            new.replace(self._part(block, first))

    def save_products(
        self, name: str, sums: Mapping[Matrix, GramSums], columns: Mapping[Matrix, int], torch: Any
    ) -> None:
        """Save what Hessians are made of, over some windows of a block."""
        with os_errors(self.folder):
            write_triangles(self.folder / name, sums, columns, torch)

    def take_part(self, block: str, first: int, into: dict[str, Sums]) -> None:
        """Merge the sums of some windows, whose first it is, into those of the windows before."""
        path = self._part(block, first)
        for key, sums in load_sums(path).items():
            merge_sums(into, {key.partition("/")[2]: sums})
        path.unlink()

    def _part(self, block: str, first: int) -> Path:
        return self.folder / f"{block}.{first}.npz"

    def sums(self, block: str) -> dict[str, Sums]:
        """Return the sums of a finished block."""
        return load_sums(self.folder / f"{block}.npz")
