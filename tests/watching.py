"""Progress that tests look at, or act from."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Watching"]


class Watching:
    """Progress that counts, and calls something after each step."""

    def __init__(self, act: Callable[[int], None] = lambda _: None) -> None:
        self.act = act
        self.title = ""
        self.total = self.done = self.steps = 0

    def begin(self, title: str, nbytes: int) -> None:
        self.title, self.total = title, nbytes

    def advance(self, nbytes: int, item: str) -> None:
        self.done += nbytes
        self.steps += 1
        self.act(self.steps)

    def end(self) -> None:
        pass
