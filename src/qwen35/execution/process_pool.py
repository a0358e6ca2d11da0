"""Workers as processes on this machine; GPUs, if any, are dealt out among them."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from qwen35.codecs.devices import gpu_numbers
from qwen35.execution.dispatch import JobOutcome, WorkerPool
from qwen35.threads import default_threads

__all__ = ["MODULE", "ProcessPool"]

MODULE = "qwen35.execution.worker_process"
"""The module that a worker process runs, unless its pool is told another."""


class ProcessPool(WorkerPool):
    """A pool of processes; each starts with its first job.

    Args:
        count: number of processes.
        device: to encode on; each process gets one GPU, round-robin.
        threads: per process; by default the processors divided among them.
        module: what a process runs, which calls `qwen35.execution.worker_process.serve`.

    Raises:
        UsageError: the device does not exist.
    """

    def __init__(
        self, count: int, *, device: str = "auto", threads: int | None = None, module: str = ""
    ) -> None:
        self._threads = threads or max(1, default_threads() // count)
        gpus = gpu_numbers(device)
        self._device = "cuda" if gpus else "cpu"
        self._free = [_Slot(worker_environment(gpus, i), module or MODULE) for i in range(count)]
        self._busy: dict[int, _Slot] = {}

    def close(self) -> None:
        """Kill all processes."""
        for slot in (*self._free, *self._busy.values()):
            slot.end()

    @property
    def slots(self) -> int:
        """One per process."""
        return len(self._free) + len(self._busy)

    @property
    def pids(self) -> list[int]:
        """Ids of the running processes, for tests and monitoring."""
        slots = (*self._free, *self._busy.values())
        return [slot.process.pid for slot in slots if slot.process and slot.process.poll() is None]

    def begin(self, number: int, request: Mapping[str, Any]) -> None:
        """Send a job to an idle process."""
        slot = self._busy[number] = self._free.pop(0)
        slot.begin({**request, "device": self._device, "threads": self._threads})

    def wait(self) -> Iterator[JobOutcome]:
        """Wait until a job or its process ends; yield all jobs that ended."""
        with selectors.DefaultSelector() as selector:
            for number, slot in self._busy.items():
                selector.register(slot.answers, selectors.EVENT_READ, number)
            ready = [key.data for key, _ in selector.select()]
        for number in ready:
            slot = self._busy.pop(number)
            line = slot.answers.readline()  # a partial line, or none: the process died
            lost = "" if line.endswith("\n") else slot.end()
            self._free.append(slot)
            yield JobOutcome(number, None if lost else json.loads(line), lost)


class _Slot:
    """Holds one process, and replaces one that died."""

    def __init__(self, environment: Mapping[str, str], module: str) -> None:
        self._environment, self._module = environment, module
        self.process: subprocess.Popen[str] | None = None

    @property
    def answers(self) -> IO[str]:
        assert self.process is not None
        assert self.process.stdout is not None
        return self.process.stdout

    def begin(self, job: Mapping[str, Any]) -> None:
        if self.process is None or self.process.poll() is not None:
            self.end()
            self.process = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-P", "-m", self._module],  # -P: import nothing from where we work
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
                process_group=0,  # Ctrl-C reaches this process only, which then kills its workers
            )
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has just died: `wait` reports that
            self.process.stdin.write(f"{json.dumps(job)}\n")
            self.process.stdin.flush()

    def end(self) -> str:
        """Kill the process if it is running; return how it ended."""
        if self.process is None:
            return ""
        process, self.process = self.process, None
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def worker_environment(gpus: Sequence[int], number: int) -> dict[str, str]:
    """Return a worker's environment: this package, one BLAS thread, its GPU."""
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {"OPENBLAS_NUM_THREADS": "1", **os.environ}  # BLAS threads would spin
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))  # no empty entries: see -P
    environment["PYTHONSAFEPATH"] = "1"  # for interpreters that libraries start
    if gpus:
        # numbers count the visible GPUs only, so look up the entry of the list we inherited
        gpu = gpus[number % len(gpus)]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    return environment
