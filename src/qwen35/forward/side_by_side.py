"""Batches side by side: several threads, each of which computes one with a share of torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeVar

__all__ = ["MOST", "side_by_side"]

MOST = 8
"""Most calls at a time; with more threads, each call gets several of them."""

_T = TypeVar("_T")
_S = TypeVar("_S")


def side_by_side(
    torch: Any,
    call: Callable[[_S], _T],
    items: Iterable[_S],
    at_once: int,
    take: Callable[[_T], object] = lambda _: None,
) -> None:
    """Call for each item, and take the results in the order of the items, in this thread.

    Torch's own threads wait for each other within each operation, and linear attention has hundreds
    of small ones; calls side by side wait for nobody. Where each has one thread, what it computes
    does not depend on how many there are.

    Args:
        torch: the library; inference mode, and whether denormals are flushed, are those of this
            thread.
        call: computes; nothing else is begun once it raises.
        items: to call it with.
        at_once: most calls at a time, at most torch's number of threads; 1 for this thread alone.
        take: gets each result.
    """
    if at_once > 1:
        items = list(items)
        at_once = min(at_once, len(items))
    if at_once <= 1:
        for item in items:
            take(call(item))
        return
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def work(item: _S) -> _T:
        with torch.inference_mode(inference):
            return call(item)

    try:
        with (
            ThreadPoolExecutor(
                at_once, initializer=torch.set_num_threads, initargs=(threads // at_once,)
            ) as pool,
            closing(pool.map(work, items)) as results,  # type: ignore[type-var]  # a generator
        ):
            for result in results:
                take(result)
    finally:
        torch.set_num_threads(threads)  # which new threads take over
