"""List a folder and a repository: names, sizes and digests."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen35.checkpoint.hub import call_hub
from qwen35.errors import Finding, HubError, InputError
from qwen35.publishing.guard import bad_name, unwanted
from qwen35.publishing.hashes import FileDigest, FileHasher, digest_bytes

__all__ = [
    "FileTree",
    "LocalListing",
    "RemoteFile",
    "RemoteRepo",
    "hub_api",
    "list_local",
    "list_remote",
    "walk",
]

_NEVER = ((".git",), (".cache", "huggingface"))
"""Folders of git and of the Hub's client: neither pushed nor touched."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    Args:
        path: relative to the repository.
        size: bytes.
        blob: git's object id of the content, or of the pointer if it is an LFS file.
        sha256: of the content; for LFS files only.
    """

    path: str
    size: int
    blob: str
    sha256: str | None = None

    def holds(self, digest: FileDigest) -> bool:
        """Return whether the content has this digest."""
        if self.size != digest.size:
            return False
        return self.sha256 == digest.sha256 if self.sha256 else self.blob == digest.blob


@dataclass(frozen=True)
class RemoteRepo:
    """A repository at one commit.

    Args:
        repo: its name.
        commit: the commit; None if the repository does not exist.
        files: by path.
    """

    repo: str
    commit: str | None
    files: Mapping[str, RemoteFile]


@dataclass(frozen=True)
class LocalListing:
    """A folder.

    Args:
        files: digest by path.
        findings: entries that must not be pushed.
    """

    files: Mapping[str, FileDigest]
    findings: tuple[Finding, ...] = ()


@dataclass
class FileTree:
    """The names in a folder.

    Args:
        files: path in the repository to the file.
        findings: links that lead outside, and entries that are neither file nor folder.
    """

    files: dict[str, Path] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def walk(root: Path) -> FileTree:
    """Find the files below `root`.

    A link to a file inside counts as that file; any other link is a finding.

    Raises:
        InputError: a folder cannot be read.
    """
    tree = FileTree()
    inside = root.resolve()
    for path in _below(root):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            target = Path(os.path.realpath(path))  # unlike resolve(), no error for a cycle of links
            if not target.is_relative_to(inside):
                tree.findings.append(Finding("link", name, "a symbolic link that leads outside"))
                continue
            if not target.is_file():
                tree.findings.append(Finding("link", name, "a symbolic link to no file"))
                continue
        elif not path.is_file():
            tree.findings.append(Finding("kind", name, "neither a file nor a folder"))
            continue
        tree.files[name] = path
    return tree


def _below(root: Path) -> Iterator[Path]:
    def failed(error: OSError) -> None:
        raise InputError(str(error.filename), f"cannot be read ({error.strerror})") from error

    for folder, folders, files in os.walk(root, onerror=failed):
        here = Path(folder)
        parts = here.relative_to(root).parts
        folders[:] = sorted(name for name in folders if (*parts, name) not in _NEVER)
        yield from (here / name for name in folders if (here / name).is_symlink())
        yield from (here / name for name in sorted(files))


def list_local(
    root: Path, hasher: FileHasher, overlay: Mapping[str, bytes] | None = None
) -> LocalListing:
    """Hash every file below `root`.

    Args:
        root: the folder.
        hasher: hashes files, with a cache.
        overlay: content of files that will be written before the push.

    Raises:
        InputError: a file or folder cannot be read.
    """
    tree = walk(root)
    overlay = overlay or {}
    findings = list(tree.findings)
    for name in tree.files:
        if reason := bad_name(name):
            findings.append(Finding("name", name, reason))
        elif kind := unwanted(name):
            findings.append(Finding("unwanted", name, f"looks like {kind}"))
    digests = hasher.digests(path for name, path in tree.files.items() if name not in overlay)
    files = {name: digests[path] for name, path in tree.files.items() if name not in overlay}
    files |= {name: digest_bytes(content) for name, content in overlay.items()}
    return LocalListing(dict(sorted(files.items())), tuple(findings))


def hub_api(token: str | None) -> Any:
    """Return the Hub's client, silenced: its output contains URLs."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars, logging

    from qwen35.checkpoint.hub_session import guard_client

    guard_client()
    disable_progress_bars()
    logging.set_verbosity_error()
    return HfApi(token=token)


def list_remote(repo: str, token: str | None, *, missing_ok: bool = False) -> RemoteRepo:
    """Read the head of a repository and the names, sizes and digests of its files.

    It takes two requests, plus one per further thousand files; no content is read.

    Raises:
        HubError: the Hub refused or was not reached; no partial listing is returned.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    from qwen35.checkpoint.hub_listing import commit_of

    try:
        commit = call_hub(repo, lambda: commit_of(repo, None, token))
    except HubError as error:
        absent = isinstance(error.__cause__, RepositoryNotFoundError)
        if absent and missing_ok:
            return RemoteRepo(repo, None, {})
        raise
    return list_commit(repo, commit, token)  # by commit, since the head may move


def list_commit(repo: str, commit: str, token: str | None) -> RemoteRepo:
    """Read the names, sizes and digests of the files of one commit.

    Raises:
        HubError: the Hub refused or was not reached; no partial listing is returned.
    """
    from qwen35.checkpoint.hub_listing import list_tree

    entries = call_hub(repo, lambda: list_tree(repo, commit, token, recursive=True))
    files = {
        entry.path: RemoteFile(entry.path, entry.size, entry.blob, entry.sha256)
        for entry in entries
        if entry.size is not None
    }
    return RemoteRepo(repo, commit, files)
