"""The memory that a plan needs, and how many threads fit into what there is."""

from __future__ import annotations

from collections.abc import Callable

from qwen35.codecs.registry import CODECS, codec_of, is_packed
from qwen35.display import least, size
from qwen35.errors import UsageError
from qwen35.planning.output_plan import Plan
from qwen35.threads import default_threads

__all__ = ["peak_memory", "threads_within"]

_THREAD_MEMORY = 20_000_000
"""Buffers of one thread: a piece of `pieces.PIECE` weights, its codes, temporaries, a heap."""

_WIDE = 3
"""Times as many where values are decoded or widened before they are encoded."""


def peak_memory(plan: Plan, threads: int) -> int:
    """Return an upper estimate in bytes of the memory that executing `plan` needs.

    tests/test_memory.py holds it to what is measured. Where Numba's cache is empty, compiling its
    kernels takes twice as much, once.
    """
    beside, wide = 0, False
    for step in plan.steps:
        for target in step.targets:
            if target.copied:
                continue
            item, codec = step.rows.item, CODECS[target.codec]
            wide = wide or is_packed(item.weight) or (codec.widens and item.spec.dtype != "BF16")
            source = codec_of(item.weight)
            beside = max(beside, codec.memory(item.spec) + source.decoding_memory(item.spec))
    piece = _THREAD_MEMORY * (_WIDE if wide else 1)
    container = plan.container
    return container.base_memory + threads * (piece + beside) + container.head_memory(plan)


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
