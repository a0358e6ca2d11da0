"""How many threads fit into the memory that there is."""

from __future__ import annotations

from collections.abc import Callable

from qwen35.errors import UsageError
from qwen35.plan.show import size
from qwen35.threads import default_threads

__all__ = ["threads_within"]


def threads_within(
    needed: Callable[[int], int], threads: int | None = None, memory: int | None = None
) -> int:
    """Return how many threads to use.

    Args:
        needed: bytes that so many threads need.
        threads: at most so many; all processors if None.
        memory: bytes to stay below; no limit if None.

    Raises:
        UsageError: one thread alone needs more.

    >>> threads_within(lambda threads: 100 + 50 * threads, threads=8, memory=300)
    4
    """
    threads = threads or default_threads()
    if memory is None:
        return threads
    while threads > 1 and needed(threads) > memory:
        threads -= 1
    if needed(threads) > memory:
        least = size(needed(threads))
        raise UsageError(f"--memory {size(memory)}", "too little", expected=f"at least {least}")
    return threads
