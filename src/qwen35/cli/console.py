"""The only module that prints: data to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from qwen35.checkpoint.header import json_text
from qwen35.cli.screen import fit, width_of
from qwen35.display import printable, size
from qwen35.errors import Qwen35Error, UsageError
from qwen35.progress import NO_ESTIMATE, Progress, Silent

__all__ = ["Console"]

_ENOUGH, _LONG_ENOUGH = 0.05, 60.0
"""Share of the work, or else seconds, that an estimate of the rest is made from."""


def _heartbeat() -> float:
    """Return the seconds between lines of progress in a log."""
    given = os.environ.get("QWEN35_HEARTBEAT", "")
    return float(given) if given.isascii() and given.isdecimal() and len(given) < 6 else 10.0


class Console:
    """The output of a command.

    Args:
        quiet: print only data and errors.
        as_json: print data as JSON.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet = quiet
        self.as_json = as_json

    @property
    def width(self) -> int | None:
        """The width to fit data to; None if stdout is not a terminal."""
        return width_of(sys.stdout)

    @property
    def one_screen(self) -> bool:
        """Whether a person has read the messages where the data will be."""
        return not self.quiet and sys.stdout.isatty() and sys.stderr.isatty()

    def data(self, text: str, value: Any) -> None:
        """Print the result: `text` for people, or `value` as JSON."""
        if self.as_json:
            _print(_json(value))
        else:
            _print(fit(text, sys.stdout))

    def script(self, text: str) -> None:
        """Print a script unchanged."""
        _print(text)

    def line(self, text: str) -> None:
        """Print one line of a report that is printed step by step."""
        if not self.quiet and not self.as_json:
            _print(fit(text, sys.stdout))

    def info(self, text: str) -> None:
        """Print a status message."""
        if not self.quiet:
            _tell(text)

    def notes(self, notes: Iterable[str]) -> None:
        """Print notes for the user."""
        for note in notes:
            self.info(f"note: {printable(note)}")

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Print what is logged meanwhile: what takes time, and, as notes, trouble."""
        logger, handler = logging.getLogger("qwen35"), _Logged(self)
        before = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.setLevel(before)
            logger.removeHandler(handler)

    def error(self, error: Qwen35Error) -> None:
        """Print an expected failure as one sentence."""
        if self.as_json:
            _print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        _print_error(error)

    def errors(self, errors: Sequence[Qwen35Error]) -> None:
        """Print several expected failures, each as one sentence."""
        if self.as_json:
            rows = [{"error": type(e).__name__, "message": str(e)} for e in errors]
            _print(json.dumps({**rows[0], "errors": rows}))
        for error in errors:
            _print_error(error)

    def progress(self, unit: str = "") -> Progress:
        """Return a progress display that suits stderr: a bar, plain lines, or nothing.

        Args:
            unit: the counted unit, if not bytes.
        """
        if self.quiet:
            return Silent()
        return _Bar(unit) if sys.stderr.isatty() else _Lines(unit)


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader (`head`, a pager) has closed the pipe
        _silence(sys.stdout)
    except OSError as error:
        _silence(sys.stdout)
        found, hint = f"cannot be written ({error.strerror})", "print it somewhere else"
        raise UsageError("stdout", found, hint=hint) from error


def _silence(stream: TextIO) -> None:
    """Discard what is still written to `stream`: the flush at exit must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _json(value: Any) -> str:
    text = json_text(value)
    try:
        text.encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8
        return json_text(value, ascii_only=True)
    return text


def _print_error(error: Qwen35Error) -> None:
    _tell(f"error: {printable(str(error))}")


def _tell(text: str) -> None:
    try:
        print(fit(text, sys.stderr), file=sys.stderr, flush=True)
    except OSError:  # messages that nobody can read do not end the work
        _silence(sys.stderr)


class _Logged(logging.Handler):
    """Prints warnings as notes: trouble that will perhaps be overcome."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self._console.notes([record.getMessage()])
        else:
            self._console.info(printable(record.getMessage()))


class _Lines:
    """A line at the start and every ten seconds or QWEN35_HEARTBEAT, for logs."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._lock = threading.Lock()
        self._heartbeat = _heartbeat()
        self._title = ""
        self._total = self._done = self._first = 0
        self._started = self._last = 0.0

    def of(self, unit: str) -> Progress:
        return _Lines(unit)

    def begin(self, title: str, total: int) -> None:
        self._title, self._total, self._done, self._first = title, total, 0, 0
        self._last = time.monotonic()
        amount = f"{total} {self._unit}" if self._unit else f"{size(total)} to read"
        _tell(f"{title}: {amount}")

    def advance(self, amount: int, item: str) -> None:
        with self._lock:  # several threads report progress
            now = time.monotonic()
            if not self._done:  # before it, libraries were imported and kernels compiled
                self._started, self._first = now, amount
            self._done += amount
            if now - self._last < self._heartbeat:
                return
            self._last = now
            share, left = self._done / max(1, self._total), self._left(now)
        _tell(f"{self._title}: {share:.0%}, {left}, {item}")

    def _left(self, now: float) -> str:
        """Say how long the rest will take, once enough was done since the first piece to tell."""
        done, seconds = self._done - self._first, now - self._started
        if done < _ENOUGH * self._total and (not done or seconds < _LONG_ENOUGH):
            return NO_ESTIMATE
        left = seconds * (self._total - self._done) / max(1, done)
        return f"about {max(0.0, left):.0f} s left"

    def end(self) -> None:
        """Do nothing: the command prints the result."""


class _Bar:
    """A bar on a terminal."""

    def __init__(self, unit: str) -> None:
        # imported late: only a terminal needs rich, and it is slow to import
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn() if unit else DownloadColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)

    def begin(self, title: str, total: int) -> None:
        self._bar.update(self._task, description=title, total=total, completed=0)
        self._bar.start()

    def advance(self, amount: int, item: str) -> None:
        del item
        self._bar.advance(self._task, amount)

    def end(self) -> None:
        self._bar.stop()
