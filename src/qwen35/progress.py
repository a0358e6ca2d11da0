"""How long work tells what it is doing; the terminal's side of it is `qwen35.cli.console`."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """Receives events from a piece of long work; calls may come from several threads."""

    def begin(self, title: str, total: int) -> None:
        """Work called `title` begins; whoever made this progress says in what `total` counts."""

    def advance(self, amount: int, item: str) -> None:
        """So much more is done; the last thing worked on is `item`."""

    def end(self) -> None:
        """The work is over, well or badly."""


class Silent:
    """Progress that nobody watches."""

    def begin(self, title: str, total: int) -> None:
        """Ignore it."""

    def advance(self, amount: int, item: str) -> None:
        """Ignore it."""

    def end(self) -> None:
        """Ignore it."""
