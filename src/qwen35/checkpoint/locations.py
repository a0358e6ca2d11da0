"""Locations of checkpoint files: a folder, or a Hub repository (`qwen35.checkpoint.hub`)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from stat import S_ISREG
from typing import Protocol

from qwen35.errors import InputError, UsageError

__all__ = [
    "FileLocation",
    "LocalFolder",
    "expanded",
    "folder_name",
    "open_file",
    "read_bounded",
    "stamp",
]

_SNAPSHOT = re.compile(r"models--(?:[^/]+?--)?(?P<name>[^/]+)/snapshots/[^/]+\Z")
"""The end of a snapshot's path in the Hub's cache: models--owner--name/snapshots/commit."""


def folder_name(root: Path) -> str:
    """Return what a model in a folder is called: a snapshot of the Hub's cache by its repository.

    >>> folder_name(Path("/hub/models--Qwen--Qwen3.5-0.8B/snapshots/0123abc"))
    'Qwen3.5-0.8B'
    """
    snapshot = _SNAPSHOT.search(root.resolve().as_posix())
    return snapshot["name"] if snapshot else root.resolve().name


def stamp(status: os.stat_result) -> tuple[int, int]:
    """Return size in bytes and modification time in ns, which change when a file does."""
    return status.st_size, status.st_mtime_ns


def open_file(path: Path) -> int:
    """Open a file for reading; pipes, which would block, and devices are refused.

    Raises:
        InputError: not a regular file, or not readable.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    except OSError as error:
        raise InputError(str(path), f"cannot be read ({error.strerror})") from error
    raise InputError(str(path), "not a file")


def read_bounded(path: Path, limit: int = 2**30) -> bytes:
    """Return the content of a file of at most `limit` bytes.

    Raises:
        InputError: not a regular file, not readable or larger.
    """
    try:
        with os.fdopen(open_file(path), "rb") as file:
            large = os.fstat(file.fileno()).st_size > limit
            data = b"" if large else file.read(limit + 1)
    except OSError as error:
        raise InputError(str(path), f"cannot be read ({error.strerror})") from error
    if large or len(data) > limit:
        raise InputError(str(path), "far too large", expected=f"at most {limit} bytes")
    return data


def cache_folder() -> Path:
    """Return this package's cache folder, by the XDG base directory specification."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "qwen35"


class FileLocation(Protocol):
    """Named files of known size; `str()` gives the location for error messages."""

    def sizes(self) -> Mapping[str, int]:
        """Return the size in bytes of each file."""

    def folders(self) -> Sequence[str]:
        """Return the names of the folders in it."""

    def dangling(self) -> Mapping[str, str]:
        """Return the entries that cannot be read, with what they are."""

    def read(self, name: str, start: int, count: int) -> bytes:
        """Return `count` bytes of a file, starting at `start`."""


def expanded(name: str) -> Path:
    """Return a path that a user named, with the folder of a user in place of ``~``.

    Raises:
        UsageError: there is no such user, or no file can have this name.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        found = f"no folder of that user ({error})"
        raise UsageError(name[:80], found, hint="write the whole path") from error
    if "\0" in name:
        raise UsageError(name.replace("\0", "\\0")[:80], "holds a NUL", expected="a path")
    return path


def _no_file(path: Path) -> str:
    """Return what `path` is, if neither a file nor a folder."""
    if path.is_file() or path.is_dir():
        return ""
    if path.is_symlink() and not path.exists():
        return f"a link to {path.readlink()}, which does not exist"
    return "a pipe, a socket or a device"


class LocalFolder:
    """The files directly in a folder.

    Raises:
        InputError: the folder is missing, or a file cannot be read.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise InputError(
                str(root),
                "not a folder" if root.exists() else "no such folder",
                expected="a checkpoint: config.json and safetensors files",
            )
        self._root = root

    def __str__(self) -> str:
        return str(self._root)

    @cached_property
    def _stamps(self) -> dict[str, tuple[int, int]]:
        try:
            return {p.name: stamp(p.stat()) for p in self._entries() if p.is_file()}
        except OSError as error:
            raise InputError(str(self._root), f"cannot be read ({error.strerror})") from error

    def sizes(self) -> Mapping[str, int]:
        """Return the size in bytes of each file."""
        return {name: size for name, (size, _) in self._stamps.items()}

    def folders(self) -> Sequence[str]:
        """Return the names of the folders in it."""
        return sorted(path.name for path in self._entries() if path.is_dir())

    def dangling(self) -> Mapping[str, str]:
        """Return the entries that cannot be read, with what they are."""
        try:
            return {p.name: what for p in sorted(self._entries()) if (what := _no_file(p))}
        except OSError as error:
            raise InputError(str(self._root), f"cannot be read ({error.strerror})") from error

    def _entries(self) -> list[Path]:
        try:
            return list(self._root.iterdir())
        except OSError as error:
            raise InputError(str(self._root), f"cannot be read ({error.strerror})") from error

    def stamps(self) -> Mapping[str, tuple[int, int]]:
        """Return size and modification time of each file, as of the first call."""
        return self._stamps

    def read(self, name: str, start: int, count: int) -> bytes:
        """Return `count` bytes of a file, starting at `start`."""
        try:
            with (self._root / name).open("rb") as file:
                file.seek(start)
                data = file.read(count)
        except OSError as error:
            raise InputError(name, f"cannot be read ({error.strerror})") from error
        if len(data) != count:
            raise InputError(name, f"ends after {start + len(data)} bytes", expected="more")
        return data
