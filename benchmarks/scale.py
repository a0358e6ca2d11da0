"""Simulate large conversions: the real planner, tasks and dispatcher, on a simulated clock.

    python -m benchmarks.scale [--size Qwen3.5-397B-A17B] [--recipe fp8 | --types Q4_K_M]
        [--workers 1 8 64] [--threads 4] [--read 0.62] [--network 1.25]

Plans a published size from its description, cuts the plan into tasks for each number of workers and
runs the dispatcher with workers whose time follows from their bytes. Rates are in GB/s: `--read`
of a thread that reads, encodes and writes (docs/benchmarks.md: 1.75 GB in 3.34 s of processor time
less 0.53 s of start-up, `search`; for GGUF see benchmarks/gguf.py), `--network` of a worker
to the shared file system; hashing is measured here, on one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen35.checkpoint.open import describe
from qwen35.codecs.registry import CODECS
from qwen35.execution.dispatch import JobOutcome, WorkerJob, WorkerPool, dispatch
from qwen35.planning.memory import peak_memory
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.step import Step
from qwen35.planning.tasks import Task, make_tasks, scheduled, task_bytes

GB = 1e9


@dataclass(frozen=True)
class Rates:
    """Bytes per second of a thread, of hashing, of a worker's network."""

    read: float
    hash: float
    network: float


class Clock(WorkerPool):
    """A pool of simulated workers; a job takes its ``seconds``."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self.now = 0.0
        self._running: list[tuple[float, int]] = []

    def close(self) -> None:
        """Do nothing."""

    @property
    def slots(self) -> int:
        """The number of workers."""
        return self._slots

    def begin(self, number: int, order: Mapping[str, Any]) -> None:
        """Record when a job will end."""
        heapq.heappush(self._running, (self.now + order["seconds"], number))

    def wait(self) -> Iterator[JobOutcome]:
        """Advance the clock to the end of a job."""
        self.now, number = heapq.heappop(self._running)
        yield JobOutcome(number, {"done": None})


@dataclass(frozen=True)
class Work:
    """Steps, and the sizes of the files that they fill."""

    steps: Sequence[Step]
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Outcome:
    """The simulated run: its seconds, the seconds of all jobs, their number, the longest job."""

    seconds: float
    work: float
    jobs: int
    longest: float


def simulate(work: Work, size: int, slots: int, threads: int, rate: Rates) -> Outcome:
    """Run the dispatcher over the tasks of some steps."""
    tasks = make_tasks(work.steps, size)
    unfilled = Counter(file for task in tasks for file in task.files)
    taken: list[float] = []

    def job(seconds: float, files: Sequence[str]) -> WorkerJob:
        def done(_: object) -> list[WorkerJob]:
            unfilled.subtract(files)
            return [hashing(file) for file in files if not unfilled[file]]

        taken.append(seconds)
        return WorkerJob("", {"seconds": seconds}, done)

    def filling(task: Task) -> WorkerJob:
        written = sum(step.nbytes for step in task.steps)
        encoding = max(task.nbytes / threads, max(map(alone, task.steps))) / rate.read
        return job(max(encoding, (task.nbytes + written) / rate.network), task.files)

    def hashing(file: str) -> WorkerJob:
        return job(work.sizes[file] / min(rate.hash, rate.network), ())

    clock = Clock(slots)
    dispatch(clock, [filling(task) for task in scheduled(tasks, size)])
    assert not any(unfilled.values())
    return Outcome(clock.now, sum(taken), len(taken), max(taken))


def alone(step: Step) -> int:
    """Return the bytes of a step that a single thread must process."""
    cut = all(CODECS[t.codec].independent and not t.copied for t in step.targets)
    return 0 if cut else step.read_bytes


def hash_rate() -> float:
    """Return the bytes that one thread hashes per second."""
    data = bytes(2**26)
    began = time.perf_counter()
    for _ in range(4):
        hashlib.sha256(data).digest()
    return 4 * len(data) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="Qwen3.5-397B-A17B")
    parser.add_argument("--recipe", default="fp8")
    parser.add_argument("--types", help="GGUF: file types, with commas")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--read", type=float, default=0.62)
    parser.add_argument("--network", type=float, default=1.25)
    args = parser.parse_args()
    rates = Rates(args.read * GB, hash_rate(), args.network * GB)
    began = time.perf_counter()
    if args.types:
        types = tuple(args.types.split(","))
        plan = make_plan(describe(args.size), load_recipe("mix", "gguf"), types=types)
    else:
        plan = make_plan(describe(args.size), load_recipe(args.recipe))
    planning = time.perf_counter() - began
    work = Work(tuple(plan.written), {file.name: file.nbytes for file in plan.files})
    read, written = plan.read_bytes, sum(work.sizes.values())
    largest = max(step.read_bytes for step in plan.steps)
    memory = peak_memory(plan, args.threads)
    print(f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}")
    print(
        f"{args.size}, {args.types or args.recipe}: reads {read / GB:.0f} GB, "
        f"writes {written / GB:.0f} GB in {len(work.sizes)} files, {len(plan.steps)} weights, "
        f"the largest {largest / GB:.2f} GB\n"
        f"planned in {planning:.1f} s, hashing "
        f"{rates.hash / GB:.2f} GB/s, a worker of {args.threads} threads {memory / GB:.2f} GB"
    )
    print(
        f"{'workers':>8} {'jobs':>6} {'time':>9} {'ideal':>9} {'longest job':>12} "
        f"{'all workers GB/s':>17} {'memory GB':>10}"
    )
    for workers in args.workers:
        size = task_bytes(plan, workers)
        found = simulate(work, size, workers, args.threads, rates)
        traffic = (read + 2 * written) / found.seconds
        print(
            f"{workers:>8} {found.jobs:>6} {found.seconds:>8.0f}s {found.work / workers:>8.0f}s "
            f"{found.longest:>11.1f}s {traffic / GB:>17.1f} {workers * memory / GB:>10.1f}"
        )


if __name__ == "__main__":
    main()
