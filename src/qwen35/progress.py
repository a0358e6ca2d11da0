"""Progress events of long work; `qwen35.cli.console` renders them."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

__all__ = ["NO_ESTIMATE", "Progress", "ProgressOfUnits", "Silent", "TqdmProgress", "counting"]

NO_ESTIMATE = "no estimate yet"
"""What lines of progress say until the time left can be told."""


class Progress(Protocol):
    """Receives progress events, possibly from several threads."""

    def begin(self, title: str, total: int) -> None:
        """Start the work called `title`; the caller defines the unit of `total`."""

    def advance(self, amount: int, item: str) -> None:
        """Report `amount` more units done; `item` was processed last."""

    def end(self) -> None:
        """End the work, whether it succeeded or failed."""


@runtime_checkable
class ProgressOfUnits(Progress, Protocol):
    """Progress that names the unit of `total`, such as ``chunks``."""

    def of(self, unit: str) -> Progress:
        """Return the same display for another unit."""


def counting(unit: str, progress: Progress) -> Progress:
    """Return progress for work that counts `unit`, whatever else its caller counts."""
    return progress.of(unit) if isinstance(progress, ProgressOfUnits) else progress


class Silent:
    """Progress that discards all events."""

    def begin(self, title: str, total: int) -> None:
        """Do nothing."""

    def advance(self, amount: int, item: str) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""


class TqdmProgress:
    """Progress as a bar of tqdm, for notebooks and programs of one's own."""

    def __init__(self) -> None:
        self._bar: Any = None

    def begin(self, title: str, total: int) -> None:
        """Show a bar."""
        from tqdm.auto import tqdm  # a dependency of huggingface_hub

        self._bar = tqdm(total=total, desc=title, unit_scale=True)

    def advance(self, amount: int, item: str) -> None:
        """Move the bar."""
        self._bar.set_postfix_str(item[-40:], refresh=False)
        self._bar.update(amount)

    def end(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
