"""An append-only record file for resuming: a torn last record is ignored and overwritten.

Layout: a magic line, a line with a JSON header, then records of length (uint32), CRC-32 (uint32)
and payload.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from qwen35.checkpoint.locations import open_file
from qwen35.errors import InputError
from qwen35.sinks.work_folder import open_ours

__all__ = ["RecordFile", "check_kind"]

_LOG = logging.getLogger(__name__)
_FRAME = struct.Struct("<II")
_MAX_HEAD = 2**20
"""Bound on the header's bytes, so that a file of another kind is not read whole."""


def check_kind(file: BinaryIO, path: Path, begin: bytes) -> None:
    """Check that a file to be continued, or emptied, begins as its kind does; it may be torn.

    Raises:
        InputError: it is of another kind; it is closed.
    """
    file.seek(0)
    if not begin.startswith(file.read(len(begin))):
        file.close()
        found, expected = "not a file of this kind", begin.decode().strip()
        raise InputError(str(path), found, expected=expected, hint="choose another name")


class RecordFile:
    """A record file, open for appending or reading.

    Args:
        path: the file.
        magic: its first line, without the newline.
        head: header to write; a file of this kind with another header is emptied. None opens the
            file for reading.

    Attributes:
        head: the file's header.
        count: number of complete records.

    Raises:
        InputError: the file cannot be opened, or has another format.
        OutputError: it is to be written and is no ordinary file.
    """

    def __init__(self, path: Path, magic: str, head: Mapping[str, Any] | None = None) -> None:
        self._path = path
        writing = head is not None
        self._file = _open(path, writing=writing)
        self._size = os.fstat(self._file.fileno()).st_size
        if writing:
            check_kind(self._file, path, f"{magic}\n".encode())
        current = self._read_head(magic)
        if writing and current != head:
            if self._size:
                _LOG.warning("%s: holds results of another run: starting over", path)
            self._file.truncate(0)
            self._file.write(f"{magic}\n{json.dumps(head)}\n".encode())
            self._file.flush()
            self._size = os.fstat(self._file.fileno()).st_size
            current = self._read_head(magic)
        if current is None:
            self.close()
            raise InputError(path.name, "not a file of this kind", expected=magic)
        self.head: Any = current
        self._start = self._file.tell()
        self._frames = self._scan()

    def _read_head(self, magic: str) -> Any:
        self._file.seek(0)
        if self._file.readline(len(magic) + 1) != f"{magic}\n".encode():
            return None
        line = self._file.readline(_MAX_HEAD)
        try:
            return json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            return None

    def _scan(self) -> list[tuple[int, int, int]]:
        """Return start, length and checksum of each record of full length."""
        frames, position = [], self._start
        while position + _FRAME.size <= self._size:
            self._file.seek(position)
            length, checksum = _FRAME.unpack(self._file.read(_FRAME.size))
            position += _FRAME.size
            if position + length > self._size:  # torn by a crash
                break
            frames.append((position, length, checksum))
            position += length
        return frames

    @property
    def count(self) -> int:
        """Number of records."""
        return len(self._frames)

    def read(self, index: int) -> bytes:
        """Return a record.

        Raises:
            InputError: the record is damaged.
        """
        begin, length, checksum = self._frames[index]
        self._file.seek(begin)
        data = self._file.read(length)
        if len(data) != length or zlib.crc32(data) != checksum:
            raise InputError(self._path.name, f"record {index + 1} is damaged", hint="delete it")
        return data

    def cut(self, count: int) -> None:
        """Keep only the first `count` records; drop a torn one too."""
        self._frames = self._frames[:count]
        if self._frames:
            begin, length, _ = self._frames[-1]
            self._file.truncate(begin + length)
        else:
            self._file.truncate(self._start)

    def append(self, data: bytes) -> None:
        """Append a record with one flushed write, so that a crash can tear only this record."""
        self._file.seek(0, os.SEEK_END)
        begin = self._file.tell() + _FRAME.size
        self._file.write(_FRAME.pack(len(data), zlib.crc32(data)) + data)
        self._file.flush()
        self._frames.append((begin, len(data), zlib.crc32(data)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _open(path: Path, *, writing: bool) -> BinaryIO:
    if not writing:
        return os.fdopen(open_file(path), "rb")
    try:
        return os.fdopen(open_ours(path, os.O_CREAT | os.O_RDWR | os.O_APPEND), "ab+")
    except OSError as error:
        raise InputError(str(path), f"cannot be opened ({error.strerror})") from error
