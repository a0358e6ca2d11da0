"""A journal of finished pieces on disk, from which a run resumes one that was killed.

The first line holds the key of the work; each further line holds finished pieces, as a JSON object
of name to result, with its CRC-32. A line is on disk when `record` returns. Reading stops at the
first line whose CRC-32 does not match. A crash tears at most the last one; what else is damaged is
told in a note, since the work that it held is done again.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from qwen35.closing import Closing
from qwen35.errors import OutputError
from qwen35.planning.key_differences import key_differences
from qwen35.sinks.work_folder import fsync_folder, open_ours

__all__ = ["Journal"]

_LOG = logging.getLogger(__name__)
_MAX_BYTES = 2**30
"""Bound on a journal, so that no other file is read whole; a line is about 100 bytes."""


class Journal(Closing, Mapping[str, Any]):
    """The finished pieces of a run: name to result, as plain JSON values.

    Args:
        path: the file; created if missing. Only one process at a time may open it.
        key: everything that decides the results, under names that a user understands. A run with
            another key cannot resume.
        home: what a user removes to start over; by default the journal.

    Attributes:
        is_new: whether there was no journal, or an empty one.

    Raises:
        OutputError: it holds finished pieces under another key, or another process has it open.
    """

    def __init__(self, path: Path, key: Mapping[str, Any], *, home: Path | None = None) -> None:
        self._pieces: dict[str, Any] = {}
        self._lock = Lock()
        self.is_new = False
        self._descriptor = open_ours(path, os.O_CREAT | os.O_RDWR | os.O_APPEND)
        try:
            self._lock_file(path)
            # through JSON and back, to compare equal to what was read: tuples become lists
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
        """Close and unlock the file; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def record(self, finished: Mapping[str, Any]) -> None:
        """Record finished pieces, all or none, and flush them to disk; thread-safe.

        Files that the results refer to must be on disk already.
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

    def _lock_file(self, path: Path) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = "wait for it to end"
            raise OutputError(str(path), "another run is writing it", hint=hint) from error

    def _load(self, path: Path, key: dict[str, Any], home: Path) -> None:
        size = 0
        stored_key: dict[str, Any] | None = None
        content = self._content(path)
        for value, size in _lines(content):  # noqa: B007
            if stored_key is None:
                stored_key = value
            else:
                self._pieces.update(value)
        self.is_new = not content
        if stored_key != key and self._pieces:
            raise _key_error(stored_key or {}, key, home)
        if stored_key is None and content:
            _LOG.warning("%s: is damaged: starting over", path)
        elif b"\n" in content[size:]:
            _LOG.warning("%s: is damaged from byte %d on: what it held is done again", path, size)
        if stored_key != key:
            os.ftruncate(self._descriptor, 0)
            self._append(key)
            fsync_folder(path.parent)
            return
        os.ftruncate(self._descriptor, size)  # cut off a torn line: new ones are appended

    def _content(self, path: Path) -> bytes:
        size = os.fstat(self._descriptor).st_size
        if size > _MAX_BYTES:
            found, expected = f"is {size} bytes long", f"a journal of at most {_MAX_BYTES}"
            raise OutputError(str(path), found, expected=expected, hint="remove it to start over")
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            return file.read()


def _key_error(stored_key: Mapping[str, Any], key: Mapping[str, Any], home: Path) -> OutputError:
    names = key_differences(stored_key, key) or ["key"]
    return OutputError(
        str(home),
        f"holds an unfinished run with another {' and another '.join(names)}",
        hint="run the original command again to resume, or remove this to start over",
    )


def _line(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _lines(data: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the value and the end offset of each intact line, up to the first torn one."""
    start = 0
    while (end := data.find(b"\n", start)) >= 0:
        digits, _, text = data[start:end].partition(b" ")
        if digits != b"%08x" % zlib.crc32(text):
            return
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):  # intact, but not written by us
            return
        if not isinstance(value, dict):
            return
        start = end + 1
        yield value, start
