"""The pass of a calibration by workers: windows are shared out, sums merged in their order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from qwen35.calibration.calibration_plan import CalibrationPlan
from qwen35.calibration.calibration_stream import block_hessians, save_checked
from qwen35.calibration.hessian_files import BlockHessians
from qwen35.calibration.hessian_inputs import Matrix, Tokens
from qwen35.calibration.hessian_totals import triangles_in
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

    Sums are those of batches, added up in the order of the text; those of Hessians, which are as
    large as weights, are those of the plan's parts of it. So they do not depend on who computed
    which, nor on how many there were.

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
        hessians = block_hessians(plan, work, block.name) if plan.hessians else None
        merged = _Merged(work, block.name, hessians)
        request = {**common, "block": block.name, "number": stream.current}
        unfinished = True
        while unfinished:
            dispatch(pool, list(_jobs(plan, block, pool.slots, request, merged)))
            unfinished = merged.passed()
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
    """The sums of a block, merged in the order of the windows as they arrive.

    Args:
        work: where workers leave them.
        block: its name.
        hessians: of it, which may need further passes of all windows.
    """

    def __init__(self, work: CalibrationFolder, block: str, hessians: BlockHessians | None) -> None:
        self.sums: dict[str, Sums] = {}
        self._work, self._block, self._hessians = work, block, hessians
        self._next, self._arrived = 0, dict[int, int]()
        self._fit, self._held_out = Counter[Matrix](), Counter[Matrix]()

    def told(self, windows: range) -> Mapping[str, Any]:
        """Return what else a job of the current pass is told."""
        if self._hessians is None:
            return {}
        part = self._hessians.part(windows.start).name
        return {"wanted": self._hessians.wanted, "part": part}

    def add(self, windows: range, tokens: Any) -> None:
        """Take the saved sums of windows, once all before them are there.

        Args:
            windows: the windows.
            tokens: what the job counted: name, expert and both numbers of each matrix.
        """
        for name, expert, fit, held_out in tokens or ():
            self._fit[Matrix(name, expert)] += fit
            self._held_out[Matrix(name, expert)] += held_out
        self._arrived[windows.start] = windows.stop
        while self._next in self._arrived:
            self._take(self._next)
            self._next = self._arrived.pop(self._next)

    def _take(self, first: int) -> None:
        if self._hessians is None or self._hessians.wanted is None:
            self._work.take_part(self._block, first, self.sums)
        if self._hessians is not None:
            part = self._hessians.part(first)
            self._hessians.merge(triangles_in(part, self._hessians.columns))
            part.unlink()

    def passed(self) -> bool:
        """Return whether all windows pass the block once more."""
        self._next = 0
        if self._hessians is None:
            return False
        tokens = {one: Tokens(fit, self._held_out[one]) for one, fit in self._fit.items()}
        return self._hessians.passed(tokens)


def _jobs(
    plan: CalibrationPlan, block: Block, slots: int, request: dict[str, Any], merged: _Merged
) -> Iterator[WorkerJob]:
    """Yield the jobs of a block: windows from the first of a batch to the last of another."""
    for windows in _shares(plan, slots):

        def done(tokens: Any, windows: range = windows) -> list[WorkerJob]:
            merged.add(windows, tokens)
            return []

        told = {**request, **merged.told(windows), "windows": [windows.start, windows.stop]}
        name = f"{block.name}, chunks {windows.start + 1} to {windows.stop}"
        yield WorkerJob(name, told, done)


def _shares(plan: CalibrationPlan, slots: int) -> Iterator[range]:
    """Yield the windows of each job; with Hessians, those of a part."""
    count = len(plan.text.windows)
    if plan.hessians is None:
        return shares(count, slots, plan.sizes.wide or plan.batch)
    parts = range(0, count, plan.part)
    return (range(first, min(count, first + plan.part)) for first in parts)
