"""The SHA-256 of a file, computed while it is filled, behind the part that is complete."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from threading import Lock

__all__ = ["PrefixHash"]

_BLOCK = 2**20


class PrefixHash:
    """Hashes each byte once: from memory what continues the prefix, from the file the rest.

    Any thread may write anywhere, each byte once. One of them at a time hashes; the others only
    note what they wrote.

    Args:
        descriptor: the file, open for reading.
        nbytes: its size.
        pending: byte ranges (begin, end) that will be written; the rest is complete.
    """

    def __init__(self, descriptor: int, nbytes: int, pending: Iterable[tuple[int, int]]) -> None:
        self._descriptor, self._nbytes = descriptor, nbytes
        self._digest = hashlib.sha256()
        self._hashed = 0
        self._busy = False
        self._lock = Lock()
        self._ends: dict[int, int] = {}
        """Complete ranges that are not hashed yet: begin to end."""
        last = 0
        for begin, end in sorted(pending):
            if last < begin:
                self._ends[last] = begin
            last = max(last, end)
        if last < nbytes:
            self._ends[last] = nbytes

    def wrote(self, begin: int, data: memoryview) -> None:
        """Note what a thread wrote, and hash what is complete unless another thread does so."""
        if not data.nbytes:
            return
        with self._lock:
            if self._busy or begin != self._hashed:
                self._ends[begin] = begin + data.nbytes
                data = data[:0]
            if self._busy:
                return
            self._busy = True
        self._digest.update(data)
        self._hashed += data.nbytes
        self._follow()

    def _follow(self) -> None:
        while True:
            with self._lock:
                end = self._ends.pop(self._hashed, None)
                if end is None:
                    self._busy = False
                    return
            for begin in range(self._hashed, end, _BLOCK):
                block = os.pread(self._descriptor, min(_BLOCK, end - begin), begin)
                self._digest.update(block)
                self._hashed += len(block)
            assert self._hashed == end  # nobody truncates a file that is locked

    def finish(self) -> str:
        """Return the digest as hexadecimal digits; everything pending must have been written."""
        self._busy = True
        self._follow()
        assert self._hashed == self._nbytes, (self._hashed, self._nbytes)
        return self._digest.hexdigest()
