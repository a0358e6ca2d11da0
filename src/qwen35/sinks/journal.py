"""What a long piece of work has finished, on disk, so that a run continues one that was killed.

The first line says what the work is (its key), every other one holds finished pieces: a JSON
object of name and result. A line counts when its CRC-32 fits, and is on the disk when `record`
returns; a line that a crash tore is dropped with all that follows it.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from qwen35.closing import Closing
from qwen35.errors import OutputError

__all__ = ["Journal", "fsync_folder"]


class Journal(Closing, Mapping[str, Any]):
    """The finished pieces of one piece of work: name to result, as plain JSON values.

    Args:
        path: the file; made if it is not there. One process at a time may have it open.
        key: everything that decides the results, by names that a user understands. With another
            key there is nothing to continue.
        home: what to remove to start over, if not the journal alone.

    Raises:
        OutputError: it holds finished pieces of other work, or another process has it open.
    """

    def __init__(self, path: Path, key: Mapping[str, Any], *, home: Path | None = None) -> None:
        self._pieces: dict[str, Any] = {}
        self._lock = Lock()
        flags = os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags, 0o666)
        try:
            self._hold(path)
            self._load(path, json.loads(json.dumps(key)), home or path)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Any:
        return self._pieces[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def close(self) -> None:
        """Let go of the file; harmless when closed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def record(self, finished: Mapping[str, Any]) -> None:
        """Note pieces as finished, all of them or none, and flush that to the disk.

        What their results refer to must be on the disk already. Safe from several threads.
        """
        if finished:
            with self._lock:
                self._append(finished)
                self._pieces.update(finished)

    def _append(self, value: Mapping[str, Any]) -> None:
        line = memoryview(_line(value))
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fdatasync(self._descriptor)

    def _hold(self, path: Path) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = "wait for it to end"
            raise OutputError(str(path), "another run is writing it", hint=hint) from error

    def _load(self, path: Path, key: dict[str, Any], home: Path) -> None:
        size = 0
        begun: dict[str, Any] | None = None
        for value, size in _lines(path.read_bytes()):  # noqa: B007
            if begun is None:
                begun = value
            else:
                self._pieces.update(value)
        if begun != key:
            if self._pieces:
                raise _other(begun or {}, key, home)
            os.ftruncate(self._descriptor, 0)
            self._append(key)
            fsync_folder(path.parent)
            return
        os.ftruncate(self._descriptor, size)


def _other(begun: Mapping[str, Any], key: Mapping[str, Any], home: Path) -> OutputError:
    names = [name for name in {**begun, **key} if begun.get(name) != key.get(name)]
    return OutputError(
        str(home),
        f"holds an unfinished run with another {' and another '.join(names)}",
        hint="repeat the command that began it to continue, or remove this to start over",
    )


def _line(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _lines(data: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the value of each sound line and the offset of its end, up to the first torn one."""
    start = 0
    while (end := data.find(b"\n", start)) >= 0:
        digits, _, text = data[start:end].partition(b" ")
        if digits != b"%08x" % zlib.crc32(text):
            return
        value = json.loads(text)
        if not isinstance(value, dict):
            return
        start = end + 1
        yield value, start


def fsync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
