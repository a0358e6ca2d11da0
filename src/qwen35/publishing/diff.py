"""The difference between a folder and a repository: operations, shown before they are applied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from qwen35.checkpoint.header import strict_json
from qwen35.checkpoint.locations import read_bounded
from qwen35.errors import Finding, InputError, UsageError
from qwen35.publishing.guard import bad_name, unwanted
from qwen35.publishing.hashes import FileDigest
from qwen35.publishing.listing import LocalListing, RemoteFile, RemoteRepo

__all__ = [
    "ATTRIBUTES",
    "Diff",
    "Operation",
    "check_clean",
    "check_same",
    "load_diff",
    "pull_diff",
    "push_diff",
]

Direction = Literal["push", "pull"]
Kind = Literal["same", "upload", "delete", "download", "remove", "keep"]

_VERSION = 1
ATTRIBUTES = ".gitattributes"
"""The Hub's own file, which any commit may change: not synced unless named explicitly."""


@dataclass(frozen=True)
class Operation:
    """An operation on one file.

    Args:
        path: relative to the repository and to the folder.
        size: bytes of the resulting file, or of the deleted or kept one.
        kind: ``upload`` and ``delete`` change the repository, ``download`` and ``remove`` the
            folder; ``keep`` leaves a file that is on one side only, or the Hub's own.
        local: SHA-256 of the file in the folder, if there is one.
        remote: SHA-256 (LFS) or git blob of the file in the repository, if there is one.
    """

    path: str
    size: int
    kind: Kind
    local: str | None
    remote: str | None


@dataclass(frozen=True)
class Diff:
    """All operations of a sync, pinned to the commit that the diff was made from.

    Args:
        direction: ``push`` makes the repository equal to the folder, ``pull`` the reverse.
        repo: the repository.
        base: its head when the diff was made; None if there was no repository.
        delete: delete files that only the changed side has.
        only: the compared paths; empty for all.
        operations: one per file, including unchanged files, sorted by path.
        findings: reasons not to apply it.
    """

    direction: Direction
    repo: str
    base: str | None
    delete: bool
    only: tuple[str, ...]
    operations: tuple[Operation, ...]
    findings: tuple[Finding, ...] = ()

    def of(self, *kinds: Kind) -> tuple[Operation, ...]:
        """Return the operations of these kinds."""
        return tuple(op for op in self.operations if op.kind in kinds)

    @property
    def changes(self) -> tuple[Operation, ...]:
        """The operations that change something."""
        return self.of("upload", "delete", "download", "remove")

    def to_json(self) -> dict[str, Any]:
        """Return the diff as plain values."""
        return {"diff": _VERSION, **asdict(self)}


def push_diff(
    local: LocalListing, remote: RemoteRepo, *, delete: bool = False, only: Sequence[str] = ()
) -> Diff:
    """Return the operations that make the repository equal to the folder.

    Args:
        local: the folder.
        remote: the repository.
        delete: delete files that the folder lacks.
        only: paths to compare; all if empty.

    Raises:
        InputError: a file of `only` is not in the folder.
    """
    names = tuple(dict.fromkeys(only)) or tuple(local.files)
    for name in only:
        if name not in local.files and not any(f.subject == name for f in local.findings):
            raise InputError(name, "not in the folder", expected="a path relative to it")
    operations = []
    for name in names:
        digest = local.files.get(name)
        if digest is None:  # a link that leads outside: its finding stops the push
            continue
        there = remote.files.get(name)
        kind: Kind = "same" if there and there.holds(digest) else "upload"
        if kind == "upload" and name == ATTRIBUTES and not only:
            kind = "keep"
        operations.append(Operation(name, digest.size, kind, digest.sha256, _identity(there)))
    if not only:
        operations += [
            _elsewhere(there, "delete" if delete and there.path != ATTRIBUTES else "keep")
            for there in remote.files.values()
            if there.path not in local.files
        ]
    findings = tuple(f for f in local.findings if not only or f.subject in only)
    return _diff("push", remote, delete, tuple(only), operations, findings)


def pull_diff(
    local: LocalListing,
    remote: RemoteRepo,
    *,
    delete: bool = False,
    known: Mapping[str, Set[str]] | None = None,
) -> Diff:
    """Return the operations that make the folder equal to the repository.

    A file that is never pushed (an environment file, a key) is never removed either.

    Args:
        local: the folder.
        remote: the repository.
        delete: remove files that the repository lacks.
        known: path to SHA-256 or git blob of what was pulled, pushed or written by qwen35. Any
            other content was changed here: a finding. None: it may be replaced.
    """
    operations = [_pulled(there, local.files.get(path)) for path, there in remote.files.items()]
    for path, digest in local.files.items():
        if path not in remote.files:
            keep = not delete or path == ATTRIBUTES or unwanted(path)
            kind: Kind = "keep" if keep else "remove"
            operations.append(Operation(path, digest.size, kind, digest.sha256, None))
    findings = [
        Finding("name", path, reason) for path in remote.files if (reason := bad_name(path))
    ]
    links = {f.subject: f for f in local.findings if f.check in ("link", "kind")}
    findings += [finding for path, finding in links.items() if path in remote.files]
    findings += _changed_here(operations, local, known)
    findings += _collisions([*remote.files, *(p for p in local.files if p not in remote.files)])
    return _diff("pull", remote, delete, (), operations, tuple(findings))


def _changed_here(
    operations: Sequence[Operation], local: LocalListing, known: Mapping[str, Set[str]] | None
) -> Iterator[Finding]:
    """Yield the files that would be replaced or removed although they were changed here."""
    if known is None:
        return
    for op in operations:
        digest, contents = local.files.get(op.path), known.get(op.path, set())
        goes = op.kind == "download" or (op.kind == "remove" and contents)
        if goes and digest is not None and contents.isdisjoint((digest.sha256, digest.blob)):
            message = "changed here since it was pulled or pushed: --overwrite replaces it"
            yield Finding("changed", op.path, message)


def _diff(
    direction: Direction,
    remote: RemoteRepo,
    delete: bool,
    only: tuple[str, ...],
    operations: list[Operation],
    findings: tuple[Finding, ...],
) -> Diff:
    ordered = tuple(sorted(operations, key=lambda op: op.path))
    return Diff(direction, remote.repo, remote.commit, delete, only, ordered, findings)


def _identity(there: RemoteFile | None) -> str | None:
    return (there.sha256 or there.blob) if there else None


def _elsewhere(there: RemoteFile, kind: Kind) -> Operation:
    return Operation(there.path, there.size, kind, None, _identity(there))


def _pulled(there: RemoteFile, digest: FileDigest | None) -> Operation:
    kind: Kind = "same" if digest and there.holds(digest) else "download"
    if kind == "download" and there.path == ATTRIBUTES:
        kind = "keep"
    local = digest.sha256 if digest else None
    return Operation(there.path, there.size, kind, local, _identity(there))


def _collisions(paths: Sequence[str]) -> Iterator[Finding]:
    """Yield paths that cannot share a folder: a file and a folder, or names that differ in case."""
    files = set(paths)
    for path in paths:
        parts = path.split("/")
        for i in range(1, len(parts)):
            if "/".join(parts[:i]) in files:
                yield Finding("name", path, f"{'/'.join(parts[:i])} is a file, and a folder here")
    folded: dict[str, str] = {}  # file systems of macOS and Windows ignore case
    for path in paths:
        other = folded.setdefault(path.casefold(), path)
        if other != path:
            yield Finding("name", path, f"differs from {other} in case only")


def check_clean(diff: Diff) -> None:
    """Refuse to apply a diff with findings.

    Raises:
        InputError: it has findings.
    """
    for finding in diff.findings:
        raise InputError(finding.subject, finding.message, hint="nothing was changed")


def load_diff(path: Path) -> Diff:
    """Read a saved diff.

    Raises:
        InputError: it cannot be read, or is not a diff.
    """
    parsed = strict_json(read_bounded(path), str(path))
    if not isinstance(parsed, dict) or parsed.pop("diff", None) != _VERSION:
        raise InputError(str(path), "not a diff of this version of qwen35")
    try:
        parsed["operations"] = tuple(Operation(**row) for row in parsed["operations"])
        parsed["findings"] = tuple(Finding(**row) for row in parsed["findings"])
        parsed["only"] = tuple(parsed["only"])
        diff = Diff(**parsed)
        _check_types(diff)
    except (KeyError, TypeError) as error:
        raise InputError(str(path), "a malformed diff", hint="save it again") from error
    if diff.direction not in get_args(Direction):
        raise InputError(str(path), f"direction {diff.direction!r}", expected="push or pull")
    return diff


def _check_types(diff: Diff) -> None:
    """Raise a TypeError unless all values of a parsed diff have the types of its fields."""
    texts: list[Any] = [diff.direction, diff.repo, *diff.only]
    hashes: list[Any] = [diff.base]
    sizes: list[Any] = []
    for op in diff.operations:
        texts += [op.path, op.kind]
        hashes += [op.local, op.remote]
        sizes.append(op.size)
    for finding in diff.findings:
        texts += [finding.check, finding.subject, finding.message]
    fits = all(isinstance(text, str) for text in texts)
    fits = fits and all(value is None or isinstance(value, str) for value in hashes)
    fits = fits and all(type(size) is int for size in sizes)
    if not fits or type(diff.delete) is not bool:
        raise TypeError("a value of the wrong type")


def check_same(saved: Diff, fresh: Diff) -> None:
    """Refuse to apply a saved diff if a fresh one differs.

    Raises:
        UsageError: the repository or a file in the folder changed.
    """
    if saved.base != fresh.base:
        found = f"is at {_short(fresh.base)}, the diff was made at {_short(saved.base)}"
        raise UsageError(fresh.repo, found, hint="make the diff again")
    before = {op.path: op for op in saved.operations}
    for op in fresh.operations:
        if before.pop(op.path, None) != op:
            raise UsageError(op.path, "changed since the diff was made", hint="make the diff again")
    for path in before:
        raise UsageError(path, "gone since the diff was made", hint="make the diff again")


def _short(commit: str | None) -> str:
    return commit[:12] if commit else "no commit"
