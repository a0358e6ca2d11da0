"""The tensor files of an output that is being written, perhaps begun by an earlier run."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

from qwen35.errors import OutputError
from qwen35.sinks.files import TensorFile, hash_file
from qwen35.sinks.journal import Journal, fsync_folder

__all__ = ["SECONDS", "TensorWriter"]

SECONDS = 10.0
"""Seconds between flushes of finished tensors; a killed run loses at most this much work."""


class TensorWriter:
    """Opens, flushes and finishes tensor files, and records in the journal what is on disk.

    A tensor is recorded after its files were flushed, a file after it was flushed and hashed.
    Thread-safe.

    Args:
        folder: holds the files.
        journal: ``FILE/TENSOR`` to 1 for finished tensors, ``FILE`` to SHA-256 for finished files.
        shared: other runs fill the same files: none is removed, and the first run creates it.
    """

    def __init__(self, folder: Path, journal: Journal, *, shared: bool = False) -> None:
        self._folder = folder
        self._journal = journal
        self._shared = shared
        self._open: dict[str, TensorFile] = {}
        self._pending: dict[str, int] = {}
        self._lock = Lock()
        self._flushing = Lock()
        self._failed = False
        self._due = time.monotonic() + SECONDS

    def __enter__(self) -> Self:
        if self._shared:
            return self
        recorded = {entry.partition("/")[0] for entry, value in self._journal.items() if value}
        for path in self._folder.iterdir():
            if path.name not in recorded:  # small files, and files without a finished tensor
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            with suppress(OSError):  # a failing disk may be the error already
                self.flush()
        for file in self._open.values():
            file.close()

    def hash_of(self, name: str, nbytes: int) -> str | None:
        """Return the SHA-256 of a file that an earlier run finished, else None.

        The file is hashed again, and written anew if it does not match: other processes may have
        changed it since.
        """
        digest: str | None = self._journal.get(name)
        if not digest:
            return None
        path = self._folder / name
        if path.is_file() and path.stat().st_size == nbytes and hash_file(path) == digest:
            return digest
        self._forget(name)
        return None

    def has(self, file: str, tensor: str) -> bool:
        """Return whether a file holds a tensor completely."""
        return bool(self._journal.get(f"{file}/{tensor}") or self._journal.get(file))

    def open(self, name: str, head: bytes, offsets: Mapping[str, int], nbytes: int) -> TensorFile:
        """Open a file to fill; tensors that an earlier run finished stay (`has`).

        Raises:
            OutputError: a shared file with finished tensors is missing.
        """
        path = self._folder / name
        begun = any(map(self._journal.get, self._entries(name)))
        again = begun and path.is_file() and path.stat().st_size == nbytes
        if begun and not again and self._shared:
            hint = f"remove {self._folder.parent} to start over"
            raise OutputError(str(path), "is missing, with its finished tensors", hint=hint)
        if not again and not self._shared:
            self._forget(name)
        file = TensorFile(path, head, offsets, nbytes, again=again, shared=self._shared)
        with self._lock:
            self._open[name] = file
        return file

    def _entries(self, name: str) -> list[str]:
        return [entry for entry in self._journal if entry == name or entry.startswith(f"{name}/")]

    def _forget(self, name: str) -> None:
        # a journal only grows: 0 cancels an entry, and is on disk before the file is removed
        self._journal.record({e: 0 for e in self._entries(name) if self._journal[e]})
        (self._folder / name).unlink(missing_ok=True)

    def done(self, tensor: str, files: Iterable[str]) -> None:
        """Note that a tensor is complete in these files; flush if it is time to."""
        with self._lock:
            self._pending |= {f"{file}/{tensor}": 1 for file in files}
            if time.monotonic() < self._due:
                return
            self._due = math.inf  # one thread flushes while the others go on
        self.flush()

    def flush(self) -> None:
        """Flush all files, then record the tensors that were complete before the flush."""
        with self._flushing:
            with self._lock:
                pending, self._pending = self._pending, {}
                files = list(self._open.values())
            if pending and not self._failed:
                # a second fsync after a failed one may succeed although data was lost
                self._failed = True
                for file in files:
                    file.sync()
                fsync_folder(self._folder)
                self._journal.record(pending)
                self._failed = False
            with self._lock:
                self._due = time.monotonic() + SECONDS

    def prepare(self, name: str, head: bytes, offsets: Mapping[str, int], nbytes: int) -> None:
        """Create a file, as `open` does, for other processes to fill."""
        # flushed with its folder first: the journal may soon record tensors in it
        file = self.open(name, head, offsets, nbytes)
        file.sync()
        with self._lock:
            del self._open[name]
        file.close()
        fsync_folder(self._folder)

    def filled(self, file: str, tensors: Iterable[str]) -> None:
        """Record that another process wrote tensors to a file and flushed it."""
        self._journal.record({f"{file}/{tensor}": 1 for tensor in tensors})

    def hashed(self, name: str, digest: str) -> None:
        """Record the hash of a file that other processes filled, flushed and hashed."""
        self._journal.record({name: digest})

    def finish(self, name: str) -> str:
        """Flush a file, record it as finished and return its SHA-256."""
        file = self._open[name]
        digest = file.finish()
        self._journal.record({name: digest})
        with self._flushing, self._lock:  # `flush` must not hold a file that is being closed
            del self._open[name]
        file.close()
        return digest
