"""Workers on a Ray cluster. Ray places and runs jobs; dispatching and retrying are ours."""

from __future__ import annotations

import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from qwen35.errors import UsageError, extra_hint
from qwen35.execution.dispatch import JobOutcome, WorkerPool
from qwen35.execution.failures import Work
from qwen35.execution.worker import answer

__all__ = ["RayWorkers"]

_THREADS = 4
"""Default threads per job. Each process makes the plan once, so few processes with several
threads cost less than many with one."""


class RayWorkers(WorkerPool):
    """Workers on a Ray cluster.

    A job takes one processor per thread and, with ``cuda``, one GPU. Ray's retries are off: a lost
    job returns to the dispatcher, which counts attempts.

    Args:
        address: as `ray.init` takes it: ``auto`` or ``HOST:PORT``. An existing connection of this
            process is used and left open.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: per job; by default 4, or all processors of a smaller node.
        work: does a job; that of a conversion by default.

    Raises:
        UsageError: Ray is not installed, no cluster answers, or no node has what a job needs.
    """

    def __init__(
        self,
        address: str,
        *,
        device: str = "auto",
        threads: int | None = None,
        work: Work | None = None,
    ) -> None:
        if device not in ("auto", "cpu", "cuda"):
            hint = "Ray chooses which"
            raise UsageError(f"--device {device}", "on Ray", expected="cpu or cuda", hint=hint)
        try:
            import ray
        except ImportError as error:
            found, hint = "Ray is not installed", extra_hint("ray")
            raise UsageError("--ray-address", found, hint=hint) from error
        self._ray = ray
        self._address = address
        self._gpus = int(device == "cuda")
        self._device = "cuda" if self._gpus else "cpu"
        self._running: dict[Any, int] = {}
        self._owns_connection = not ray.is_initialized()
        self._connect()
        try:
            self._threads = self._job_threads(threads)
        except UsageError:
            self._disconnect()
            raise
        needs = {"num_cpus": self._threads, "num_gpus": self._gpus, "max_retries": 0}
        # max_calls=0: Ray ends a process with a GPU after each task, but ours has made the plan
        self._remote = ray.remote(**needs, max_calls=0)(work or answer)

    def _connect(self) -> None:
        if not self._owns_connection:
            return
        try:
            _reach(self._address)
            # Without a folder of its own, Ray has workers import from the driver's: an empty one
            with tempfile.TemporaryDirectory(prefix="qwen35-") as folder:
                environment = {"working_dir": folder, "env_vars": {"PYTHONSAFEPATH": "1"}}
                with _kept_handler(signal.SIGTERM):
                    self._ray.init(
                        address=self._address,
                        runtime_env=environment,
                        log_to_driver=False,
                        logging_level="ERROR",
                    )
        except (OSError, RuntimeError, ValueError) as error:
            first = str(error).strip().partition("\n")[0]
            raise UsageError(
                f"--ray-address {self._address}",
                f"no Ray cluster answers ({first})",
                hint="start one with `ray start --head`, or give the address of its head",
            ) from error

    def _disconnect(self) -> None:
        if self._owns_connection:
            self._ray.shutdown()

    def close(self) -> None:
        """Cancel the running jobs, and close the connection if this pool opened it."""
        running, self._running = self._running, {}
        for reference in running:
            with suppress(self._ray.exceptions.RayError):
                self._ray.cancel(reference, force=True)
        self._disconnect()

    def _nodes(self) -> list[Mapping[str, float]]:
        """Return the total resources of each live node."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _job_threads(self, threads: int | None) -> int:
        """Return the threads per job, if a node can run it."""
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
        """Number of jobs that the current nodes can run at once."""
        return max(1, sum(self._node_slots(node) for node in self._nodes()))

    def _node_slots(self, node: Mapping[str, float]) -> int:
        jobs = int(node.get("CPU", 0)) // self._threads
        return min(jobs, int(node.get("GPU", 0))) if self._gpus else jobs

    def begin(self, number: int, request: Mapping[str, Any]) -> None:
        """Submit a job to Ray."""
        job = {**request, "device": self._device, "threads": self._threads}
        self._running[self._remote.remote(job)] = number

    def wait(self) -> Iterator[JobOutcome]:
        """Wait until a job ends or is lost; yield it."""
        ready: Sequence[Any]
        ready, _ = self._ray.wait(list(self._running), num_returns=1)
        for reference in ready:
            yield self._outcome(self._running.pop(reference), reference)

    def _outcome(self, number: int, reference: Any) -> JobOutcome:
        exceptions = self._ray.exceptions
        try:
            return JobOutcome(number, self._ray.get(reference))
        except exceptions.RayTaskError as error:  # `answer` never raises: import failed
            raise UsageError(
                f"--ray-address {self._address}",
                "a node of the cluster cannot import qwen35",
                hint="install the same version on every node",
            ) from error
        except exceptions.RayError as error:
            return JobOutcome(number, None, _first_words(error))


@contextmanager
def _kept_handler(number: signal.Signals) -> Iterator[None]:
    """Put a signal's handler back at the end: Ray's leaves without tidying."""
    handler = signal.getsignal(number)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(number, handler)


def _reach(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT; Ray itself would retry for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _first_words(error: Exception) -> str:
    """Return the class and first sentence of a Ray error; the whole text fills a screen."""
    sentence = str(error).strip().partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {sentence}"
