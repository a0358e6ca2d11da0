"""The tensor files of an output that is being written, perhaps begun by an earlier run."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

from qwen35.errors import OutputError
from qwen35.sinks.checksums import checksum_of, is_zero
from qwen35.sinks.files import TensorFile
from qwen35.sinks.journal import Journal
from qwen35.sinks.work_folder import fsync_folder, misfit, open_folder, open_ours, remove

__all__ = ["SECONDS", "TensorWriter", "noted", "refined_digits"]

SECONDS = 10.0
"""Seconds between flushes of finished tensors; a killed run loses at most this much work."""

_LOG = logging.getLogger(__name__)
_SHOWN = 3


def noted(checksum: str, digits: str) -> str:
    """Return the journal's entry of a piece: its checksum, and which codes were refined, if any."""
    return f"{checksum} {digits}" if digits else checksum


def refined_digits(journal: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Return what `noted` put into a journal, by file and first tensor."""
    found = {}
    for entry, value in journal.items():
        file, _, tensor = entry.partition("/")
        if tensor and isinstance(value, str) and " " in value:
            found[file, tensor] = value.partition(" ")[2]
    return found


class TensorWriter:
    """Opens, flushes and finishes tensor files, and records in the journal what is on disk.

    A piece, the tensors of one weight, is recorded after its files were flushed, a file after it
    was flushed and hashed. Thread-safe.

    Args:
        folder: holds the files.
        journal: ``FILE/TENSOR`` to the checksum of the piece that begins with this tensor
            (`qwen35.sinks.checksums`), ``FILE`` to SHA-256 for finished files; 0 cancels an entry.
        shared: other runs fill the same files: none is removed, and the first run creates it.
    """

    def __init__(self, folder: Path, journal: Journal, *, shared: bool = False) -> None:
        self._folder = folder
        self._journal = journal
        self._shared = shared
        self._open: dict[str, TensorFile] = {}
        self._pending: dict[str, str] = {}
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

    @property
    def resumes(self) -> bool:
        """Whether an earlier run finished anything."""
        return bool(self._journal)

    def check(
        self, name: str, head: bytes, nbytes: int, pieces: Mapping[str, Sequence[tuple[int, int]]]
    ) -> str | None:
        """Check what an earlier run finished of a file; damaged pieces no longer count (`has`).

        Other processes or the disk may have changed them since.

        Args:
            name: the file's.
            head: the bytes before the data.
            nbytes: size of the whole file.
            pieces: first tensor of a piece to the byte ranges (offset, size) of all its tensors.

        Returns:
            The SHA-256 if the file is finished.
        """
        recorded = {tensor: self._journal.get(f"{name}/{tensor}") for tensor in pieces}
        recorded = {tensor: value for tensor, value in recorded.items() if value}
        digest: str | None = self._journal.get(name) or None
        if not recorded and not digest:
            return None
        path = self._folder / name
        if wrong := misfit(path, nbytes):
            if not self._shared:  # `open` refuses those
                self._forget(name)
                _LOG.warning("%s: %s; it is written again", path, wrong)
            return None
        descriptor = open_ours(path, os.O_RDONLY)
        try:
            if not self._shared and not _is_framed(descriptor, head, nbytes, pieces, bool(digest)):
                self._forget(name)
                _LOG.warning("%s: was changed outside of its tensors; it is written again", path)
                return None
            damaged = [
                tensor
                for tensor, value in recorded.items()
                if checksum_of(descriptor, pieces[tensor]) != str(value).partition(" ")[0]
            ]
        finally:
            os.close(descriptor)
        if damaged:
            _LOG.warning("%s: was changed; written again: %s", path, ", ".join(damaged[:_SHOWN]))
        if damaged or len(recorded) < len(pieces):
            self._cancel([name, *(f"{name}/{tensor}" for tensor in damaged)])
            return None
        return digest

    def has(self, file: str, tensor: str) -> bool:
        """Return whether a file holds a tensor completely."""
        return bool(self._journal.get(f"{file}/{tensor}"))

    def open(
        self,
        name: str,
        head: bytes,
        offsets: Mapping[str, int],
        nbytes: int,
        pending: Iterable[tuple[int, int]] | None = None,
    ) -> TensorFile:
        """Open a file to fill; tensors that an earlier run finished stay (`has`).

        Arguments are those of `TensorFile`.

        Raises:
            OutputError: a shared file with finished tensors is missing.
        """
        path = self._folder / name
        begun = any(map(self._journal.get, self._entries(name)))
        wrong = misfit(path, nbytes) if begun else ""
        again = begun and not wrong
        if wrong and self._shared:
            hint = f"its finished tensors are lost: remove {self._folder.parent} to start over"
            raise OutputError(str(path), wrong, hint=hint)
        if not again and not self._shared:
            self._forget(name)
        pending = None if self._shared else pending
        file = TensorFile(
            path, head, offsets, nbytes, again=again, shared=self._shared, pending=pending
        )
        with self._lock:
            self._open[name] = file
        return file

    def _entries(self, name: str) -> list[str]:
        return [entry for entry in self._journal if entry == name or entry.startswith(f"{name}/")]

    def _forget(self, name: str) -> None:
        self._cancel(self._entries(name))  # on disk before the file is removed
        with open_folder(self._folder) as folder:
            remove(name, folder)

    def _cancel(self, entries: Iterable[str]) -> None:
        # a journal only grows: 0 cancels an entry
        self._journal.record({entry: 0 for entry in entries if self._journal.get(entry)})

    def done(self, tensor: str, files: Iterable[str], checksum: str) -> None:
        """Note that a piece (its first tensor) is complete in these files; flush if it is due."""
        with self._lock:
            self._pending |= {f"{file}/{tensor}": checksum for file in files}
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

    def filled(self, file: str, pieces: Mapping[str, str]) -> None:
        """Record what another process wrote to a file and flushed: first tensors to checksums."""
        self._journal.record({f"{file}/{tensor}": value for tensor, value in pieces.items()})

    def hashed(self, name: str, digest: str) -> None:
        """Record the hash of a file that other processes filled, flushed and hashed."""
        self._journal.record({name: digest})

    def finish(self, name: str) -> str:
        """Flush a file, record it as finished and return its SHA-256."""
        file = self._open[name]
        digest = file.finish()
        with self._flushing:  # `flush` must not hold a file that is being closed
            with self._lock:
                own = {e: v for e, v in self._pending.items() if e.startswith(f"{name}/")}
                self._pending = {e: v for e, v in self._pending.items() if e not in own}
                del self._open[name]
            self._journal.record({**own, name: digest})
        file.close()
        return digest


def _is_framed(
    descriptor: int,
    head: bytes,
    nbytes: int,
    pieces: Mapping[str, Sequence[tuple[int, int]]],
    finished: bool,
) -> bool:
    """Return whether a file has its head, if it is finished, and zeros between the tensors."""
    if finished and os.pread(descriptor, len(head), 0) != head:
        return False
    end = len(head)
    for offset, size in sorted(part for parts in pieces.values() for part in parts):
        if end < offset and not is_zero(descriptor, end, offset):
            return False
        end = offset + size
    return end >= nbytes or is_zero(descriptor, end, nbytes)
