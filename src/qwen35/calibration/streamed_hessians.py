"""Hessians that a text leaves of one block of a model at a time: those before are dropped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from qwen35.calibration.calibration_plan import CalibrationPlan
from qwen35.calibration.calibration_run import device_for
from qwen35.calibration.calibration_stream import calibration_stream
from qwen35.calibration.hessian_files import without_values
from qwen35.calibration.states import CalibrationFolder
from qwen35.checkpoint.source import Reader
from qwen35.engines.torch_model import torch_and_transformers
from qwen35.errors import InputError
from qwen35.planning.hessians import Hessians, open_files, open_hessians
from qwen35.progress import Progress
from qwen35.sinks.staging import os_errors

__all__ = ["StreamedHessians"]


class StreamedHessians:
    """The pass of a text that uses up Hessians as it makes them.

    Of the files of finished blocks only the heads stay on disk: they hold the hashes of the values.

    Args:
        plan: of the calibration.
        folder: hidden, beside the output; holds the files, hidden states, and how far they are.
        threads: of torch.
        device: for torch.
    """

    def __init__(
        self,
        plan: CalibrationPlan,
        folder: Path,
        *,
        threads: int | None = None,
        device: str = "auto",
    ) -> None:
        self._plan, self._folder = plan, folder
        self._threads, self._device = threads, device

    @property
    def disk_bytes(self) -> int:
        """An upper bound on what it will take, beside what an interrupted run has left."""
        there = (path.stat().st_blocks * 512 for path in self._folder.rglob("*"))
        return max(0, self._plan.streamed_disk_bytes - sum(there))

    def run(
        self, awaited: Collection[str], use: Callable[[Hessians], None], progress: Progress
    ) -> Hessians:
        """Pass the text on from the first unfinished block; return what the heads tell of all.

        Args:
            awaited: files that are not used up: a block that has one is passed again.
            use: called when the Hessians of a block are complete; it must leave nothing to do.
            progress: receives the bytes of each block.

        Raises:
            InputError: a weight cannot be read, or an input holds NaN.
            OutputError: the disk is full.
        """
        device = device_for(self._device)
        torch, _ = torch_and_transformers("calibrate")
        if self._threads:
            torch.set_num_threads(self._threads)

        def finished(names: Sequence[str]) -> None:
            use(open_files(work.hessians, names))
            with os_errors(self._folder):
                for name in names:
                    without_values(work.hessians / name)

        with (
            os_errors(self._folder),
            self._work(awaited) as work,
            Reader(self._plan.checkpoint) as reader,
        ):
            calibration_stream(self._plan, work, reader, device, progress, finished=finished).run()
            return open_hessians(work.hessians)

    def _work(self, awaited: Collection[str]) -> CalibrationFolder:
        work = self._opened()
        if self._lacks(work, awaited):
            work.remove()
            work = self._opened()
        return work

    def _opened(self) -> CalibrationFolder:
        return CalibrationFolder(self._folder, self._plan.digest, restart=True)

    def _lacks(self, work: CalibrationFolder, awaited: Collection[str]) -> bool:
        """Return whether a finished block has dropped what is awaited, or has lost its heads."""
        assert self._plan.hessians is not None
        names = [
            name
            for block in self._plan.hessians.inputs
            if block in work.done
            for name in self._plan.hessians.files_of(block)
        ]
        if not names:
            return False
        try:
            open_files(work.hessians, names)
        except InputError:
            return True
        return not set(names).isdisjoint(awaited)

    def remove(self) -> None:
        """Remove the folder, when the output is complete."""
        with os_errors(self._folder):
            self._opened().remove()
