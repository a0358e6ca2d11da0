"""Workers in this process, for tests of what they share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from qwen35.calibration.share_worker import answer
from qwen35.execution.dispatch import JobOutcome, WorkerPool
from qwen35.execution.failures import Work

__all__ = ["Here"]


class Here(WorkerPool):
    """Workers in this process; whichever began last is the first to end.

    Args:
        count: how many.
        deaths: jobs whose worker dies when it has done them, by their number.
        work: what they do; that of a calibration by default.
    """

    def __init__(self, count: int, deaths: tuple[int, ...] = (), work: Work = answer) -> None:
        self._count, self._deaths, self._work = count, deaths, work
        self._running: dict[int, Mapping[str, Any]] = {}
        self.done: list[Mapping[str, Any]] = []

    @property
    def slots(self) -> int:
        return self._count

    def begin(self, number: int, request: Mapping[str, Any]) -> None:
        self._running[number] = request

    def wait(self) -> Iterator[JobOutcome]:
        number = max(self._running)
        job = {**self._running.pop(number), "device": "cpu", "threads": 1}
        told = self._work(json.loads(json.dumps(job)))
        self.done.append(job)
        yield JobOutcome(number, None if number in self._deaths else told, "killed")

    def close(self) -> None:
        self._running.clear()
