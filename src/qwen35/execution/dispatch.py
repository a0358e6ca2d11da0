"""Dispatch jobs to a pool of workers, and retry jobs whose worker dies."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from qwen35.closing import Closing
from qwen35.errors import WorkerError
from qwen35.execution.failures import raise_failure

__all__ = ["TRIES", "JobOutcome", "WorkerJob", "WorkerPool", "dispatch"]

TRIES = 3
"""Attempts at a job whose worker dies."""


@dataclass(frozen=True)
class WorkerJob:
    """A job for a worker.

    Args:
        name: shown in progress and errors.
        request: plain JSON for the worker.
        done: receives the worker's result; returns the jobs that can start now.
    """

    name: str
    request: Mapping[str, Any]
    done: Callable[[Any], Sequence[WorkerJob]]


@dataclass(frozen=True)
class JobOutcome:
    """The end of a job.

    Args:
        number: the job's number.
        answer: returned by `qwen35.execution.worker.answer`; None if the worker died.
        lost: how the worker died.
    """

    number: int
    answer: Mapping[str, Any] | None
    lost: str = ""


class WorkerPool(Closing):
    """A set of workers; closing the pool kills them, busy or not."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """Number of jobs to run at once."""

    @abstractmethod
    def begin(self, number: int, request: Mapping[str, Any]) -> None:
        """Start a job on a free worker."""

    @abstractmethod
    def wait(self) -> Iterable[JobOutcome]:
        """Wait until a job ends; return all jobs that ended."""


def dispatch(pool: WorkerPool, jobs: Iterable[WorkerJob]) -> None:
    """Run all jobs; no slot of the pool is idle while jobs are waiting.

    A job whose worker dies gets up to `TRIES` attempts; other jobs are not affected.

    Raises:
        WorkerError: a job's worker died at every attempt.
        Qwen35Error: a worker raised it; OSError and MemoryError are raised likewise.
        WorkerBugError: a worker raised any other exception.
    """
    todo = deque(jobs)
    running: dict[int, WorkerJob] = {}
    deaths: Counter[str] = Counter()
    numbers = count()
    while todo or running:
        while todo and len(running) < pool.slots:
            number = next(numbers)
            running[number] = todo.popleft()
            pool.begin(number, running[number].request)
        for outcome in pool.wait():
            job = running.pop(outcome.number)
            if outcome.answer is None:
                deaths[job.name] += 1
                if deaths[job.name] == TRIES:
                    raise _worker_error(job, outcome.lost)
                todo.appendleft(job)
            elif "failure" in outcome.answer:
                raise_failure(outcome.answer["failure"])
            else:
                # new jobs go first: a full file is hashed while other files are being filled
                todo.extendleft(job.done(outcome.answer["done"]))


def _worker_error(job: WorkerJob, lost: str) -> WorkerError:
    return WorkerError(
        job.name,
        f"its worker died {TRIES} times ({lost})",
        hint="it may have run out of memory: use fewer --workers or --threads",
    )
