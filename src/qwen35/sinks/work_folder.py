"""Work folders: ours, or refused before anything in them is read, written or deleted.

A work folder has a predictable name beside the output, so anybody who can write there, or whose
archive was unpacked there, may have prepared one: with links to files elsewhere, pipes that block,
files of another user. Entries are opened by descriptor from the work folder down, and no link is
followed on the way.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qwen35.errors import OutputError

__all__ = [
    "FILES_NAME",
    "JOURNAL_NAME",
    "MARK_NAME",
    "OLD_NAME",
    "ORDER_NAME",
    "SLICES",
    "check_entries",
    "check_is_file",
    "check_tree",
    "check_work",
    "claim",
    "claim_tree",
    "discard",
    "fsync_folder",
    "in_work_folder",
    "misfit",
    "open_folder",
    "open_ours",
    "remove",
    "work_path",
]

FILES_NAME, OLD_NAME = "files", "old"
"""In a work folder: the output's files, and an output that is being replaced."""

JOURNAL_NAME, MARK_NAME = "journal", ".qwen35-partial"
"""In a work folder: the journal of a run without slices, and what tells that the folder is ours."""

ORDER_NAME = "order"
"""In a work folder: what workers and slices are told to do."""

SLICES = "slice-*"
"""In a work folder: the journals of slices."""

_SUFFIX = ".partial"
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
}
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def work_path(out: Path) -> Path:
    """Return the folder beside `out` for unfinished work."""
    absolute = out.absolute()
    return absolute.with_name(f".{absolute.name}{_SUFFIX}")


def claim(folder: Path) -> None:
    """Create a work folder and mark it as ours; several runs may do so at once.

    Raises:
        OutputError: as `check_work`.
    """
    check_work(folder)
    _mark(folder)


def claim_tree(folder: Path) -> None:
    """Do as `claim` for a folder of files with any names, in folders of any depth.

    Raises:
        OutputError: as `check_tree`.
    """
    check_tree(folder)
    _mark(folder)


def _mark(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    os.close(open_ours(folder / MARK_NAME, os.O_CREAT | os.O_WRONLY))
    fsync_folder(folder.parent)


def check_work(folder: Path) -> None:
    """Check a work folder before it is used; it may be missing.

    Raises:
        OutputError: the path holds something else, or the folder holds anything but what qwen35 put
            there: ordinary files and folders of this user.
    """
    if not _is_claimed(folder):
        return
    check_entries(folder, FILES_NAME)
    for name in os.listdir(folder):
        if not _may_be_ours(name):
            found, hint = "was not made by qwen35", "move it away: work folders are removed"
            raise OutputError(str(folder / name), found, hint=hint)


def check_tree(folder: Path) -> None:
    """Check a folder that `claim_tree` made, and everything below it; it may be missing.

    Raises:
        OutputError: the path holds something else, or the folder holds anything but ordinary files
            and folders of this user.
    """
    if not _is_claimed(folder):
        return
    check, unchecked = _EntryCheck(folder), [folder]
    check(folder, os.lstat(folder), is_folder=True)
    while unchecked:
        place = unchecked.pop()
        for name, status in _entries(place):
            check(place / name, status)
            if stat.S_ISDIR(status.st_mode):
                unchecked.append(place / name)


def _is_claimed(folder: Path) -> bool:
    """Return whether a folder exists; refuse one without our mark."""
    if not os.path.lexists(folder):
        return False
    if not _is_marked(folder):
        raise OutputError(
            str(folder), "is in the way and was not made by qwen35", hint="move it away"
        )
    return True


def _may_be_ours(name: str) -> bool:
    """Return whether an entry of a work folder has a name of ours, or is hidden.

    File servers hide removed files that are still open under such names.
    """
    begins = (".", f"{ORDER_NAME}.", SLICES.rstrip("*"))
    return name in (FILES_NAME, OLD_NAME, JOURNAL_NAME, ORDER_NAME) or name.startswith(begins)


def _is_marked(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    return not any(folder.iterdir()) or os.path.lexists(folder / MARK_NAME)


def check_entries(folder: Path, *subfolders: str) -> None:
    """Check a folder of ours, its entries, and those of some of its subfolders.

    Raises:
        OutputError: one is a link, pipe or device, has a second name, or belongs to another user.
    """
    check = _EntryCheck(folder)
    check(folder, os.lstat(folder), is_folder=True)
    for name, status in _entries(folder):
        check(folder / name, status, is_folder=_is_folder(name, subfolders))
    for name in subfolders:
        if os.path.lexists(folder / name):
            for inner, status in _entries(folder, name):
                check(folder / name / inner, status)


class _EntryCheck:
    """Refuses entries of a folder that are not ours."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._users = folder, {os.geteuid()}

    def __call__(
        self, path: Path, status: os.stat_result, *, is_folder: bool | None = None
    ) -> None:
        _check_kind(path, status, is_folder=is_folder)
        if status.st_uid not in self._users:
            self._users.add(owner_of_new_files(self._folder.parent))
        if status.st_uid not in self._users:
            raise OutputError(str(path), "belongs to another user", hint="remove it")


def _is_folder(name: str, subfolders: Sequence[str]) -> bool | None:
    """Return whether an entry of a work folder has to be a folder; None if both will do."""
    if name in subfolders or name == OLD_NAME:
        return True
    ours = name in (JOURNAL_NAME, MARK_NAME) or name.startswith(SLICES.rstrip("*"))
    return False if ours else None


def _entries(top: Path, *names: str) -> Iterator[tuple[str, os.stat_result]]:
    with open_folder(top, *names) as descriptor, os.scandir(descriptor) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # another slice has just renamed it
                yield entry.name, entry.stat(follow_symlinks=False)


def _check_kind(path: Path, status: os.stat_result, *, is_folder: bool | None = None) -> None:
    """Refuse what is neither an ordinary file nor a folder, or not the one that it has to be."""
    kind = stat.S_IFMT(status.st_mode)
    allowed = {True: (stat.S_IFDIR,), False: (stat.S_IFREG,), None: (stat.S_IFDIR, stat.S_IFREG)}
    found = ""
    if kind not in allowed[is_folder]:
        found = f"is {_KINDS.get(kind, 'not a file')}"
    elif kind == stat.S_IFREG and status.st_nlink > 1:
        found = "has a second name elsewhere (a hard link)"
    if found:
        expected = f"a {'folder' if is_folder else 'file'} of ours"
        raise OutputError(str(path), found, expected=expected, hint="remove it")


def check_is_file(path: Path) -> None:
    """Check a path, which may be missing, before a file takes its place.

    Raises:
        OutputError: it holds something else, such as a pipe or `/dev/stdout`.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        return
    if kind != stat.S_IFREG:
        found, hint = f"is {_KINDS.get(kind, 'something else')}", "choose another name"
        raise OutputError(str(path), found, expected="a file", hint=hint)


def owner_of_new_files(folder: Path) -> int:
    """Return who owns what this user creates there: file servers may map users to others."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return os.geteuid()


def open_ours(path: Path, flags: int) -> int:
    """Open or create a file, through the descriptors of its work folder if it lies in one.

    Raises:
        OutputError: it is not an ordinary file, or has a second name.
    """
    top = _top(path)
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # so that no pipe blocks
    try:
        if top is not None:
            with open_folder(top, *path.parent.relative_to(top).parts) as folder:
                descriptor = os.open(path.name, flags, 0o666, dir_fd=folder)
        else:
            descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        error.filename = str(path)
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            _check_kind(path, os.lstat(path), is_folder=False)
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            _check_kind(path, status, is_folder=False)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def misfit(path: Path, nbytes: int) -> str:
    """Return what is wrong with a file that was written with `nbytes`; empty if it has them."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return "is missing"
    if not stat.S_ISREG(status.st_mode):
        return "is not a file"
    return f"has {status.st_size} bytes instead of {nbytes}" if status.st_size != nbytes else ""


def in_work_folder(path: Path) -> bool:
    """Return whether a file lies in a work folder, or among the output's files in one."""
    return _top(path) is not None


def _top(path: Path) -> Path | None:
    """Return the work folder that a file lies in, by its name."""
    names = (p for p in path.parents[:2] if p.name.startswith(".") and p.name.endswith(_SUFFIX))
    return next(names, None)


@contextmanager
def open_folder(top: Path, *names: str) -> Iterator[int]:
    """Open a folder below `top` step by step; `top` itself may not be a link either."""
    with ExitStack() as stack:
        descriptor: int | None = None
        path = top
        for name in (str(top), *names):
            path = path if descriptor is None else path / name
            try:
                descriptor = os.open(name, _OPEN_FOLDER, dir_fd=descriptor)
            except OSError as error:
                error.filename = str(path)
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    _check_kind(path, os.lstat(path), is_folder=True)
                raise
            stack.callback(os.close, descriptor)
        assert descriptor is not None
        yield descriptor


def discard(work: Path, *, any_name: bool = False) -> None:
    """Remove a work folder as far as possible, its mark last, so that it stays recognizable.

    What others put there stays, and the folder with it, unless files of `any_name` are ours.
    """
    with open_folder(work) as descriptor:
        names = [name for name in os.listdir(descriptor) if name != MARK_NAME]
        for name in names if any_name else filter(_may_be_ours, names):
            with suppress(OSError):
                remove(name, descriptor)
        with suppress(OSError):
            if set(os.listdir(descriptor)) <= {MARK_NAME}:
                with suppress(FileNotFoundError):
                    os.unlink(MARK_NAME, dir_fd=descriptor)
                os.rmdir(work)


def remove(name: str, folder: int) -> None:
    """Remove an entry of an open folder, whatever it is; no link is followed."""
    try:
        is_folder = stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return
    if is_folder:
        shutil.rmtree(name, dir_fd=folder)
    else:
        os.unlink(name, dir_fd=folder)


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
