"""Progress events of long work; `qwen35.cli.console` renders them."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """Receives progress events, possibly from several threads."""

    def begin(self, title: str, total: int) -> None:
        """Start the work called `title`; the caller defines the unit of `total`."""

    def advance(self, amount: int, item: str) -> None:
        """Report `amount` more units done; `item` was processed last."""

    def end(self) -> None:
        """End the work, whether it succeeded or failed."""


class Silent:
    """Progress that discards all events."""

    def begin(self, title: str, total: int) -> None:
        """Do nothing."""

    def advance(self, amount: int, item: str) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""
