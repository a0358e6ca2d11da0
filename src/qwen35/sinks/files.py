"""Files in a staging folder: write, hash and flush to disk."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from qwen35.sinks.prefix_hash import PrefixHash
from qwen35.sinks.work_folder import check_is_file, in_work_folder, open_ours

__all__ = ["TensorFile", "flushed", "hash_file", "replace_file", "write_file"]

_PIECE = 2**20


class TensorFile:
    """A file whose head and size are known in advance; tensors may be written in any order.

    Args:
        path: where to create it.
        head: the bytes before the data.
        offsets: absolute offset of each tensor.
        nbytes: size of the whole file, reserved on disk at once.
        again: reopen an existing file of this head and size, and keep its data.
        shared: other processes fill it too; the first one creates it.
        pending: byte ranges (begin, end) that this process will write, if it alone writes; the file
            is then hashed on the way.
    """

    def __init__(
        self,
        path: Path,
        head: bytes,
        offsets: Mapping[str, int],
        nbytes: int,
        *,
        again: bool = False,
        shared: bool = False,
        pending: Iterable[tuple[int, int]] | None = None,
    ) -> None:
        self._path = path
        self._offsets = offsets
        self._hash: PrefixHash | None = None
        create = 0 if again else os.O_CREAT if shared else os.O_CREAT | os.O_EXCL
        access = os.O_WRONLY if shared else os.O_RDWR  # as `join`
        self._descriptor = open_ours(path, create | access)
        try:
            if not shared:
                _reserve(self._descriptor, nbytes)
            elif os.fstat(self._descriptor).st_size < nbytes:
                # all processes extend to this size and write this head, so no lock is needed,
                # which some shared file systems would not honour
                os.ftruncate(self._descriptor, nbytes)
            self._write_at(0, memoryview(head))
            if pending is not None:
                self._hash = PrefixHash(self._descriptor, nbytes, pending)
        except OSError:
            self.close()
            raise

    @classmethod
    def join(cls, path: Path, offsets: Mapping[str, int]) -> TensorFile:
        """Open a file that another process created and that several processes fill.

        Write-only: with read access some network file systems fetch and send back whole pages,
        which may hold tensors of other processes.
        """
        file = cls.__new__(cls)
        file._path, file._offsets, file._hash = path, offsets, None
        file._descriptor = open_ours(path, os.O_WRONLY)
        return file

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write `data` at byte `offset` of the tensor `name`; thread-safe."""
        self._write_at(self._offsets[name] + offset, data.cast("B"))

    def _write_at(self, position: int, data: memoryview) -> None:
        done = 0
        while done < len(data):  # a write may be partial
            done += os.pwrite(self._descriptor, data[done:], position + done)
        if self._hash is not None:
            self._hash.wrote(position, data)

    def sync(self) -> None:
        """Flush the file to disk; thread-safe."""
        os.fsync(self._descriptor)

    def finish(self) -> str:
        """Flush the file to disk and return its SHA-256."""
        self.sync()
        return hash_file(self._path) if self._hash is None else self._hash.finish()

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _reserve(descriptor: int, nbytes: int) -> None:
    """Allocate the file's blocks, so that a full disk is an error at the start."""
    if nbytes == 0:  # posix_fallocate refuses a length of 0
        return
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        # these mean that the file system cannot allocate in advance; anything else is a real error
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, nbytes)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits; in a work folder, only of one of ours."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE))
    with open(path, "rb", buffering=0, opener=_opener) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _opener(path: str, flags: int) -> int:
    return open_ours(Path(path), flags) if in_work_folder(Path(path)) else os.open(path, flags)


def flushed(path: Path) -> str:
    """Flush a file that a library wrote and return its SHA-256."""
    descriptor = open_ours(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return hash_file(path)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file, or replace it: a reader sees the old content or the new.

    What a killed run left, or somebody put, where the new content is prepared is removed first.

    Raises:
        OutputError: the path holds something else than a file.
    """
    check_is_file(path)
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    write_file(part, content)
    part.replace(path)


def write_file(path: Path, content: bytes) -> str:
    """Write a new file, flush it to disk and return its SHA-256."""
    descriptor = open_ours(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return hashlib.sha256(content).hexdigest()
