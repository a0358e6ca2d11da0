"""Filling the files of an output by a pool of workers; the journal is written here alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from qwen35.plan.order import ORDER_NAME, order_bytes, order_of
from qwen35.plan.plan import Plan, PlannedFile
from qwen35.plan.tasks import Task, make_tasks, scheduled, task_bytes
from qwen35.progress import Progress
from qwen35.sinks.files import write_file
from qwen35.sinks.journal import fsync_folder
from qwen35.sinks.written import Written
from qwen35.work.dispatch import Job, Pool, dispatch

__all__ = ["fill"]


def fill(
    plan: Plan,
    folder: Path,
    written: Written,
    left: Sequence[PlannedFile],
    pool: Pool,
    progress: Progress,
) -> dict[str, str]:
    """Have workers carry out what is left of a plan's steps, and hash the files.

    Args:
        plan: what is executed.
        folder: the output's files, in a folder that all workers see.
        written: the same files, and the journal.
        left: those that are not finished.
        pool: the workers.
        progress: told of the bytes that finished tasks have read.

    Returns:
        SHA-256 of each of `left`.

    Raises:
        InputError: a worker does not see the source or the folder, or would make other bytes.
        WorkerError: workers died at a task again and again.
    """
    size = task_bytes(plan, pool.slots)
    order = order_bytes(order_of(plan, size, run=uuid4().hex))
    (folder.parent / ORDER_NAME).unlink(missing_ok=True)
    write_file(folder.parent / ORDER_NAME, order)
    fsync_folder(folder.parent)
    for file in left:
        written.prepare(file.name, file.head, file.offsets, file.nbytes)
    common = {"work": os.fspath(folder.parent), "order": hashlib.sha256(order).hexdigest()}
    fleet = _Fleet(common, written, progress)
    with pool:
        dispatch(pool, fleet.jobs(left, size))
    return fleet.hashes


@dataclass
class _Fleet:
    """What the jobs of one output share.

    Args:
        common: what all of them tell a worker.
        written: the files.
        progress: of the run.

    Attributes:
        hashes: of the files that are finished.
        unfilled: tasks that are left of each file.
    """

    common: Mapping[str, Any]
    written: Written
    progress: Progress
    hashes: dict[str, str] = field(default_factory=dict)
    unfilled: dict[str, int] = field(default_factory=dict)

    def jobs(self, left: Sequence[PlannedFile], size: int) -> list[Job]:
        """Return what can be done at once, in the order in which to begin it."""
        jobs = []
        for task in scheduled(make_tasks(left, size), size):
            steps = [i for i, _ in self._steps(task)]
            if steps:
                self.unfilled[task.file] = self.unfilled.get(task.file, 0) + 1
                jobs.append(self._task(task, steps))
        return [self._hashing(f.name) for f in left if f.name not in self.unfilled] + jobs

    def _steps(self, task: Task) -> Iterator[tuple[int, str]]:
        """Yield the steps that are left of a task: number in the file, and first tensor."""
        for number, step in enumerate(task.steps, task.begin):
            tensor = step.outputs[0].name
            if not self.written.has(task.file, tensor):
                yield number, tensor

    def _task(self, task: Task, steps: Sequence[int]) -> Job:
        chosen = [task.steps[i - task.begin] for i in steps]
        first = chosen[0].weight.name
        more = f" and {len(steps) - 1} more" if len(steps) > 1 else ""

        def done(tensors: Sequence[str]) -> list[Job]:
            self.written.filled(task.file, tensors)
            for step in chosen:
                self.progress.advance(step.weight.nbytes, step.weight.name)
            self.unfilled[task.file] -= 1
            return [] if self.unfilled[task.file] else [self._hashing(task.file)]

        order = {**self.common, "file": task.file, "steps": list(steps)}
        return Job(f"{first}{more}", order, done)

    def _hashing(self, name: str) -> Job:
        def done(digest: str) -> list[Job]:
            self.written.hashed(name, digest)
            self.hashes[name] = digest
            return []

        return Job(f"{name} (being hashed)", {**self.common, "hash": name}, done)
