"""Hash local files, with a cache: an unchanged file is read once."""

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

from qwen35.checkpoint.locations import cache_folder
from qwen35.errors import InputError
from qwen35.progress import Progress, Silent
from qwen35.threads import default_threads

__all__ = ["FileDigest", "FileHasher", "digest_bytes", "digest_file"]

_PIECE = 2**20
_PROGRESS_BYTES = 100_000_000
"""Less than this is hashed without a progress bar."""

BLOB_BYTES = 64 * 2**20
SETTLED_NS = 2 * 10**9
"""A file changed more recently is not cached: its next change could have the same timestamp."""

_TABLE = (
    "CREATE TABLE IF NOT EXISTS digest (device INTEGER, inode INTEGER, size INTEGER, mtime INTEGER,"
    " ctime INTEGER, sha256 TEXT, blob TEXT, PRIMARY KEY (device, inode))"
)


@dataclass(frozen=True)
class FileDigest:
    """The digests by which the Hub identifies content.

    Args:
        size: bytes.
        sha256: of the content; identifies large files (LFS).
        blob: SHA-1 of git's blob object; identifies the others. Empty beyond `BLOB_BYTES`: the Hub
            stores larger files in LFS only.
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
        InputError: it cannot be read, or changes while it is read.
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
        raise InputError(
            str(path), "changed while it was read", hint="run again when nothing writes to it"
        )
    name = blob.hexdigest() if is_small else ""
    return FileDigest(before.st_size, sha256.hexdigest(), name), before


def _digest_with_progress(path: Path, progress: Progress) -> tuple[FileDigest, os.stat_result]:
    digest, stat = _digest(path)
    progress.advance(digest.size, path.name)
    return digest, stat


def _state(stat: os.stat_result) -> tuple[int, int, int, int, int]:
    """Return values that change with the file: device, inode, size and both times."""
    # inode and ctime too: a replaced file may have the same size and mtime
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


class FileHasher:
    """Hashes files, several at a time, and caches the results in the user's cache folder.

    A result is valid as long as the file's inode, size and times are unchanged.

    Args:
        cache: the database; by default ``qwen35/hashes.sqlite`` in ``$XDG_CACHE_HOME``.
        progress: receives bytes read, if there are many.
        remember: store new results in the cache.
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
        self._cache = cache or cache_folder() / "hashes.sqlite"
        self.read_bytes = 0

    def digests(self, paths: Iterable[Path]) -> dict[Path, FileDigest]:
        """Return the digest of each file.

        Raises:
            InputError: one cannot be read, or changes while it is read.
        """
        hits: dict[Path, FileDigest] = {}
        misses: dict[Path, int] = {}
        cached = self._load()
        for path in paths:
            try:
                stat = path.stat()
            except OSError as error:
                raise InputError(str(path), f"cannot be read ({error.strerror})") from error
            if digest := cached.get(_state(stat)):
                hits[path] = digest
            else:
                misses[path] = stat.st_size
        return hits | self._hash(misses)

    def _hash(self, paths: Mapping[Path, int]) -> dict[Path, FileDigest]:
        if not paths:
            return {}
        total = sum(paths.values())
        progress = self._progress if total >= _PROGRESS_BYTES else Silent()
        progress.begin("hashing", total)
        try:
            with ThreadPoolExecutor(default_threads()) as pool:
                results = list(pool.map(lambda path: _digest_with_progress(path, progress), paths))
        except OSError as error:
            raise InputError(str(error.filename), f"cannot be read ({error.strerror})") from error
        finally:
            progress.end()
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
        return {}  # a damaged cache counts as empty

    def _store(self, results: list[tuple[FileDigest, os.stat_result]]) -> None:
        """Store results; a cache that cannot be written is not an error."""
        if not self._remember:
            return
        rows = [(*_state(stat), digest.sha256, digest.blob) for digest, stat in results]
        with suppress(sqlite3.Error, OSError):
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._cache)) as base, base:
                base.execute(_TABLE)
                base.executemany("INSERT OR REPLACE INTO digest VALUES (?, ?, ?, ?, ?, ?, ?)", rows)


def _settled(stat: os.stat_result) -> bool:
    return time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_NS
