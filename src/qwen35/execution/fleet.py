"""Fill an output's files with a pool of workers; only this process writes the journal."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from qwen35.execution.dispatch import WorkerJob, WorkerPool, dispatch
from qwen35.planning.output_plan import Plan, PlannedFile
from qwen35.planning.step import Step
from qwen35.planning.tasks import Task, make_tasks, scheduled, task_bytes
from qwen35.planning.work_order import order_bytes, order_of
from qwen35.progress import Progress
from qwen35.sinks.files import write_file
from qwen35.sinks.tensor_writer import TensorWriter
from qwen35.sinks.work_folder import ORDER_NAME, fsync_folder

__all__ = ["FilledOutput", "fill"]


class FilledOutput(Protocol):
    """The output to fill (`qwen35.writing.open_output.OpenOutput`)."""

    plan: Plan
    folder: Path
    written: TensorWriter
    progress: Progress
    hashes: dict[str, str]
    compared: dict[str, Any]


def fill(
    output: FilledOutput,
    unfinished: Sequence[PlannedFile],
    pool: WorkerPool,
    *,
    check: bool = False,
) -> None:
    """Have workers run the remaining steps of a plan and hash the files.

    Args:
        output: in a folder that all workers can access; receives the SHA-256 of each unfinished
            file and the results of the checks.
        unfinished: files to complete.
        pool: the workers.
        check: compare what workers write with the source.

    Raises:
        InputError: a worker cannot access the source or the folder, or would write other bytes.
        WorkerError: the workers of a task died at every attempt.
    """
    plan, folder, written = output.plan, output.folder, output.written
    size = task_bytes(plan, pool.slots)
    order = order_bytes(order_of(plan, size, check=check, run=uuid4().hex))
    (folder.parent / ORDER_NAME).unlink(missing_ok=True)
    write_file(folder.parent / ORDER_NAME, order)
    fsync_folder(folder.parent)
    for file in unfinished:  # workers only open files that exist
        written.prepare(file.name, file.head, file.offsets, file.nbytes)
    common = {"work": os.fspath(folder.parent), "order": hashlib.sha256(order).hexdigest()}
    fleet = _Fleet(common, output)
    with pool:
        dispatch(pool, fleet.jobs(unfinished, size))


@dataclass
class _Fleet:
    """Shared state of one output's jobs.

    Args:
        common: the part that all requests have in common.
        output: the output to fill.

    Attributes:
        unfilled: number of unfinished tasks per file.
    """

    common: Mapping[str, Any]
    output: FilledOutput
    unfilled: Counter[str] = field(default_factory=Counter)

    def jobs(self, unfinished: Sequence[PlannedFile], size: int) -> list[WorkerJob]:
        """Return the jobs that can start now, in starting order."""
        jobs = []
        for task in scheduled(make_tasks(self.output.plan.written, size), size):
            steps = list(self._steps(task))
            if steps:
                self.unfilled.update(task.files)
                jobs.append(self._task(task, steps))
        filled = [file.name for file in unfinished if not self.unfilled[file.name]]
        return [*map(self._hashing, filled), *jobs]

    def _steps(self, task: Task) -> Iterator[int]:
        """Yield a task's unfinished steps by their number in `Plan.written`."""
        for number, step in enumerate(task.steps, task.begin):
            if not all(self.output.written.has(*entry) for entry in _entries(step)):
                yield number

    def _task(self, task: Task, steps: Sequence[int]) -> WorkerJob:
        unfinished = [task.steps[i - task.begin] for i in steps]
        first = unfinished[0].weight.name
        others = f" and {len(steps) - 1} more" if len(steps) > 1 else ""

        def done(answer: Mapping[str, Any]) -> list[WorkerJob]:
            for file, tensors in answer["tensors"].items():
                self.output.written.filled(file, tensors)
            self.output.compared.update(answer["compared"])
            for step in unfinished:
                self.output.progress.advance(step.read_bytes, step.weight.name)
            self.unfilled.subtract(task.files)
            return [self._hashing(file) for file in task.files if not self.unfilled[file]]

        return WorkerJob(f"{first}{others}", {**self.common, "steps": list(steps)}, done)

    def _hashing(self, name: str) -> WorkerJob:
        def done(digest: str) -> list[WorkerJob]:
            self.output.written.hashed(name, digest)
            self.output.hashes[name] = digest
            return []

        return WorkerJob(f"{name} (being hashed)", {**self.common, "hash": name}, done)


def _entries(step: Step) -> Iterator[tuple[str, str]]:
    """Yield a step's journal entries: each file that it writes, with the first tensor in it."""
    for target in step.targets:
        for file in target.files:
            yield file, target.outputs[0].name
