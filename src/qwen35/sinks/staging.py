"""An output folder that appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.errors import OutputError

__all__ = ["Result", "check_output", "check_space", "locked", "os_errors", "staging"]

_MARK_NAME = ".qwen35-partial"
_SPARE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Result:
    """What was written.

    Args:
        out: the folder.
        hashes: SHA-256 of every file but the manifest, by name.
        nbytes: bytes of all files.
    """

    out: Path
    hashes: dict[str, str]
    nbytes: int


def check_output(out: Path, *, source: Path | None, overwrite: bool) -> None:
    """Refuse an output that would harm something, before any work.

    Raises:
        OutputError: it exists (and is not ours to overwrite), or overlaps the source.
    """
    if source is not None:
        _check_overlap(out, source)
    with os_errors(out):
        if out.is_symlink():
            raise OutputError(
                str(out), "is a symbolic link", hint="give the folder that it leads to"
            )
        if not out.exists():
            return
        if not out.is_dir():
            raise OutputError(str(out), "exists and is not a folder")
        if os.path.ismount(out):
            raise OutputError(str(out), "is a mount point", hint="choose a folder in it")
        if any(out.iterdir()):
            _check_replaceable(out, overwrite)


def _check_overlap(out: Path, source: Path) -> None:
    resolved, origin = out.resolve(), source.resolve()
    if resolved == origin:
        raise OutputError(str(out), "output and input are the same folder")
    if resolved.is_relative_to(origin) or origin.is_relative_to(resolved):
        raise OutputError(str(out), f"overlaps the input {source}", hint="choose another folder")


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(str(out), "exists already", hint="give --overwrite to replace it")
    if not (out / MANIFEST_NAME).is_file():
        raise OutputError(
            str(out),
            f"holds no {MANIFEST_NAME}, so it was not written by qwen35",
            hint="remove it yourself or choose another folder",
        )


def check_space(folder: Path, needed: int) -> None:
    """Refuse to start when the disk of `folder` has less than `needed` bytes free.

    Raises:
        OutputError: it has not.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed + _SPARE_BYTES:
        raise OutputError(
            str(folder),
            f"{free / 1e9:.2f} GB free on its disk",
            expected=f"at least {(needed + _SPARE_BYTES) / 1e9:.2f} GB",
        )


def _existing(folder: Path) -> Path:
    """Return `folder` or the nearest folder above it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def staging_path(out: Path) -> Path:
    """Return the folder beside `out` in which it is prepared."""
    absolute = out.absolute()
    return absolute.with_name(f".{absolute.name}.partial")


@contextmanager
def staging(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Prepare `out` in a folder beside it; rename it on success, remove it on any failure.

    What an earlier, killed run left is removed first. A lock keeps a second run off.

    Raises:
        OutputError: another run is at it, something else took the name, or the disk refuses.
    """
    out = out.resolve()
    made = _make_parents(out.parent)
    done = False
    try:
        with os_errors(out), locked(out):
            folder = _fresh_folder(out)
            try:
                yield folder
                (folder / _MARK_NAME).unlink()
                _fsync_folder(folder)
                _replace(folder, out, overwrite)
                done = True
            finally:
                if not done:
                    shutil.rmtree(folder, ignore_errors=True)
    finally:
        if not done:
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()


@contextmanager
def os_errors(out: Path) -> Iterator[None]:
    """Turn what the operating system says about the output into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        subject = str(error.filename or out)
        raise OutputError(subject, f"cannot be written ({error.strerror})") from error


_DISK_ERRORS = (
    errno.EACCES,
    errno.EBUSY,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
    errno.EXDEV,
)


def _make_parents(parent: Path) -> list[Path]:
    """Create `parent`; return what was created, deepest first."""
    missing = []
    folder = parent
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    with os_errors(parent):
        _make_folder(parent)
    return missing


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise OutputError(str(folder), "exists and is not a folder") from error


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock file beside `out`; it is removed while it is still held."""
    path = out.with_name(f".{out.name}.lock")
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _busy(out) from error
        if not _is_same_file(descriptor, path):  # its holder ended just now and removed it
            raise _busy(out)
        try:
            yield
        finally:
            path.unlink()
    finally:
        os.close(descriptor)


def _busy(out: Path) -> OutputError:
    return OutputError(str(out), "another run is writing it", hint="wait for it to end")


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _fresh_folder(out: Path) -> Path:
    """Return an empty, marked staging folder; what a killed run left in it is removed."""
    folder = staging_path(out)
    if folder.is_symlink() or folder.exists():
        if folder.is_symlink() or not (folder / _MARK_NAME).is_file():
            raise OutputError(
                str(folder), "is in the way and was not made by qwen35", hint="move it away"
            )
        shutil.rmtree(folder)
    folder.mkdir()
    (folder / _MARK_NAME).touch()
    return folder


def _replace(folder: Path, out: Path, overwrite: bool) -> None:
    """Rename `folder` to `out`; an `out` of ours that is in the way is moved aside first."""
    check_output(out, source=None, overwrite=overwrite)
    old = out.with_name(f".{out.name}.old")
    if old.exists() or old.is_symlink():  # what a killed run moved aside and could not remove
        if old.is_symlink() or not (old / MANIFEST_NAME).is_file():
            raise OutputError(str(old), "is in the way and was not made by qwen35")
        shutil.rmtree(old)
    moved = out.exists() and any(out.iterdir())
    if moved:
        os.rename(out, old)
    try:
        os.rename(folder, out)
    except OSError:
        if moved:
            os.rename(old, out)
        raise
    _fsync_folder(out.parent)
    if moved:
        shutil.rmtree(old)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
