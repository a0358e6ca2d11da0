"""The default number of threads, and calls that nobody waits for to the end."""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["default_threads", "detached", "detached_map"]

_T = TypeVar("_T")
_S = TypeVar("_S")


def default_threads() -> int:
    """Return the number of processors this process may use."""
    # Unlike os.cpu_count(), this honours taskset and container CPU sets.
    return len(os.sched_getaffinity(0))


def detached(call: Callable[[], _T]) -> Future[_T]:
    """Run `call` in a thread of its own, which may be left alone: it ends with the process."""
    future: Future[_T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised by `result`, in the caller's thread
            future.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True).start()
    return future


def detached_map(
    call: Callable[[_S], _T], items: Iterable[_S], at_once: int
) -> Generator[_T, None, None]:
    """Yield the result of each call in order, `at_once` at a time, in threads left alone at an end.

    Nothing is begun any more once one result raises or the iterator is closed; unlike a pool's,
    the calls that run then are not waited for.
    """
    pairs = [(item, Future[_T]()) for item in items]
    todo = iter(pairs)
    lock, left = threading.Lock(), threading.Event()

    def work() -> None:
        while not left.is_set():
            with lock:
                item, future = next(todo, (None, None))
            if future is None:
                return
            try:
                future.set_result(call(item))  # type: ignore[arg-type]
            except BaseException as error:  # noqa: BLE001 - raised by `result`, in the caller
                future.set_exception(error)

    for _ in range(min(at_once, len(pairs))):
        detached(work)
    try:
        for _, future in pairs:
            yield future.result()
    finally:
        left.set()
