"""The flags that say who does the work: threads, processes, a Ray cluster, or slices."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext

from qwen35.cli.shared import positive
from qwen35.errors import UsageError
from qwen35.plan.plan import Plan
from qwen35.plan.show import peak_memory, size
from qwen35.threads import default_threads
from qwen35.work.dispatch import Pool

__all__ = ["add_workers", "check_workers", "pool_for"]


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add the flags; docs/scale.md has their use."""
    group = parser.add_argument_group("scale")
    group.add_argument(
        "--workers", type=positive, metavar="N", help="processes, each with --threads threads"
    )
    group.add_argument(
        "--ray-address", metavar="ADDRESS", help="work on this Ray cluster: auto or HOST:PORT"
    )
    group.add_argument(
        "--slice", type=_slice, metavar="i/N", help="do one of N parts; then `qwen35 finalize OUT`"
    )


def _slice(text: str) -> tuple[int, int]:
    number, slash, of = text.partition("/")
    found = int(number), int(of)
    if not slash or not 1 <= found[0] <= found[1]:
        raise ValueError(text)
    return found


_slice.__name__ = "slice"  # as argparse calls it in a refusal


def check_workers(args: argparse.Namespace) -> None:
    """Refuse flags that exclude each other.

    Raises:
        UsageError: two of them are given, or --memory where it cannot be kept.
    """
    flags = {"--workers": args.workers, "--ray-address": args.ray_address, "--slice": args.slice}
    given = [flag for flag, value in flags.items() if value is not None]
    if len(given) > 1:
        raise UsageError(" and ".join(given), "exclude each other", hint="give one of them")
    if args.ray_address is not None and args.memory is not None:
        hint = "give --threads: each job of the cluster has as many"
        raise UsageError("--memory", "is for this machine alone", hint=hint)


def pool_for(plan: Plan, args: argparse.Namespace) -> AbstractContextManager[Pool | None]:
    """Return the workers asked for; None for threads of this process.

    Raises:
        UsageError: they cannot be had, or need more than --memory.
    """
    if args.ray_address is not None:
        from qwen35.work.on_ray import RayWorkers

        return RayWorkers(args.ray_address, device=args.device, threads=args.threads)
    if args.workers is not None:
        from qwen35.work.processes import Processes

        threads = _threads_each(plan, args)
        return Processes(args.workers, device=args.device, threads=threads)
    return nullcontext()


def _threads_each(plan: Plan, args: argparse.Namespace) -> int:
    """Return the threads of each worker, so that all keep within --memory."""
    threads: int = args.threads or max(1, default_threads() // args.workers)
    if args.memory is None:
        return threads

    def needed() -> int:
        every: int = args.workers * peak_memory(plan, threads)
        return peak_memory(plan, 0) + every

    while threads > 1 and needed() > args.memory:
        threads -= 1
    if needed() > args.memory:
        hint = "give fewer --workers"
        raise UsageError(
            f"--memory {size(args.memory)}", "too little", expected=size(needed()), hint=hint
        )
    return threads
