"""Apply a diff to the folder: download beside it, check every file, then rename."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qwen35.checkpoint.hub import fetch_file
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import INDEX_NAME
from qwen35.errors import HubError, InputError, OutputError
from qwen35.progress import Progress, Silent
from qwen35.publishing.diff import Diff, Operation, check_clean
from qwen35.publishing.hashes import FileDigest, FileHasher, digest_file
from qwen35.publishing.listing import hub_api
from qwen35.publishing.synced import remember_synced
from qwen35.sinks.staging import check_space, locked, os_errors
from qwen35.sinks.work_folder import check_tree, claim_tree, discard, open_ours

__all__ = ["PullResult", "apply_pull"]

_LAST = (INDEX_NAME, "config.json", MANIFEST_NAME)
"""Renamed last: a folder with these files looks complete."""


@dataclass(frozen=True)
class PullResult:
    """The result of a pull.

    Args:
        folder: the folder.
        commit: the commit that it holds.
        nbytes: bytes downloaded.
    """

    folder: Path
    commit: str
    nbytes: int


def apply_pull(
    diff: Diff,
    root: Path,
    *,
    token: str | None = None,
    hasher: FileHasher | None = None,
    progress: Progress | None = None,
) -> PullResult:
    """Pull all files; nothing in the folder changes before every download is complete and checked.

    Finished downloads of an interrupted pull stay in ``.NAME.pull`` beside the folder, and the next
    pull uses them.

    Args:
        diff: the operations; without findings.
        root: the folder; created if missing.
        token: access token; None for that of the Hub's client.
        hasher: as for the diff.
        progress: receives bytes downloaded.

    Raises:
        InputError: the diff has findings, or a file in the folder changed since.
        HubError: the Hub refused, or a download differs from the listing.
        OutputError: it is a link, the disk is full, the path of a file is blocked, or
            ``.NAME.pull`` holds anything that a pull did not put there.
    """
    assert diff.direction == "pull"
    check_clean(diff)
    assert diff.base
    if root.is_symlink():  # one above it is the user's choice
        raise OutputError(str(root), "is a symbolic link", hint="give the folder that it leads to")
    root = root.resolve()
    downloads = diff.of("download")
    with os_errors(root):
        root.parent.mkdir(parents=True, exist_ok=True)
        with locked(root):
            stage = _Stage(root, diff.repo, diff.base, token)
            stage.prepare(downloads)
            stage.fill(downloads, progress or Silent())
            _check_unchanged(diff, root, hasher or FileHasher())  # after the slow part
            check_tree(stage.folder)  # again: no finished file may have become a link since
            for op in sorted(downloads, key=_order):
                _place(stage.folder / op.path, root, op.path)
            for op in diff.of("remove"):
                _check_path(root, op.path)
                (root / op.path).unlink()
            _remove_empty(root, diff)
            discard(stage.folder, any_name=True)
            remember_synced(root, {op.path: op.remote for op in diff.of("download", "same")})
    return PullResult(root, diff.base, sum(op.size for op in downloads))


def _order(op: Operation) -> tuple[int, str]:
    return (_LAST.index(op.path) + 1 if op.path in _LAST else 0), op.path


@dataclass(frozen=True)
class _Stage:
    """The folder beside `root` for downloads."""

    root: Path
    repo: str
    commit: str
    token: str | None

    @property
    def folder(self) -> Path:
        return self.root.with_name(f".{self.root.name}.pull")

    def prepare(self, downloads: tuple[Operation, ...]) -> None:
        """Create the folder, or reuse that of an earlier pull."""
        for op in downloads:
            _check_path(self.root, op.path)
        claim_tree(self.folder)  # the client writes through links, and a link would be placed
        paths = (self.folder / op.path for op in downloads)
        downloaded = sum(path.stat().st_size for path in paths if path.is_file())
        check_space(self.folder, sum(op.size for op in downloads) - downloaded)

    def fill(self, downloads: tuple[Operation, ...], progress: Progress) -> None:
        """Download missing files; check every file."""
        progress.begin(f"downloading {self.repo}", sum(op.size for op in downloads))
        try:
            for op in downloads:
                path = self.folder / op.path
                if not (path.is_file() and _matches(digest_file(path), op)):
                    self._download(op, path)
                progress.advance(op.size, op.path)
        finally:
            progress.end()

    def _download(self, op: Operation, path: Path) -> None:
        subject = f"{self.repo}@{self.commit[:12]}, {op.path}"
        hub_api(self.token)  # silences the client
        path.unlink(missing_ok=True)  # of another version, or incomplete
        options = {"local_dir": self.folder, "token": self.token}
        fetch_file(subject, self.repo, self.commit, op.path, op.size, **options)
        digest = digest_file(path)  # the client checks the size only
        if not _matches(digest, op):
            path.unlink()
            found = f"{digest.size} bytes arrived with sha256 {digest.sha256[:12]}"
            hint = "the download was damaged: run again"
            expected = f"{op.size} bytes with {str(op.remote)[:12]}"
            raise HubError(subject, found, expected=expected, hint=hint)
        # on disk before the rename, so that a crash leaves no empty file under the final name
        descriptor = open_ours(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _matches(digest: FileDigest, op: Operation) -> bool:
    return digest.size == op.size and op.remote in (digest.sha256, digest.blob)


def _check_path(root: Path, name: str) -> None:
    """Refuse a path that a file, a folder or a link blocks."""
    path = root / name
    for part in PurePosixPath(name).parents:
        folder = root / part
        if folder.is_symlink():
            raise OutputError(str(folder), "is a symbolic link: nothing is written through it")
        if folder.exists() and not folder.is_dir():
            raise OutputError(str(folder), f"is in the way of {name}", hint="move it away")
    if path.is_dir() and not path.is_symlink():
        raise OutputError(str(path), "is a folder, in the way of a file", hint="move it away")


def _check_unchanged(diff: Diff, root: Path, hasher: FileHasher) -> None:
    """Refuse to replace or remove a file that changed since the diff was made."""
    for op in diff.of("download", "remove"):
        path = root / op.path
        exists = path.is_file() or path.is_symlink()
        sha256 = hasher.digests([path])[path].sha256 if exists else None
        if sha256 != op.local:
            raise InputError(op.path, "changed since the diff was made", hint="run again")


def _place(staged: Path, root: Path, name: str) -> None:
    """Rename a file to its place; a link there is replaced, not followed."""
    _check_path(root, name)  # again: the folder may have changed during the download
    target = root / name
    target.parent.mkdir(parents=True, exist_ok=True)
    staged.replace(target)


def _remove_empty(root: Path, diff: Diff) -> None:
    """Remove folders that became empty."""
    for op in diff.of("remove"):
        for parent in PurePosixPath(op.path).parents:
            folder = root / parent
            if folder != root and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
