"""The work folder of a calibration, which keeps the sums of finished blocks too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qwen35.calibration.sums import Sums, load_sums, save_sums
from qwen35.forward.stream_folder import StreamFolder
from qwen35.sinks.staging import os_errors

__all__ = ["CalibrationFolder", "work_folder"]


def work_folder(out: Path) -> Path:
    """Return the folder beside `out` that holds unfinished work."""
    absolute = out.absolute()
    return absolute.with_name(f".{absolute.name}.calibrating")


class CalibrationFolder(StreamFolder):
    """The hidden states of one calibration, and the sums of its finished blocks."""

    def save(self, block: str, sums: Mapping[str, Sums]) -> None:
        """Save the sums of a block, before it is listed as finished."""
        with os_errors(self.folder):
            save_sums(self.folder / f"{block}.npz", sums)

    def sums(self, block: str) -> dict[str, Sums]:
        """Return the sums of a finished block."""
        return load_sums(self.folder / f"{block}.npz")
