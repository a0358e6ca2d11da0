"""Results of a long check, kept so that a killed check can resume.

A check writes nothing to the folder that it checks. After the first flush interval its results go
to a journal in the user's cache folder, which is removed when the check ends.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Protocol, Self

from qwen35.checkpoint.locations import cache_folder
from qwen35.checkpoint.source import Checkpoint
from qwen35.errors import OutputError
from qwen35.planning.manifest import manifest_versions
from qwen35.sinks.files import hash_file
from qwen35.sinks.journal import Journal

__all__ = ["MemoFile", "ReadOnlyMemo", "ResultMemo", "stamped"]

SECONDS = 10.0
"""Seconds between flushes; a killed check loses at most this much work."""

_KEPT_SECONDS = 30 * 86_400.0


def stamped(checkpoint: Checkpoint) -> list[Any]:
    """Return plain values that identify a checkpoint's files and change with them."""
    stamps = {name: list(stamp) for name, stamp in checkpoint.stamps.items()}
    adapters = [adapter.to_json() for adapter in checkpoint.adapters]
    donor = [stamped(checkpoint.donor)] if checkpoint.donor else []
    return [str(checkpoint.folder().resolve()), stamps, *adapters, *donor]


class ResultMemo(Protocol):
    """Results by name, as plain JSON values."""

    def get(self, name: str) -> Any:
        """Return an earlier result, else None."""

    def add(self, name: str, result: Any) -> None:
        """Remember a result."""


class ReadOnlyMemo:
    """Results of an earlier check; new ones are not remembered.

    Args:
        results: by name.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        self._results = results

    def get(self, name: str) -> Any:
        """Return an earlier result, else None."""
        return self._results.get(name)

    def add(self, name: str, result: Any) -> None:
        """Do nothing."""


class MemoFile:
    """The results of a check, in a journal; thread-safe.

    A check of the same files by the same versions resumes an unfinished one; any other starts over.

    Args:
        inputs: everything that decides the results, except the versions.

    Attributes:
        notes: why results cannot be kept, if so.
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        key = {"check": inputs, "tool version": manifest_versions()}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.notes: list[str] = []
        self._key = key
        self._path = cache_folder() / f"verify-{digest[:32]}"
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
        if error is not None and self._journal is not None:  # the next check resumes
            self._flush()
        if self._journal is not None:
            self._journal.close()
            if error is None:
                self._path.unlink(missing_ok=True)

    def get(self, name: str) -> Any:
        """Return an earlier result, else None."""
        return self._pieces.get(name)

    def add(self, name: str, result: Any) -> None:
        """Remember a result; flush if it is time to."""
        with self._lock:
            self._pending[name] = result
            if time.monotonic() >= self._due and not self.notes:  # a note: writing has failed
                self._flush()
                self._due = time.monotonic() + SECONDS

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of a file as hexadecimal digits, from the memo if it has it."""
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
        except (OSError, OutputError) as error:  # a check must work without a writable cache
            self._give_up(error)
        else:
            self._pieces = dict(self._journal)

    def _give_up(self, error: Exception) -> None:
        why = error.strerror if isinstance(error, OSError) else str(error)
        self.notes = [f"a check that is killed starts over: cannot write {self._path} ({why})"]


def _forget_old(folder: Path) -> None:
    """Remove the journals of killed checks that were not repeated within 30 days."""
    with suppress(OSError):
        for path in folder.glob("verify-*"):
            if time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                path.unlink()
