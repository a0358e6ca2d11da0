"""Workers on the machines of a Ray cluster. Ray places and runs the jobs; all else is ours."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from qwen35.errors import UsageError
from qwen35.execution.dispatch import JobOutcome, WorkerPool
from qwen35.execution.worker import answer

__all__ = ["RayWorkers"]

_THREADS = 4
"""Of a job, where machines have as many processors: each process makes the plan once."""


class RayWorkers(WorkerPool):
    """Workers on a Ray cluster.

    A job takes a processor for each thread, and with ``cuda`` a GPU. Ray itself repeats nothing:
    a lost job comes back to the dispatcher, which counts.

    Args:
        address: of the cluster, as `ray.init` takes it: ``auto``, ``HOST:PORT``. A connection
            that the process has already is used, and left open.
        device: ``auto`` or ``cpu``, or ``cuda``.
        threads: of a job; 4, or as many as a machine has processors, if not given.

    Raises:
        UsageError: Ray is not installed, there is no such cluster, or none of its machines has
            what a job needs.
    """

    def __init__(self, address: str, *, device: str = "auto", threads: int | None = None) -> None:
        if device not in ("auto", "cpu", "cuda"):
            hint = "Ray chooses which"
            raise UsageError(f"--device {device}", "on Ray", expected="cpu or cuda", hint=hint)
        try:
            import ray
        except ImportError as error:
            hint = "pip install 'qwen35[ray]'"
            raise UsageError("--ray-address", "Ray is not installed", hint=hint) from error
        self._ray = ray
        self._address = address
        self._gpus = int(device == "cuda")
        self._device = "cuda" if self._gpus else "cpu"
        self._running: dict[Any, int] = {}
        self._ours = not ray.is_initialized()
        self._connect()
        try:
            self._threads = self._fitting(threads)
        except UsageError:
            self._disconnect()
            raise
        needs = {"num_cpus": self._threads, "num_gpus": self._gpus, "max_retries": 0}
        # processes with GPUs too are used again: each has made the plan, and keeps its first GPU
        self._remote = ray.remote(**needs, max_calls=0)(answer)

    def _connect(self) -> None:
        if not self._ours:
            return
        try:
            _reach(self._address)
            self._ray.init(address=self._address, log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError) as error:
            first = str(error).strip().partition("\n")[0]
            raise UsageError(
                f"--ray-address {self._address}",
                f"no Ray cluster answers ({first})",
                hint="start one with `ray start --head`, or give the address of its head",
            ) from error

    def _disconnect(self) -> None:
        if self._ours:
            self._ray.shutdown()

    def close(self) -> None:
        """End the jobs that are running, and the connection if it is ours."""
        running, self._running = self._running, {}
        for reference in running:
            with suppress(self._ray.exceptions.RayError):
                self._ray.cancel(reference, force=True)
        self._disconnect()

    def _nodes(self) -> list[Mapping[str, float]]:
        """Return what each machine of the cluster that lives has in all."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _fitting(self, threads: int | None) -> int:
        """Return the threads of a job, if some machine can run it."""
        flag, nodes = f"--ray-address {self._address}", self._nodes()
        fit = [node for node in nodes if node.get("GPU", 0) >= self._gpus]
        if not fit:
            found = f"none of the {len(nodes)} nodes of the cluster has a GPU"
            hint = "add one, or leave --device cuda out: CPUs are enough"
            raise UsageError(flag, found, hint=hint)
        most = int(max(node.get("CPU", 0) for node in fit))
        threads = threads or max(1, min(_THREADS, most))
        if most < threads:
            what = "node with a GPU" if self._gpus else "node"
            raise UsageError(
                flag, f"no {what} has more than {most} processors", hint="fewer --threads"
            )
        return threads

    @property
    def slots(self) -> int:
        """How many jobs the cluster can run at once, as it is now."""
        return max(1, sum(self._room(node) for node in self._nodes()))

    def _room(self, node: Mapping[str, float]) -> int:
        jobs = int(node.get("CPU", 0)) // self._threads
        return min(jobs, int(node.get("GPU", 0))) if self._gpus else jobs

    def begin(self, number: int, order: Mapping[str, Any]) -> None:
        """Give a job to Ray."""
        job = {**order, "device": self._device, "threads": self._threads}
        self._running[self._remote.remote(job)] = number

    def wait(self) -> Iterator[JobOutcome]:
        """Wait until a job ends or is lost; return it."""
        ready: Sequence[Any]
        ready, _ = self._ray.wait(list(self._running), num_returns=1)
        for reference in ready:
            yield self._ended(self._running.pop(reference), reference)

    def _ended(self, number: int, reference: Any) -> JobOutcome:
        exceptions = self._ray.exceptions
        try:
            return JobOutcome(number, self._ray.get(reference))
        except exceptions.RayTaskError as error:  # `answer` raises nothing: it could not be loaded
            raise UsageError(
                f"--ray-address {self._address}",
                "a node of the cluster cannot import qwen35",
                hint="install the same version on every node",
            ) from error
        except exceptions.RayError as error:
            return JobOutcome(number, None, _first_words(error))


def _reach(address: str) -> None:
    """Try whether anything listens at HOST:PORT: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _first_words(error: Exception) -> str:
    """Return the name of Ray's error and the first sentence of it, which goes on at length."""
    said = str(error).strip().partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {said}"
