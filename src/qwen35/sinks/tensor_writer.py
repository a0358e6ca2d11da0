"""The tensor files of an output while they are written, some of them begun by an earlier run."""

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
"""Between two flushes of what is finished; a killed run has to do that much again."""


class TensorWriter:
    """Opens, flushes and finishes tensor files, and notes in the journal what is on the disk.

    A tensor is noted after the files that hold it were flushed, a file after it was flushed and
    hashed. Methods are safe from several threads.

    Args:
        folder: where the files are.
        journal: what is finished: ``FILE/TENSOR`` to 1, ``FILE`` to its SHA-256.
        shared: other runs fill the same files: none is removed, whoever comes first creates it.
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
        noted = {entry.partition("/")[0] for entry, value in self._journal.items() if value}
        for path in self._folder.iterdir():
            if path.name not in noted:  # small files, and those that were only begun
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            with suppress(OSError):  # the disk may be what is wrong
                self.flush()
        for file in self._open.values():
            file.close()

    def hash_of(self, name: str, nbytes: int) -> str | None:
        """Return the SHA-256 of a file that an earlier run finished, None if there is none.

        It is read again: one that was damaged meanwhile counts for nothing.
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
        """Whether a tensor lies in a file, complete."""
        return bool(self._journal.get(f"{file}/{tensor}") or self._journal.get(file))

    def open(self, name: str, head: bytes, offsets: Mapping[str, int], nbytes: int) -> TensorFile:
        """Open a file to be filled; what an earlier run wrote of it stays (`has`).

        Raises:
            OutputError: a file that others have written to is gone.
        """
        path = self._folder / name
        begun = any(map(self._journal.get, self._entries(name)))
        again = begun and path.is_file() and path.stat().st_size == nbytes
        if begun and not again and self._shared:
            hint = f"remove {self._folder.parent} to start over"
            raise OutputError(str(path), "is gone, with what was finished in it", hint=hint)
        if not again and not self._shared:
            self._forget(name)
        file = TensorFile(path, head, offsets, nbytes, again=again, shared=self._shared)
        with self._lock:
            self._open[name] = file
        return file

    def _entries(self, name: str) -> list[str]:
        return [entry for entry in self._journal if entry == name or entry.startswith(f"{name}/")]

    def _forget(self, name: str) -> None:
        self._journal.record({e: 0 for e in self._entries(name) if self._journal[e]})
        (self._folder / name).unlink(missing_ok=True)

    def done(self, tensor: str, files: Iterable[str]) -> None:
        """Take note that a tensor is complete in these files."""
        with self._lock:
            self._pending |= {f"{file}/{tensor}": 1 for file in files}
            if time.monotonic() < self._due:
                return
            self._due = math.inf  # one thread flushes, the others go on
        self.flush()

    def flush(self) -> None:
        """Flush all files, then note the tensors that were complete before."""
        with self._flushing:
            with self._lock:
                pending, self._pending = self._pending, {}
                files = list(self._open.values())
            if pending and not self._failed:
                self._failed = True  # after a flush that fails, a second one proves nothing
                for file in files:
                    file.sync()
                fsync_folder(self._folder)
                self._journal.record(pending)
                self._failed = False
            with self._lock:
                self._due = time.monotonic() + SECONDS

    def prepare(self, name: str, head: bytes, offsets: Mapping[str, int], nbytes: int) -> None:
        """Create a file, as `open` does, for other processes to fill."""
        file = self.open(name, head, offsets, nbytes)
        file.sync()
        with self._lock:
            del self._open[name]
        file.close()
        fsync_folder(self._folder)

    def filled(self, file: str, tensors: Iterable[str]) -> None:
        """Note that another process wrote tensors to a file and flushed it."""
        self._journal.record({f"{file}/{tensor}": 1 for tensor in tensors})

    def hashed(self, name: str, digest: str) -> None:
        """Note that a file is finished, which others filled, flushed and hashed."""
        self._journal.record({name: digest})

    def finish(self, name: str) -> str:
        """Flush a file, note it as finished and return its SHA-256."""
        file = self._open[name]
        digest = file.finish()
        self._journal.record({name: digest})
        with self._flushing, self._lock:
            del self._open[name]
        file.close()
        return digest
