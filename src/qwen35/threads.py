"""The default number of threads."""

from __future__ import annotations

import os

__all__ = ["default_threads"]


def default_threads() -> int:
    """Return the number of processors this process may use."""
    # Unlike os.cpu_count(), this honours taskset and container CPU sets.
    return len(os.sched_getaffinity(0))
