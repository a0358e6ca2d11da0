"""Tasks: what is handed to a worker at a time. Runs of steps, balanced by bytes.

They follow from the plan and a size alone, so that all who work on an output agree on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen35.planning.output_plan import Plan
from qwen35.planning.step import Step

__all__ = ["Task", "make_tasks", "scheduled", "share", "task_bytes"]

_MOST_BYTES = 10**9
_PER_WORKER = 8


@dataclass(frozen=True)
class Task:
    """A run of steps that write to the same files.

    Args:
        files: the output files that they fill.
        begin: number of the first of its steps among those of the plan that write something.
        steps: the steps.
    """

    files: tuple[str, ...]
    begin: int
    steps: tuple[Step, ...]

    @property
    def nbytes(self) -> int:
        """Bytes read, which are what a task costs."""
        return sum(step.read_bytes for step in self.steps)


def task_bytes(plan: Plan, workers: int) -> int:
    """Return the size of a task for so many workers: 1 GB, or an eighth of a worker's share."""
    return max(1, min(_MOST_BYTES, plan.read_bytes // (_PER_WORKER * workers)))


def make_tasks(steps: Sequence[Step], nbytes: int) -> tuple[Task, ...]:
    """Cut steps into tasks, in order.

    A task reads at most `nbytes`, or is a single step that reads more. Two tasks that follow each
    other with the same files read more than `nbytes` together, so there are not many more than
    needed.

    Args:
        steps: those of a plan that write something (`Plan.written`).
        nbytes: that a task may read.
    """
    tasks: list[Task] = []
    begin = size = 0
    for end, step in enumerate(steps):
        if end > begin:
            other = steps[begin].files != step.files
            if other or size + step.read_bytes > nbytes:
                tasks.append(Task(steps[begin].files, begin, tuple(steps[begin:end])))
                begin, size = end, 0
        size += step.read_bytes
    if steps:
        tasks.append(Task(steps[begin].files, begin, tuple(steps[begin:])))
    return tuple(tasks)


def scheduled(tasks: Sequence[Task], nbytes: int) -> list[Task]:
    """Return tasks in the order in which to begin them.

    Those of twice `nbytes` and more, single large weights, come first, so that none is left for the
    end. The others stay in order, so that a file is hashed while the next ones are filled.
    """
    return sorted(tasks, key=lambda task: -(task.nbytes // (2 * nbytes)))


def share(tasks: Sequence[Task], count: int) -> tuple[tuple[Task, ...], ...]:
    """Cut tasks into `count` runs of nearly the same bytes.

    A task is in the run where its middle lies: no run exceeds its even share by more than the
    largest task.
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
