"""The memory that a plan needs, and how many threads fit into what there is."""

from __future__ import annotations

from collections.abc import Callable

from qwen35.errors import UsageError
from qwen35.plan.plan import Plan
from qwen35.shown import least, size
from qwen35.threads import default_threads

__all__ = ["peak_memory", "threads_within"]

_BASE_MEMORY = 175_000_000
"""The interpreter with NumPy and Numba (tests/test_memory.py); torch is not loaded. Where Numba's
cache is empty, compiling the kernels takes twice as much, once."""

_THREAD_MEMORY = 20_000_000
"""Buffers of one thread: a piece of `strips.STRIP` weights, its codes, temporaries, a heap."""


def peak_memory(plan: Plan, threads: int) -> int:
    """Return an upper estimate in bytes of the memory that executing `plan` needs."""
    largest = max((s.spec.numel for s in plan.steps if s.op == "nf4"), default=0)
    decodes = any(s.op != "copy" and s.weight.storage != "plain" for s in plan.steps)
    wide = any(s.op == "fp8" and s.spec.dtype != "BF16" for s in plan.steps)
    piece = _THREAD_MEMORY * (3 if decodes or wide else 1)
    statistics = largest // 64 * 4 * 8
    headers = sum(len(file.head) for file in plan.files) * 8
    return _BASE_MEMORY + threads * (piece + statistics) + headers


def threads_within(
    needed: Callable[[int], int],
    threads: int | None = None,
    memory: int | None = None,
    *,
    hint: str = "",
) -> int:
    """Return how many threads to use.

    Args:
        needed: bytes that so many threads need.
        threads: at most so many; all processors if None.
        memory: bytes to stay below; no limit if None.
        hint: what to do if one thread alone needs more.

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
        expected = f"at least {least(needed(threads))}"
        raise UsageError(f"--memory {size(memory)}", "too little", expected=expected, hint=hint)
    return threads
