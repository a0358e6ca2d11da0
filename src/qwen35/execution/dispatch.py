"""Handing out jobs: to processes here or elsewhere, again when one dies, until all are done."""

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
"""How often a job is begun whose worker dies."""


@dataclass(frozen=True)
class WorkerJob:
    """Something to be done by a worker.

    Args:
        name: what it is about, for people.
        order: for the worker, plain JSON.
        done: told of the worker's answer; returns jobs that can be done from now on.
    """

    name: str
    order: Mapping[str, Any]
    done: Callable[[Any], Sequence[WorkerJob]]


@dataclass(frozen=True)
class JobOutcome:
    """How a job ended.

    Args:
        number: of the job.
        answer: of `qwen35.execution.worker.answer`; None if the worker died.
        lost: how it died.
    """

    number: int
    answer: Mapping[str, Any] | None
    lost: str = ""


class WorkerPool(Closing):
    """Workers, wherever they are; closing it ends all of them, whatever they are doing."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """How many jobs are worth beginning at once."""

    @abstractmethod
    def begin(self, number: int, order: Mapping[str, Any]) -> None:
        """Give a job to a worker."""

    @abstractmethod
    def wait(self) -> Iterable[JobOutcome]:
        """Wait until a job ends; return all that have."""


def dispatch(pool: WorkerPool, jobs: Iterable[WorkerJob]) -> None:
    """Have all jobs done; no slot of the pool is idle while one is left to begin.

    A job whose worker dies is begun again, `TRIES` times in all; that costs no other job.

    Raises:
        WorkerError: its workers died each time.
        Qwen35Error: what went wrong in a worker; so are OSError and MemoryError.
        WorkerBugError: a bug of ours in a worker.
    """
    todo = deque(jobs)
    running: dict[int, WorkerJob] = {}
    deaths: Counter[str] = Counter()
    numbers = count()
    while todo or running:
        while todo and len(running) < pool.slots:
            number = next(numbers)
            running[number] = todo.popleft()
            pool.begin(number, running[number].order)
        for ended in pool.wait():
            job = running.pop(ended.number)
            if ended.answer is None:
                deaths[job.name] += 1
                if deaths[job.name] == TRIES:
                    raise _hopeless(job, ended.lost)
                todo.appendleft(job)
            elif "failure" in ended.answer:
                raise_failure(ended.answer["failure"])
            else:
                todo.extendleft(job.done(ended.answer["done"]))


def _hopeless(job: WorkerJob, lost: str) -> WorkerError:
    return WorkerError(
        job.name,
        f"its worker died {TRIES} times ({lost})",
        hint="perhaps for want of memory: use fewer --workers or fewer --threads",
    )
