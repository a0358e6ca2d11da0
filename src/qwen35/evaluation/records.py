"""A file that grows record by record and never holds half of one: it is cut after the last whole.

A line that says what it is, a JSON header on a line of its own, then records: length and CRC-32
(uint32), payload.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from qwen35.errors import InputError

__all__ = ["RecordFile"]

_FRAME = struct.Struct("<II")
_MAX_HEAD = 2**20


class RecordFile:
    """Such a file.

    Args:
        path: the file.
        magic: its first line, without the line end.
        head: what it must say of itself when it is continued; None to read whatever there is.

    Attributes:
        head: what it says of itself.
        count: how many records are whole.

    Raises:
        InputError: reading, and it is not such a file.
    """

    def __init__(self, path: Path, magic: str, head: Mapping[str, Any] | None = None) -> None:
        self._path = path
        writing = head is not None
        try:
            self._file: BinaryIO = path.open("ab+" if writing else "rb")
        except OSError as error:
            raise InputError(str(path), f"cannot be opened ({error.strerror})") from error
        self._size = os.fstat(self._file.fileno()).st_size
        found = self._read_head(magic)
        if writing and found != head:
            self._file.truncate(0)
            self._file.write(f"{magic}\n{json.dumps(head)}\n".encode())
            self._file.flush()
            self._size = os.fstat(self._file.fileno()).st_size
            found = self._read_head(magic)
        if found is None:
            self.close()
            raise InputError(path.name, "not a file of this kind", expected=magic)
        self.head: Any = found
        self._start = self._file.tell()
        self._frames = self._scan()

    def _read_head(self, magic: str) -> Any:
        self._file.seek(0)
        if self._file.readline(len(magic) + 1) != f"{magic}\n".encode():
            return None
        line = self._file.readline(_MAX_HEAD)
        try:
            return json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            return None

    def _scan(self) -> list[tuple[int, int, int]]:
        """Return start, length and checksum of each record that is there in full length."""
        frames, position = [], self._start
        while position + _FRAME.size <= self._size:
            self._file.seek(position)
            length, checksum = _FRAME.unpack(self._file.read(_FRAME.size))
            position += _FRAME.size
            if position + length > self._size:
                break
            frames.append((position, length, checksum))
            position += length
        return frames

    @property
    def count(self) -> int:
        """How many records."""
        return len(self._frames)

    def read(self, index: int) -> bytes:
        """Return a record.

        Raises:
            InputError: it is damaged.
        """
        begin, length, checksum = self._frames[index]
        self._file.seek(begin)
        data = self._file.read(length)
        if len(data) != length or zlib.crc32(data) != checksum:
            raise InputError(self._path.name, f"record {index + 1} is damaged", hint="delete it")
        return data

    def cut(self, count: int) -> None:
        """Drop all records but the first `count`, and what is broken after them."""
        self._frames = self._frames[:count]
        if self._frames:
            begin, length, _ = self._frames[-1]
            self._file.truncate(begin + length)
        else:
            self._file.truncate(self._start)

    def append(self, data: bytes) -> None:
        """Add a record and hand it to the system; one write, so that it is whole or broken."""
        self._file.seek(0, os.SEEK_END)
        begin = self._file.tell() + _FRAME.size
        self._file.write(_FRAME.pack(len(data), zlib.crc32(data)) + data)
        self._file.flush()
        self._frames.append((begin, len(data), zlib.crc32(data)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()
