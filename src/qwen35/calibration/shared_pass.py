"""The pass of a calibration by workers: windows are shared out, sums merged in their order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from qwen35.calibration.calibration_plan import CalibrationPlan
from qwen35.calibration.calibration_stream import save_checked
from qwen35.calibration.states import CalibrationFolder
from qwen35.calibration.sums import Sums
from qwen35.execution.dispatch import WorkerJob, WorkerPool, dispatch
from qwen35.forward.blocks import Block
from qwen35.forward.forward_stream import ForwardStream
from qwen35.forward.shared_windows import share_out, shares
from qwen35.planning.work_order import source_order

__all__ = ["run_shared"]


def run_shared(
    plan: CalibrationPlan, work: CalibrationFolder, stream: ForwardStream, pool: WorkerPool
) -> None:
    """Have workers run every unfinished block.

    Sums are those of batches, added up in the order of the text. So they do not depend on who
    computed which, nor on how many there were.

    Args:
        plan: the plan.
        work: its folder, on a file system that all workers see.
        stream: the pass, which looks up the embeddings.
        pool: the workers.

    Raises:
        InputError: an input was not finite; or as in one process.
        WorkerError: the workers of a job died at every attempt.
    """
    common = share_out(work.folder, _order(plan), plan.text.windows)
    with stream.torch.inference_mode():
        left = stream.begin()
    for block in left:
        merged = _Merged(work, block.name)
        request = {**common, "block": block.name, "number": stream.current}
        dispatch(pool, list(_jobs(plan, block, pool.slots, request, merged)))
        save_checked(work, block.name, merged.sums)
        stream.finish(block)


def _order(plan: CalibrationPlan) -> dict[str, Any]:
    return {
        **source_order(plan.checkpoint),
        "request": asdict(plan.request),
        "files": plan.text.files,
        "left_over": plan.text.left_over,
        "provenance": plan.provenance,
        "plan": plan.digest,
    }


class _Merged:
    """The sums of a block, merged in the order of the windows as they arrive."""

    def __init__(self, work: CalibrationFolder, block: str) -> None:
        self.sums: dict[str, Sums] = {}
        self._work, self._block = work, block
        self._next, self._arrived = 0, dict[int, int]()

    def add(self, windows: range) -> None:
        """Take the saved sums of windows, once all before them are there."""
        self._arrived[windows.start] = windows.stop
        while self._next in self._arrived:
            self._work.take_part(self._block, self._next, self.sums)
            self._next = self._arrived.pop(self._next)


def _jobs(
    plan: CalibrationPlan, block: Block, slots: int, request: dict[str, Any], merged: _Merged
) -> Iterator[WorkerJob]:
    """Yield the jobs of a block: windows from the first of a batch to the last of another."""
    for windows in shares(len(plan.text.windows), slots, plan.sizes.wide or plan.batch):

        def done(_: Any, windows: range = windows) -> list[WorkerJob]:
            merged.add(windows)
            return []

        name = f"{block.name}, windows {windows.start + 1} to {windows.stop}"
        yield WorkerJob(name, {**request, "windows": [windows.start, windows.stop]}, done)
