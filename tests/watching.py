"""Progress that tests look at, or act from; and how many threads were asked for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

__all__ = ["Watching", "watched_pools"]


def watched_pools(patch: pytest.MonkeyPatch, module: str) -> list[int]:
    """Return where the threads of every pool that `module` makes from now on are noted."""
    asked: list[int] = []

    def pool(threads: int) -> ThreadPoolExecutor:
        asked.append(threads)
        return ThreadPoolExecutor(threads)

    patch.setattr(f"{module}.ThreadPoolExecutor", pool)
    return asked


class Watching:
    """Progress that remembers what it was told, and calls something after each step."""

    def __init__(self, act: Callable[[int], None] = lambda _: None) -> None:
        self.act = act
        self.title = ""
        self.total = 0
        self.steps: list[tuple[int, str]] = []

    def begin(self, title: str, nbytes: int) -> None:
        self.title, self.total = title, nbytes

    def advance(self, nbytes: int, item: str) -> None:
        self.steps.append((nbytes, item))
        self.act(len(self.steps))

    def end(self) -> None:
        pass

    @property
    def done(self) -> int:
        return sum(nbytes for nbytes, _ in self.steps)
