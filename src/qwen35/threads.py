"""The default number of threads, and calls that nobody waits for to the end."""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["default_threads", "detached"]

_T = TypeVar("_T")


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
