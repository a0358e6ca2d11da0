"""Repositories of the fake Hub: objects and commits, on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

__all__ = ["COMMIT", "Blob", "ConflictError", "MissingError", "Repo"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"

LFS_KINDS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
LFS_BYTES = 10 * 2**20


class ConflictError(Exception):
    """The parent of a commit is not the head."""


class MissingError(Exception):
    """A commit names something that is not there."""


@dataclass(frozen=True)
class Blob:
    """The content of one file."""

    path: Path
    size: int
    sha256: str
    sha1: str
    lfs: bool

    @classmethod
    def of(cls, path: Path, *, lfs: bool) -> Self:
        """Describe the file at `path`."""
        content = path.read_bytes()
        sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return cls(path, len(content), hashlib.sha256(content).hexdigest(), sha1, lfs)

    @property
    def oid(self) -> str:
        """Git's name for what is stored: the content or, for LFS, the pointer."""
        if not self.lfs:
            return self.sha1
        return hashlib.sha1(f"pointer to {self.sha256} {self.size}".encode()).hexdigest()

    def entry(self, name: str) -> dict[str, Any]:
        """Return the row of a listing."""
        row: dict[str, Any] = {"type": "file", "path": name, "size": self.size, "oid": self.oid}
        if self.lfs:
            row["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return row


Files = dict[str, Blob]


@dataclass
class Repo:
    """One repository.

    Args:
        folder: where its objects lie.
        commits: commit to its files.
        refs: branch or tag to commit.
        titles: message of each commit made here.
        private: as it was created.
    """

    folder: Path
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)
    private: bool = False

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Return a repository with the files directly in `folder`, at `COMMIT`."""
        files = sorted(path for path in folder.iterdir() if path.is_file())
        blobs = {p.name: Blob.of(p, lfs=is_large(p.name, p.stat().st_size)) for p in files}
        return cls(folder, {COMMIT: blobs}, {"main": COMMIT, "v1": COMMIT})

    @classmethod
    def create(cls, folder: Path, *, private: bool = False) -> Self:
        """Return a new repository, with the file that the Hub puts in it."""
        folder.mkdir(parents=True)
        repo = cls(folder, private=private)
        lines = "".join(f"*{kind} filter=lfs\n" for kind in LFS_KINDS)
        repo.put({".gitattributes": lines.encode()}, "initial commit")
        return repo

    @property
    def head(self) -> str:
        """The commit of main."""
        return self.refs["main"]

    @property
    def files(self) -> Files:
        """The files of main."""
        return self.commits[self.head]

    def read(self, name: str) -> bytes:
        """Return the content of a file of main."""
        return self.files[name].path.read_bytes()

    def commit_of(self, revision: str) -> str | None:
        """Return the commit that a revision names."""
        return revision if revision in self.commits else self.refs.get(revision)

    def object_path(self, sha256: str) -> Path:
        """Return where an uploaded object lies."""
        return self.folder / f"lfs-{sha256}"

    def has_object(self, sha256: str) -> bool:
        """Whether an object is here: uploaded, or part of a commit."""
        known = (blob for files in self.commits.values() for blob in files.values())
        return self.object_path(sha256).exists() or any(
            blob.lfs and blob.sha256 == sha256 for blob in known
        )

    def put(self, contents: Mapping[str, bytes], title: str = "by a colleague") -> str:
        """Commit contents directly, as somebody else would; return the commit."""
        changed = {}
        for name, content in contents.items():
            lfs = is_large(name, len(content))
            changed[name] = self._stored(content, lfs=lfs)
        return self._add({**self._current(), **changed}, title)

    def remove(self, names: Iterable[str]) -> str:
        """Commit the removal of files."""
        gone = set(names)
        return self._add({n: b for n, b in self._current().items() if n not in gone}, "removal")

    def commit(self, rows: list[dict[str, Any]], decode: Any) -> str:
        """Make a commit from the rows that the client sends.

        Raises:
            ConflictError: it was made for another head.
            MissingError: it deletes or points to something that is not here.
        """
        header = rows[0]["value"]
        parent = header.get("parentCommit")
        if parent is not None and parent != self.head:
            raise ConflictError
        files = self._current()
        for row in rows[1:]:
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = self._stored(decode(value["content"]), lfs=False)
            elif row["key"] == "lfsFile":
                files[value["path"]] = self._object(value)
            elif value["path"] in files:
                del files[value["path"]]
            else:
                raise MissingError(value["path"])
        return self._add(files, header["summary"])

    def _object(self, value: Mapping[str, Any]) -> Blob:
        for known in (b for files in self.commits.values() for b in files.values()):
            if known.lfs and known.sha256 == value["oid"]:
                return known
        path = self.object_path(value["oid"])
        if not path.exists():
            raise MissingError(value["path"])
        return Blob.of(path, lfs=True)

    def _current(self) -> Files:
        return dict(self.commits[self.head]) if self.refs else {}

    def _stored(self, content: bytes, *, lfs: bool) -> Blob:
        path = self.folder / f"blob-{hashlib.sha256(content).hexdigest()}"
        path.write_bytes(content)
        return Blob.of(path, lfs=lfs)

    def _add(self, files: Files, title: str) -> str:
        described = {name: blob.oid for name, blob in files.items()}
        text = json.dumps([len(self.commits), title, described], sort_keys=True)
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = dict(sorted(files.items()))
        self.refs["main"] = commit
        self.titles.append(title)
        return commit


def is_large(name: str, size: int) -> bool:
    """Whether the Hub stores a file as LFS."""
    return size > 0 and (name.endswith(LFS_KINDS) or size > LFS_BYTES)
