"""The choice of workers: threads, processes, a Ray cluster, or slices."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from qwen35.errors import UsageError
from qwen35.execution.dispatch import WorkerPool
from qwen35.execution.failures import Work
from qwen35.planning.memory import peak_memory, threads_within
from qwen35.planning.output_plan import Plan
from qwen35.threads import default_threads

__all__ = ["check_workers", "pool_for", "pool_of", "threads_each"]

_PER_PROCESSOR = 8
"""Worker processes per processor: each takes memory and a second to start."""


def check_workers(
    workers: int | None,
    ray_address: str | None,
    part: tuple[int, int] | None,
    memory: int | None,
) -> None:
    """Refuse options that exclude each other.

    Raises:
        UsageError: two of them are given, or a memory limit that cannot be enforced.
    """
    flags = {"--workers": workers, "--ray-address": ray_address, "--slice": part}
    given = [flag for flag, value in flags.items() if value is not None]
    if len(given) > 1:
        raise UsageError(" and ".join(given), "exclude each other", hint="give one of them")
    most = _PER_PROCESSOR * default_threads()
    if workers is not None and workers > most:
        found = f"{workers} on {default_threads()} processors"
        raise UsageError("--workers", found, expected=f"at most {most}")
    if part is not None and not 1 <= part[0] <= part[1]:
        found = f"{part[0]}/{part[1]}"
        raise UsageError("--slice", found, expected="i/N, with i from 1 to N")
    if ray_address is not None and memory is not None:
        hint = "give --threads: each job on the cluster uses that many"
        raise UsageError("--memory", "applies to this machine only", hint=hint)


def pool_for(
    plan: Plan,
    workers: int | None,
    ray_address: str | None,
    *,
    device: str,
    threads: int | None,
    memory: int | None,
) -> AbstractContextManager[WorkerPool | None]:
    """Return the pool of workers of a conversion; None for threads of this process.

    Raises:
        UsageError: they are not available, or need more than `memory`.
    """
    if workers is not None:
        threads = _threads_each(plan, workers, threads, memory)
    return pool_of(workers, ray_address, device=device, threads=threads)


def pool_of(
    workers: int | None,
    ray_address: str | None,
    *,
    device: str,
    threads: int | None,
    work: Callable[[], tuple[str, Work]] | None = None,
) -> AbstractContextManager[WorkerPool | None]:
    """Return a pool of workers; None for threads of this process.

    Args:
        workers: number of processes.
        ray_address: of a cluster.
        device: for the workers.
        threads: of each; a share of the processors, or what Ray's workers take, if None.
        work: returns the module that a process runs, and what a job of Ray calls; those of a
            conversion by default.

    Raises:
        UsageError: they are not available.
    """
    module, answer = work() if work else ("", None)
    if ray_address is not None:
        # imported late: Ray is an optional dependency
        from qwen35.execution.ray_workers import RayWorkers

        return RayWorkers(ray_address, device=device, threads=threads, work=answer)
    if workers is not None:
        from qwen35.execution.process_pool import ProcessPool

        return ProcessPool(workers, device=device, threads=threads, module=module)
    return nullcontext()


def threads_each(workers: int | None, ray_address: str | None, threads: int | None) -> int:
    """Return the threads of each worker of `pool_of`, or of this process, as far as is known here.

    Args:
        workers: number of processes.
        ray_address: of a cluster, whose workers take one unless that is asked for.
        threads: of each, if asked for.
    """
    if threads or ray_address is not None:
        return threads or 1
    return max(1, default_threads() // (workers or 1))


def _threads_each(plan: Plan, workers: int, threads: int | None, memory: int | None) -> int:
    """Return the number of threads per worker that keeps all of them within `memory`."""

    def needed(each: int) -> int:
        return peak_memory(plan, 0) + workers * peak_memory(plan, each)

    threads = threads or max(1, default_threads() // workers)
    return threads_within(needed, threads, memory, hint="give fewer --workers")
