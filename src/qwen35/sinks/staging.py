"""An output folder that appears whole or not at all: files are staged beside it, then renamed."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.errors import InputError, OutputError, UsageError
from qwen35.sinks.journal import Journal
from qwen35.sinks.strangers import refuse_strangers
from qwen35.sinks.work_folder import (
    FILES_NAME,
    JOURNAL_NAME,
    OLD_NAME,
    SLICES,
    check_work,
    claim,
    discard,
    fsync_folder,
    open_folder,
    open_ours,
    remove,
    work_path,
)

__all__ = [
    "StagedResult",
    "check_output",
    "check_space",
    "existing",
    "locked",
    "may_continue",
    "os_errors",
    "refuse_foreign_model",
    "resolved",
    "resumable",
    "scratch",
    "staging",
]

_LOG = logging.getLogger(__name__)
_SPARE_BYTES = 16 * 2**20
"""Space beyond the files' bytes, for the journal and the file system's own blocks."""


@dataclass(frozen=True)
class StagedResult:
    """A written output.

    Args:
        out: the folder.
        hashes: SHA-256 of every file but the manifest, by name.
        nbytes: bytes of all files.
        compared: weight to the result of its check as plain values, where workers checked it.
        refined: file and weight to which of its matrices have refined codes
            (`qwen35.planning.refinement.refined_record`).
    """

    out: Path
    hashes: dict[str, str]
    nbytes: int
    compared: Mapping[str, Any] = field(default_factory=dict)
    refined: Mapping[tuple[str, str], str] = field(default_factory=dict)


def resolved(out: Path) -> Path:
    """Resolve an output path; a link stays a link, so that `check_output` can refuse it."""
    return out.resolve() if not out.is_symlink() else out


def check_output(
    out: Path,
    *,
    source: Path | None,
    overwrite: bool,
    donor: Path | None = None,
    files: Sequence[str | Path | None] = (),
) -> None:
    """Refuse, before any work, an output that would overwrite anything of value.

    Args:
        out: the output.
        source: where the source is, if on this machine.
        overwrite: replace an output of qwen35.
        donor: the same of the checkpoint that the MTP layer is taken from.
        files: the other inputs as the user named them, if any; an output may be beside them, not
            around them.

    Raises:
        OutputError: it exists and may not be overwritten, or overlaps the source or the donor, or
            another input is in it.
    """
    for origin in (source, donor):
        if origin is not None:
            _check_overlap(out, origin)
    with os_errors(out):
        _check_inside(out, files)
        if out.is_symlink():
            refuse_foreign_model(out)
            raise OutputError(
                str(out), "is a symbolic link", hint="give the folder that it leads to"
            )
        if not out.exists():
            _check_name(out)
            return
        if not out.is_dir():
            raise OutputError(str(out), "exists and is not a folder", hint="choose another name")
        if os.path.ismount(out):
            raise OutputError(str(out), "is a mount point", hint="choose a folder in it")
        if any(out.iterdir()):
            _clean_up(out)
            _check_replaceable(out, overwrite)


def _check_overlap(out: Path, source: Path) -> None:
    resolved, origin = out.resolve(), source.resolve()
    if resolved == origin:
        hint = "choose another folder"
        raise OutputError(str(out), "output and input are the same folder", hint=hint)
    if resolved.is_relative_to(origin) or origin.is_relative_to(resolved):
        raise OutputError(str(out), f"overlaps the input {source}", hint="choose another folder")


def _check_inside(out: Path, files: Sequence[str | Path | None]) -> None:
    resolved = out.resolve()
    here = [Path(file) for file in files if file and not str(file).startswith("hf:")]
    inside = next((file for file in here if file.resolve().is_relative_to(resolved)), None)
    if inside is not None:
        raise OutputError(str(out), f"holds the input {inside}", hint="choose another folder")


def _check_replaceable(out: Path, overwrite: bool) -> None:
    refuse_foreign_model(out)
    if not (out / MANIFEST_NAME).is_file():
        found = f"exists already and holds no {MANIFEST_NAME}, so it was not written by qwen35"
        raise OutputError(str(out), found, hint="choose another folder, or remove it yourself")
    if not overwrite:
        raise OutputError(str(out), "exists already", hint="give --overwrite to replace it")
    refuse_strangers(out)


def refuse_foreign_model(out: Path) -> None:
    """Refuse somebody's model where an output is to go: perhaps the two were swapped.

    Raises:
        OutputError: the folder holds a model without our manifest.
    """
    if (out / MANIFEST_NAME).is_file():
        return
    if any(out.glob("*.safetensors")) or any(out.glob("*.gguf")):
        found = "holds a model that qwen35 did not write"
        hint = "choose another folder (MODEL comes first, then the output)"
        raise OutputError(str(out), found, hint=hint)


def _check_name(out: Path) -> None:
    if out.suffix in (".gguf", ".safetensors"):
        hint = f"for instance {out.stem}; the files in it are named after the model"
        raise OutputError(str(out), "named like a file", expected="a folder to write", hint=hint)


def _clean_up(out: Path) -> None:
    """Remove the work folder of a run that was killed after its last rename."""
    work = work_path(out)
    if work.is_dir() and not (work / FILES_NAME).exists():
        with suppress(OutputError), locked(out):
            check_work(work)
            discard(work)


def check_space(folder: Path, needed: int, *, keeping: Path | None = None) -> None:
    """Check that the disk of `folder` has `needed` bytes free.

    Blocks that the files in `keeping` already occupy count as free.

    Raises:
        OutputError: it has fewer.
    """
    if keeping is not None:  # st_blocks counts units of 512 bytes, whatever the block size
        needed -= sum(path.stat().st_blocks * 512 for path in keeping.iterdir())
    free = shutil.disk_usage(existing(folder)).free
    if free < needed + _SPARE_BYTES:
        raise OutputError(
            str(folder),
            f"{free / 1e9:.2f} GB free on its disk",
            expected=f"at least {(needed + _SPARE_BYTES) / 1e9:.2f} GB",
        )


def existing(folder: Path) -> Path:
    """Return `folder` or the nearest folder above it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


@contextmanager
def staging(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Prepare `out` in a folder beside it; rename it on success, remove it on failure.

    Leftovers of a killed run are removed first. A lock keeps out a second run.

    Raises:
        OutputError: another run is writing it, the name is taken, or it cannot be written.
    """
    with _working(out, overwrite) as work:
        (work.path / JOURNAL_NAME).unlink(missing_ok=True)
        yield work.fresh()


@contextmanager
def scratch(beside: Path) -> Iterator[Path]:
    """Yield an empty folder for temporary files beside a file; it is removed at the end.

    Leftovers of a killed run are removed first. A lock keeps out a second run.

    Raises:
        OutputError: another run is writing that file, or the folder cannot be made.
    """
    with ExitStack() as held:
        with os_errors(beside):
            held.enter_context(locked(beside))
            work = _Work(work_path(beside))
            claim(work.path)
            held.callback(discard, work.path)
            folder = work.fresh()
        yield folder


@contextmanager
def resumable(
    out: Path, key: Mapping[str, Any], *, overwrite: bool = False, keep: bool = True
) -> Iterator[tuple[Path, Journal]]:
    """Prepare `out` as `staging` does, in a folder from which a later run can resume.

    Yields the folder and its journal. Once pieces are finished, the folder stays after an interrupt
    or a failure. It does not stay if the source or the arguments were found wrong: then no rerun
    can succeed.

    Args:
        out: the output.
        key: everything that decides the output's bytes, under names that a user understands.
        overwrite: replace an output of qwen35.
        keep: whether the folder may stay; not if the place itself is temporary.

    Raises:
        OutputError: as `staging`, or there is an unfinished run with another key.
    """
    with _working(out, overwrite) as work:
        path = work.path / JOURNAL_NAME
        work.stays = path.exists()  # opening the journal of another run fails: do not remove it
        with Journal(path, key, home=work.path) as journal:
            if not journal:
                _refuse_slices(work)
                if journal.is_new:
                    _note_lost_work(work)
            try:
                with os_errors(out):
                    yield work.path / FILES_NAME if journal else work.fresh(), journal
                    work.stays = keep  # keep the complete files if the rename fails
            except BaseException as error:
                work.stays = keep and bool(journal) and work.is_there and may_continue(error)
                if work.stays:
                    hint = f"finished work is kept in {work.path}: run the same command to resume"
                    error.add_note(hint)
                raise


def _note_lost_work(work: _Work) -> None:
    """Tell if an earlier run left files, but its journal is gone."""
    files = work.path / FILES_NAME
    if files.is_dir() and any(files.iterdir()):
        _LOG.warning("%s: no journal tells what is finished: starting over", work.path)


def may_continue(error: BaseException) -> bool:
    """Return whether a rerun could succeed: not if the source or the arguments are wrong."""
    if isinstance(error, InputError | UsageError):
        return isinstance(error.__cause__, OSError)  # a failing read may work next time
    return True


@dataclass
class _Work:
    """The folder for unfinished work.

    Args:
        path: the folder.
        stays: keep it when the run fails.
    """

    path: Path
    stays: bool = False

    @property
    def is_there(self) -> bool:
        """Whether it is where it was made: a folder above it may have been moved or removed."""
        return os.path.lexists(self.path)

    def fresh(self) -> Path:
        """Create and return an empty folder for the output's files."""
        with open_folder(self.path) as folder:
            remove(FILES_NAME, folder)
            os.mkdir(FILES_NAME, dir_fd=folder)
            os.fsync(folder)
        return self.path / FILES_NAME


@contextmanager
def _working(out: Path, overwrite: bool) -> Iterator[_Work]:
    """Lock `out` and prepare its work folder; rename the files into place at the end."""
    out = out.resolve()
    created = _make_parents(out.parent)
    work: _Work | None = None
    done = False
    try:
        with os_errors(out), locked(out):
            try:
                work = _Work(_work_folder(out))
                if not (work.path / JOURNAL_NAME).exists():
                    _refuse_slices(work)
                check_output(out, source=None, overwrite=overwrite)
                yield work
                _replace(work.path, out, overwrite)
                done = True
            finally:
                if work is not None and work.is_there and (done or not work.stays):
                    discard(work.path)
    finally:
        if not done and (work is None or not work.stays):
            for parent in created:
                with suppress(OSError):
                    parent.rmdir()


@contextmanager
def os_errors(out: Path) -> Iterator[None]:
    """Turn errors of the operating system about the output into `OutputError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        subject = str(error.filename or out)
        found, hint = f"cannot be written ({error.strerror})", _NEXT.get(error.errno or 0, "")
        raise OutputError(subject, found, hint=hint) from error


_NEXT = {
    errno.EACCES: "choose a folder that you may write to",
    errno.EDQUOT: "make room and run again",
    errno.ENOENT: "its folder does not exist, or was moved or removed meanwhile",
    errno.ENOSPC: "make room and run again",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.ESTALE: "its folder was moved or removed meanwhile",
}
"""Hints for errors that the user can fix."""

_DISK_ERRORS = (
    errno.EACCES,
    errno.EBUSY,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EINVAL,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.ENXIO,
    errno.EPERM,
    errno.EROFS,
    errno.ESTALE,
    errno.EXDEV,
)


def _make_parents(parent: Path) -> list[Path]:
    """Create `parent`; return the folders that were created, deepest first."""
    missing = []
    folder = parent
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    with os_errors(parent):
        _make_folder(parent)
    return missing


def _refuse_slices(work: _Work) -> None:
    """Refuse a work folder that slices share."""
    if any(work.path.glob(SLICES)):
        work.stays = True
        hint = "run the remaining slices and `qwen35 finalize`, or remove this to start over"
        raise OutputError(str(work.path), "holds an unfinished run in slices", hint=hint)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        hint = "choose another name"
        raise OutputError(str(folder), "exists and is not a folder", hint=hint) from error


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock file beside `out`; it is removed before it is released."""
    path = out.with_name(f".{out.name}.lock")
    try:
        descriptor = open_ours(path, os.O_CREAT | os.O_RDWR)
    except FileNotFoundError as error:
        found = f"nothing can be written into {out.parent}"
        raise OutputError(str(out), found, hint="choose another folder") from error
    try:
        if os.fstat(descriptor).st_size:  # it will be removed, and ours is empty
            found, hint = "is in the way and was not made by qwen35", "move it away"
            raise OutputError(str(path), found, hint=hint)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _busy(out) from error
        # its holder may have removed it after we opened it: a lock on a removed file locks nothing
        if not _is_same_file(descriptor, path):
            raise _busy(out)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # its folder may have been moved away meanwhile
    finally:
        os.close(descriptor)


def _busy(out: Path) -> OutputError:
    return OutputError(str(out), "another run is writing it", hint="wait for it to end")


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _work_folder(out: Path) -> Path:
    """Create and return the work folder; put back an output that was moved into it."""
    folder = work_path(out)
    claim(folder)
    with open_folder(folder) as work:
        if (folder / OLD_NAME).exists() and not out.exists():  # killed between two renames
            os.rename(OLD_NAME, out, src_dir_fd=work)
        remove(OLD_NAME, work)
    return folder


def _replace(work: Path, out: Path, overwrite: bool) -> None:
    """Rename the prepared files to `out`; move an existing output aside first."""
    check_work(work)  # again: nothing in it may have been replaced by a link since
    check_output(out, source=None, overwrite=overwrite)  # again: it may have appeared meanwhile
    moved = out.exists() and any(out.iterdir())
    with open_folder(work) as folder:
        with open_folder(work, FILES_NAME) as files:
            os.fsync(files)  # the names must be on disk before the folder becomes the output
        if moved:
            os.rename(out, OLD_NAME, dst_dir_fd=folder)
        try:
            os.rename(FILES_NAME, out, src_dir_fd=folder)
        except OSError:
            if moved:
                os.rename(OLD_NAME, out, src_dir_fd=folder)
            raise
    fsync_folder(out.parent)
