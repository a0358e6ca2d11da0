"""Checks of every number that are stopped after some weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from qwen35.checkpoint.open import fetch
from qwen35.progress import Progress, Silent
from qwen35.verification.opening import open_artifact
from qwen35.verification.verdict import Depth, Verdict, verify


class Stopping(Silent):
    """Progress of a check that is interrupted after some weights; more are slow to come."""

    def __init__(self, weights: int, stop: Callable[[], None]) -> None:
        self._left = weights
        self._stop = stop

    def advance(self, nbytes: int, item: str) -> None:
        self._left -= 1
        if self._left == 0:
            self._stop()
        if self._left < 0:  # begun before the rest was called off
            time.sleep(0.1)


def check(
    artifact: Path,
    source: Path | None,
    progress: Progress | None = None,
    *,
    threads: int = 1,
    depth: Depth = "numbers",
) -> Verdict:
    original = fetch(str(source)) if source else None
    opened = open_artifact(str(artifact), depth)
    return verify(opened, source=original, depth=depth, threads=threads, progress=progress)
