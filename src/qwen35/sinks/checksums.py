"""Checksums of finished pieces, computed while they are written: by any thread, in any order.

A piece is a row of 64-bit words, little-endian, each tensor filled up with zeros. Its checksum is
three sums: of the words, of their upper halves, and of the words times their positions; the first
and the last modulo 2**64. The share of any part is known from where it lies, so that parts add up
in whatever order they are written. Adler-32 adds up as well, but byte by byte, and takes more than
twice the time; CRC-32 needs parts one after the other, SHA-256 too, and much more time.

A changed word is always found. Upper halves are summed by themselves so that bits which vanish
beyond 2**64 count there: a bit that is stuck on a memory line changes many words in the same place.
It protects against disks and crashes; the SHA-256 of a file is in the manifest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from threading import Lock

from qwen35.tensors import TensorSpec

__all__ = ["PieceSums", "checksum_of", "is_zero"]

_WORD = 8
_MASK = 2**64 - 1
_BLOCK = 2**20
_ROW = 1024
"""Words of a row: positions are multiplied with sums of rows and columns, not with every word."""


@dataclass
class _Sums:
    """The parts that were added: their number of bytes and shares in the three sums."""

    nbytes: int = 0
    words: int = 0
    halves: int = 0
    places: int = 0

    def add(self, offset: int, data: memoryview) -> None:
        """Add what lies `offset` bytes behind the beginning of the first word."""
        nbytes = data.nbytes
        self.nbytes += nbytes
        if offset % _WORD or nbytes % _WORD:  # rarely, and only the ends of tensors
            before = offset % _WORD
            data = memoryview(bytes(before) + bytes(data) + bytes(-(before + nbytes) % _WORD))
        words, halves, places = _sums_of(data)
        self.words += words
        self.halves += halves
        self.places += places + offset // _WORD * words

    def merge(self, other: _Sums) -> None:
        """Add the parts of another."""
        self.nbytes += other.nbytes
        self.words += other.words
        self.halves += other.halves
        self.places += other.places

    def __str__(self) -> str:
        """Return 48 hexadecimal digits."""
        return "".join(f"{sum_ & _MASK:016x}" for sum_ in (self.words, self.halves, self.places))


def _sums_of(data: memoryview) -> tuple[int, int, int]:
    """Return the sums of whole words, the first at position 0."""
    import numpy as np

    words = np.frombuffer(data, "<u8")
    full = len(words) // _ROW * _ROW
    rows = words[:full].reshape(-1, _ROW)
    by_row, by_column = rows.sum(axis=1), rows.sum(axis=0)  # modulo 2**64, as all of NumPy's
    by_column[: len(words) - full] += words[full:]
    order = np.arange(max(_ROW, len(by_row)), dtype=np.uint64)
    places = int(by_column @ order[:_ROW]) + _ROW * int(by_row @ order[: len(by_row)])
    places += full * int(words[full:].sum())
    return int(by_column.sum()), int((words >> np.uint64(32)).sum()), places


class PieceSums:
    """The checksums of the pieces that are being written; thread-safe.

    A piece is one or more tensors, in order, as `files` hold them.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, tuple[str, ...]], _Sums] = {}
        self._lock = Lock()

    def add(
        self,
        tensors: tuple[TensorSpec, ...],
        files: tuple[str, ...],
        name: str,
        offset: int,
        data: memoryview,
    ) -> None:
        """Add what is written at byte `offset` of the tensor `name` of a piece."""
        for tensor in tensors:
            if tensor.name == name:
                break
            offset += _filled_up(tensor.nbytes)
        part = _Sums()
        part.add(offset, data)
        with self._lock:
            self._sums.setdefault((tensors[0].name, files), _Sums()).merge(part)

    def take(self, tensors: tuple[TensorSpec, ...], files: tuple[str, ...]) -> str:
        """Return a complete piece's checksum as hexadecimal digits, and forget it."""
        with self._lock:
            sums = self._sums.pop((tensors[0].name, files), _Sums())
        # every byte is written exactly once
        assert sums.nbytes == sum(tensor.nbytes for tensor in tensors), tensors[0].name
        return str(sums)


def _filled_up(nbytes: int) -> int:
    return -(-nbytes // _WORD) * _WORD


def checksum_of(descriptor: int, ranges: Iterable[tuple[int, int]]) -> str:
    """Return the checksum of a piece in a file: of byte ranges (offset, size), in order."""
    sums, begin = _Sums(), 0
    for offset, nbytes in ranges:
        for done in range(0, nbytes, _BLOCK):
            block = os.pread(descriptor, min(_BLOCK, nbytes - done), offset + done)
            sums.add(begin + done, memoryview(block))
        begin += _filled_up(nbytes)
    return str(sums)


def is_zero(descriptor: int, begin: int, end: int) -> bool:
    """Return whether a file has zeros from byte `begin` up to `end`."""
    return not any(os.pread(descriptor, end - begin, begin))
