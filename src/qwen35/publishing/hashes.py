"""Hashes of local files, and a cache of them: a file at rest is read once."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from qwen35.errors import InputError
from qwen35.progress import Progress, Silent
from qwen35.threads import default_threads

__all__ = ["FileDigest", "FileHasher", "digest_bytes", "digest_file"]

_PIECE = 2**20
_TOLD_BYTES = 100_000_000
BLOB_BYTES = 64 * 2**20
_SETTLED_NS = 2 * 10**9
"""A file changed more recently is not cached: its next change could bear the same time."""

_TABLE = (
    "CREATE TABLE IF NOT EXISTS digest (device INTEGER, inode INTEGER, size INTEGER, mtime INTEGER,"
    " ctime INTEGER, sha256 TEXT, blob TEXT, PRIMARY KEY (device, inode))"
)


@dataclass(frozen=True)
class FileDigest:
    """What the Hub knows a file's content by.

    Args:
        size: bytes.
        sha256: of the content; how the Hub names large files (LFS).
        blob: SHA-1 of git's blob object; how it names the others. Not known (empty) beyond
            `BLOB_BYTES`: the Hub stores nothing of that size so.
    """

    size: int
    sha256: str
    blob: str


def digest_bytes(content: bytes) -> FileDigest:
    """Return the digest of `content`.

    >>> digest_bytes(b"").blob
    'e69de29bb2d1d6434b8b29ae775ad8c2e48c5391'
    """
    blob = hashlib.sha1(b"blob %d\0" % len(content), usedforsecurity=False)
    blob.update(content)
    return FileDigest(len(content), hashlib.sha256(content).hexdigest(), blob.hexdigest())


def digest_file(path: Path) -> FileDigest:
    """Return the digest of a file, read once.

    Raises:
        InputError: it cannot be read, or changes meanwhile.
    """
    try:
        return _digest(path)[0]
    except OSError as error:
        raise InputError(str(path), f"cannot be read ({error.strerror})") from error


def _digest(path: Path) -> tuple[FileDigest, os.stat_result]:
    with path.open("rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        sha256 = hashlib.sha256()
        blob = hashlib.sha1(b"blob %d\0" % before.st_size, usedforsecurity=False)
        is_small = before.st_size <= BLOB_BYTES
        buffer = memoryview(bytearray(_PIECE))
        while count := file.readinto(buffer):
            sha256.update(buffer[:count])
            if is_small:
                blob.update(buffer[:count])
        after = os.fstat(file.fileno())
    if _state(before) != _state(after):
        raise InputError(str(path), "changed while it was read", hint="run again when it rests")
    name = blob.hexdigest() if is_small else ""
    return FileDigest(before.st_size, sha256.hexdigest(), name), before


def _told(path: Path, progress: Progress) -> tuple[FileDigest, os.stat_result]:
    digest, stat = _digest(path)
    progress.advance(digest.size, path.name)
    return digest, stat


def _state(stat: os.stat_result) -> tuple[int, int, int, int, int]:
    """What tells one state of a file from another: device, inode, size and both times."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


class FileHasher:
    """Hashes files, several at a time, and remembers the results in the user's cache folder.

    A result counts as long as the file's inode, size and times are those it had when it was read.

    Args:
        cache: the database; the default is ``qwen35/hashes.sqlite`` in ``$XDG_CACHE_HOME``.
        progress: told of the bytes read, if they are many.
        remember: whether new results are put into the cache.
    """

    def __init__(
        self,
        cache: Path | None = None,
        progress: Progress | None = None,
        *,
        remember: bool = True,
    ) -> None:
        self._remember = remember
        self._progress = progress or Silent()
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._cache = cache or home / "qwen35" / "hashes.sqlite"
        self.read_bytes = 0

    def digests(self, paths: Iterable[Path]) -> dict[Path, FileDigest]:
        """Return the digest of each file.

        Raises:
            InputError: one cannot be read, or changes while it is.
        """
        known: dict[Path, FileDigest] = {}
        unknown: dict[Path, int] = {}
        remembered = self._load()
        for path in paths:
            try:
                stat = path.stat()
            except OSError as error:
                raise InputError(str(path), f"cannot be read ({error.strerror})") from error
            if found := remembered.get(_state(stat)):
                known[path] = found
            else:
                unknown[path] = stat.st_size
        return known | self._hash(unknown)

    def _hash(self, paths: Mapping[Path, int]) -> dict[Path, FileDigest]:
        if not paths:
            return {}
        total = sum(paths.values())
        told = self._progress if total >= _TOLD_BYTES else Silent()
        told.begin("hashing", total)
        try:
            with ThreadPoolExecutor(default_threads()) as pool:
                results = list(pool.map(lambda path: _told(path, told), paths))
        except OSError as error:
            raise InputError(str(error.filename), f"cannot be read ({error.strerror})") from error
        finally:
            told.end()
        self.read_bytes += sum(digest.size for digest, _ in results)
        self._store([row for row in results if _settled(row[1])])
        return {path: digest for path, (digest, _) in zip(paths, results, strict=True)}

    def _load(self) -> Mapping[tuple[int, ...], FileDigest]:
        if not self._cache.exists():
            return {}
        with suppress(sqlite3.Error), closing(sqlite3.connect(self._cache)) as base:
            rows = base.execute(
                "SELECT device, inode, size, mtime, ctime, sha256, blob FROM digest"
            )
            return {row[:5]: FileDigest(row[2], row[5], row[6]) for row in rows}
        return {}  # damaged: it is only a cache

    def _store(self, results: list[tuple[FileDigest, os.stat_result]]) -> None:
        """Remember results; a home without room for a cache costs time, not the command."""
        if not self._remember:
            return
        rows = [(*_state(stat), digest.sha256, digest.blob) for digest, stat in results]
        with suppress(sqlite3.Error, OSError):
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._cache)) as base, base:
                base.execute(_TABLE)
                base.executemany("INSERT OR REPLACE INTO digest VALUES (?, ?, ?, ?, ?, ?, ?)", rows)


def _settled(stat: os.stat_result) -> bool:
    return time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS
