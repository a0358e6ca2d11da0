"""What a long check has seen so far, so that one that was killed goes on where it was.

A check writes nothing beside what it checks. Once it takes longer than a flush interval, what it
has seen goes to a journal in the user's cache folder; it is removed when the check ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Protocol, Self

from qwen35.checkpoint.source import Checkpoint
from qwen35.errors import OutputError
from qwen35.planning.manifest import manifest_versions
from qwen35.sinks.files import hash_file
from qwen35.sinks.journal import Journal

__all__ = ["MemoFile", "ReadOnlyMemo", "ResultMemo", "stamped"]

SECONDS = 10.0
"""Between two flushes; a killed check has to do that much again."""

_KEPT_SECONDS = 30 * 86_400.0


def stamped(checkpoint: Checkpoint) -> list[Any]:
    """Return what tells a checkpoint's files from all others, and from themselves once changed."""
    stamps = {name: list(stamp) for name, stamp in checkpoint.stamps.items()}
    return [str(checkpoint.folder().resolve()), stamps]


class ResultMemo(Protocol):
    """Results of finished pieces, by name, as plain JSON values."""

    def get(self, name: str) -> Any:
        """Return the result of a piece that was finished before, None if it was not."""

    def add(self, name: str, result: Any) -> None:
        """Remember the result of a piece."""


class ReadOnlyMemo:
    """What others have seen; nothing is added to it.

    Args:
        results: name of the piece to its result.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        self._results = results

    def get(self, name: str) -> Any:
        """Return the result of a piece, None if nobody has seen it."""
        return self._results.get(name)

    def add(self, name: str, result: Any) -> None:
        """Forget it: whoever asked has it."""


class MemoFile:
    """The results of a check's finished pieces, by name, as plain JSON values.

    Safe from several threads. A check of the same files by the same versions finds what an
    unfinished one has seen; any other starts anew.

    Args:
        what: everything that decides the results, but for the versions.

    Attributes:
        notes: why nothing can be kept, if so.
    """

    def __init__(self, what: Mapping[str, Any]) -> None:
        key = {"check": what, "tool version": manifest_versions()}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.notes: list[str] = []
        self._key = key
        self._path = _folder() / f"verify-{digest[:32]}"
        self._journal: Journal | None = None
        self._pieces: dict[str, Any] = {}
        self._pending: dict[str, Any] = {}
        self._lock = Lock()
        self._due = time.monotonic() + SECONDS

    def __enter__(self) -> Self:
        _forget_old(self._path.parent)
        if self._path.exists():
            self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._journal is not None:
            self._flush()
        if self._journal is not None:
            self._journal.close()
            if error is None:
                self._path.unlink(missing_ok=True)

    def get(self, name: str) -> Any:
        """Return the result of a piece that was finished before, None if it was not."""
        return self._pieces.get(name)

    def add(self, name: str, result: Any) -> None:
        """Remember the result of a piece."""
        with self._lock:
            self._pending[name] = result
            if time.monotonic() >= self._due and not self.notes:
                self._flush()
                self._due = time.monotonic() + SECONDS

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of a file as hexadecimal digits, from before if it is known."""
        name = f"sha256 of {path.name}"
        digest: str = self.get(name) or hash_file(path)
        self.add(name, digest)
        return digest

    def _flush(self) -> None:
        if self._journal is None:
            self._open()
        if self._journal is not None:
            try:
                self._journal.record(self._pending)
            except OSError as error:
                self._give_up(error)
            self._pending = {}

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(self._path, self._key)
        except (OSError, OutputError) as error:  # a check needs no place to write to
            self._give_up(error)
        else:
            self._pieces = dict(self._journal)

    def _give_up(self, error: Exception) -> None:
        said = error.strerror if isinstance(error, OSError) else str(error)
        self.notes = [f"a check that is killed starts over: cannot write {self._path} ({said})"]


def _folder() -> Path:
    """Return the cache folder, by the XDG base directory specification."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "qwen35"


def _forget_old(folder: Path) -> None:
    """Remove what checks left that were killed and not repeated within 30 days."""
    with suppress(OSError):
        for path in folder.glob("verify-*"):
            if time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                path.unlink()
