"""Tasks: the units of work handed to workers, runs of steps balanced by bytes.

They depend only on the plan and a size, so every worker on an output derives the same tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen35.planning.output_plan import Plan
from qwen35.planning.step import Step

__all__ = ["Task", "make_tasks", "scheduled", "share", "task_bytes"]

_MAX_BYTES = 10**9
_PER_WORKER = 8


@dataclass(frozen=True)
class Task:
    """A run of steps that write to the same files.

    Args:
        files: the output files.
        begin: index of its first step in `Plan.written`.
        steps: the steps.
    """

    files: tuple[str, ...]
    begin: int
    steps: tuple[Step, ...]

    @property
    def nbytes(self) -> int:
        """Bytes read, the measure of a task's cost."""
        return sum(step.read_bytes for step in self.steps)


def task_bytes(plan: Plan, workers: int) -> int:
    """Return the size of a task: an eighth of a worker's share, at most 1 GB."""
    return max(1, min(_MAX_BYTES, plan.read_bytes // (_PER_WORKER * workers)))


def make_tasks(steps: Sequence[Step], nbytes: int) -> tuple[Task, ...]:
    """Cut steps into tasks, in order.

    A task reads at most `nbytes`, unless a single step reads more. Two adjacent tasks on the same
    files read more than `nbytes` together, so the number of tasks is near the minimum.

    Args:
        steps: the steps of a plan that write something (`Plan.written`).
        nbytes: the most bytes a task may read.
    """
    tasks: list[Task] = []
    begin = size = 0
    for end, step in enumerate(steps):
        if end > begin:
            new_files = steps[begin].files != step.files
            if new_files or size + step.read_bytes > nbytes:
                tasks.append(Task(steps[begin].files, begin, tuple(steps[begin:end])))
                begin, size = end, 0
        size += step.read_bytes
    if steps:
        tasks.append(Task(steps[begin].files, begin, tuple(steps[begin:])))
    return tuple(tasks)


def scheduled(tasks: Sequence[Task], nbytes: int) -> list[Task]:
    """Return tasks in starting order.

    Tasks of at least twice `nbytes` (single large weights) come first, so that none is left running
    alone at the end. The others stay in order, so that a file is hashed while the next is filled.
    """
    return sorted(tasks, key=lambda task: -(task.nbytes // (2 * nbytes)))


def share(tasks: Sequence[Task], count: int) -> tuple[tuple[Task, ...], ...]:
    """Cut tasks into `count` runs of nearly equal bytes.

    A task belongs to the run that contains its midpoint, so no run exceeds an even share by more
    than the largest task.
    """
    shares: list[list[Task]] = [[] for _ in range(count)]
    total = sum(task.nbytes for task in tasks)
    done = 0
    for task in tasks:
        middle = 2 * done + task.nbytes
        number = middle * count // (2 * total) if total else 0
        shares[min(number, count - 1)].append(task)
        done += task.nbytes
    return tuple(map(tuple, shares))
