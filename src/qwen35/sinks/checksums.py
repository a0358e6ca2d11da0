"""Checksums of finished pieces, computed while they are written: by any thread, in any order.

They are Adler-32: a sum of the bytes, and one of the bytes times their distance from the end, both
modulo 65521. The share of any part in both is known from where it lies, so that parts add up in
whatever order they are written; CRC-32 needs them one after the other, SHA-256 too, and much more
time. A changed byte is always found, other damage but for one case in four billion. It protects
against disks and crashes; the SHA-256 of a file is in the manifest.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from threading import Lock

from qwen35.tensors import TensorSpec

__all__ = ["PieceSums", "checksum_of", "is_zero"]

_MODULUS = 65521
_BLOCK = 2**20


@dataclass
class _Sums:
    """The parts that were written: their number of bytes and shares in both sums."""

    nbytes: int = 0
    low: int = 0
    high: int = 0


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
        count = data.nbytes
        behind = -offset - count
        for tensor in reversed(tensors):
            behind += tensor.nbytes
            if tensor.name == name:
                break
        value = zlib.adler32(data)
        low, high = (value & 0xFFFF) - 1, (value >> 16) - count
        with self._lock:
            sums = self._sums.setdefault((tensors[0].name, files), _Sums())
            sums.nbytes += count
            sums.low += low
            sums.high += high + behind * low

    def take(self, tensors: tuple[TensorSpec, ...], files: tuple[str, ...]) -> str:
        """Return a complete piece's checksum as 8 hexadecimal digits, and forget it."""
        with self._lock:
            sums = self._sums.pop((tensors[0].name, files), _Sums())
        nbytes = sum(tensor.nbytes for tensor in tensors)
        assert sums.nbytes == nbytes, tensors[0].name  # every byte is written exactly once
        return f"{(sums.high + nbytes) % _MODULUS << 16 | (sums.low + 1) % _MODULUS:08x}"


def checksum_of(descriptor: int, ranges: Iterable[tuple[int, int]]) -> str:
    """Return the checksum of a piece in a file: of byte ranges (offset, size), in order."""
    value = 1
    for offset, nbytes in ranges:
        for begin in range(offset, offset + nbytes, _BLOCK):
            block = os.pread(descriptor, min(_BLOCK, offset + nbytes - begin), begin)
            value = zlib.adler32(block, value)
    return f"{value:08x}"


def is_zero(descriptor: int, begin: int, end: int) -> bool:
    """Return whether a file has zeros from byte `begin` up to `end`."""
    return not any(os.pread(descriptor, end - begin, begin))
