"""Peak memory of a plan, and the number of threads that fit into a limit."""

from __future__ import annotations

from collections.abc import Callable

from qwen35.codecs.registry import CODECS, codec_of, is_packed
from qwen35.display import size, size_rounded_up
from qwen35.errors import UsageError
from qwen35.planning.output_plan import Plan
from qwen35.planning.refinement import refining_memory
from qwen35.threads import default_threads

__all__ = ["peak_memory", "threads_within"]

_THREAD_MEMORY = 20_000_000
"""Buffers of one thread: a piece of `pieces.PIECE` weights, its codes, temporaries, heap."""

_WIDE = 3
"""Factor on `_THREAD_MEMORY` if values are decoded or widened before encoding."""


def peak_memory(plan: Plan, threads: int) -> int:
    """Return an upper estimate, in bytes, of the memory needed to execute `plan`.

    tests/test_memory.py checks it against measurements. While Numba's cache is empty, compiling the
    kernels takes twice as much, once.
    """
    codec_memory, wide = 0, False
    for step in plan.steps:
        for target in step.targets:
            if target.copied:
                continue
            item, codec = step.rows.item, CODECS[target.codec]
            wide = wide or is_packed(item.weight) or bool(item.changes)
            wide = wide or (codec.widens and item.spec.dtype != "BF16")
            source = codec_of(item.weight)
            needed = codec.memory(item.spec) + source.decoding_memory(item.spec)
            codec_memory = max(codec_memory, needed)
    piece = _THREAD_MEMORY * (_WIDE if wide else 1)
    container = plan.container
    refining = refining_memory(plan, threads)
    # Every thread may work on the largest weight at the same time.
    coding = threads * (piece + codec_memory) + refining
    return container.base_memory + coding + container.head_memory(plan)


def threads_within(
    needed: Callable[[int], int],
    threads: int | None = None,
    memory: int | None = None,
    *,
    hint: str = "",
) -> int:
    """Return the number of threads to use.

    Args:
        needed: bytes needed by a number of threads.
        threads: maximum; all processors if None.
        memory: limit in bytes; none if None.
        hint: what to do if a single thread exceeds the limit.

    Raises:
        UsageError: a single thread exceeds the limit.

    >>> threads_within(lambda threads: 100 + 50 * threads, threads=8, memory=300)
    4
    """
    threads = threads or default_threads()
    if memory is None:
        return threads
    while threads > 1 and needed(threads) > memory:
        threads -= 1
    if needed(threads) > memory:
        expected = f"at least {size_rounded_up(needed(threads))}"
        raise UsageError(f"--memory {size(memory)}", "too little", expected=expected, hint=hint)
    return threads
