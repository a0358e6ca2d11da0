"""Windows of text that workers share: the order of a run and its windows, in its work folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen35.array_types import I32
from qwen35.planning.work_order import order_bytes
from qwen35.sinks.staging import os_errors
from qwen35.sinks.work_folder import ORDER_NAME

__all__ = ["share_out", "shared_windows", "shares"]

_WINDOWS = "windows.npy"
"""In the work folder: the token ids of all windows, beside the order."""

_SHARES = 4
"""Jobs for each worker and block: fewer make the last one wait, more lose more when one dies."""


def share_out(folder: Path, order: Mapping[str, Any], windows: I32) -> dict[str, Any]:
    """Write an order and windows [windows, context]; return what all jobs have in common.

    Raises:
        OutputError: the disk is full.
    """
    content = order_bytes(json.loads(json.dumps(order)))
    with os_errors(folder):
        np.save(folder / _WINDOWS, windows, allow_pickle=False)
        (folder / ORDER_NAME).write_bytes(content)
    return {"work": str(folder.absolute()), "order": hashlib.sha256(content).hexdigest()}


def shared_windows(work: str) -> I32:
    """Return the windows that `share_out` wrote, [windows, context]."""
    windows: I32 = np.load(Path(work) / _WINDOWS, allow_pickle=False)
    return windows


def shares(count: int, slots: int, unit: int = 1) -> Iterator[range]:
    """Yield the parts of `count` things that jobs take, of whole units but for the last one.

    Args:
        count: of the things.
        slots: jobs that run at a time.
        unit: how many things stay together.
    """
    size = max(1, count // unit // (_SHARES * slots)) * unit
    for first in range(0, count, size):
        yield range(first, min(count, first + size))
