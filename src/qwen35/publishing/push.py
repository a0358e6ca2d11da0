"""Apply a diff to the repository: upload, make one commit, and check the result."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qwen35.checkpoint.hub import COMMIT, client_errors, explain, status_of
from qwen35.errors import HubError, InputError
from qwen35.progress import Progress, Silent
from qwen35.publishing.diff import ATTRIBUTES, Diff, check_clean
from qwen35.publishing.hashes import FileDigest, FileHasher
from qwen35.publishing.listing import RemoteRepo, hub_api, list_commit, list_remote
from qwen35.publishing.synced import remember_synced

__all__ = ["PushResult", "apply_push"]

_T = TypeVar("_T")

ALONE_BYTES = 10_000_000
"""Files from this size on are uploaded one by one, so that a later push skips finished ones."""

_LARGE_KINDS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
_SETTLE_SECONDS = (0.0, 1.0, 3.0)
"""Waits before each look at whether a commit whose answer was lost was made."""


@dataclass(frozen=True)
class PushResult:
    """The result of a push.

    Args:
        repo: the repository.
        commit: its head; the base if there was nothing to do.
        created: whether the repository was created.
        notes: warnings of the Hub's client.
    """

    repo: str
    commit: str
    created: bool = False
    notes: tuple[str, ...] = ()


def apply_push(
    diff: Diff,
    root: Path,
    *,
    message: str,
    token: str | None = None,
    private: bool = False,
    hasher: FileHasher | None = None,
    progress: Progress | None = None,
) -> PushResult:
    """Push everything in one commit on top of the diff's base, or nothing.

    Large files are uploaded first, one by one; files that the Hub already has are skipped.

    Args:
        diff: the operations; without findings.
        root: the folder.
        message: the commit message.
        token: access token; None for that of the Hub's client.
        private: create the repository, if it is missing, as a private one.
        hasher: as for the diff.
        progress: receives bytes uploaded.

    Raises:
        InputError: the diff has findings, a file changed since, or README.md is not valid.
        HubError: the Hub refused, the repository changed, or its files are not those sent.
    """
    assert diff.direction == "push"
    check_clean(diff)
    push = _Push(diff, root, token, hasher or FileHasher(), progress or Silent())
    result = push.run(message, private)
    remember_synced(root, {op.path: op.local for op in diff.of("upload", "same")})
    return result


@dataclass
class _Push:
    """One push: the state that its steps share."""

    diff: Diff
    root: Path
    token: str | None
    hasher: FileHasher
    progress: Progress
    api: Any = field(init=False)

    def __post_init__(self) -> None:
        self.api = hub_api(self.token)

    def run(self, message: str, private: bool) -> PushResult:
        uploaded = self._unchanged()
        before = self._before(private)
        assert before.commit
        created = self.diff.base is None
        if not self.diff.changes:
            return PushResult(before.repo, before.commit, created)
        additions = self._upload()
        self._unchanged()  # again: uploads take long, and the client reads small files only now
        expected = _Expected(before, uploaded, tuple(op.path for op in self.diff.of("delete")))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            commit = self._commit(additions, message, expected)
        after = list_commit(before.repo, commit, self.token)
        if problem := expected.problem(after):
            hint = "it differs from what was pushed: inspect it before you go on"
            raise HubError(f"{before.repo}@{commit[:12]}", problem, hint=hint)
        return PushResult(before.repo, commit, created, tuple(str(w.message) for w in caught))

    def _unchanged(self) -> dict[str, FileDigest]:
        """Return the digests of the files to upload; raise if they differ from the diff."""
        paths = {op.path: self.root / op.path for op in self.diff.of("upload")}
        digests = self.hasher.digests(paths.values())
        for op in self.diff.of("upload"):
            if digests[paths[op.path]].sha256 != op.local:
                raise InputError(op.path, "changed since the diff was made", hint="run again")
        return {name: digests[path] for name, path in paths.items()}

    def _before(self, private: bool) -> RemoteRepo:
        """Return the repository at the diff's base; create it if it is missing."""
        repo = self.diff.repo
        if self.diff.base:
            return list_commit(repo, self.diff.base, self.token)
        _write(repo, lambda: self.api.create_repo(repo, private=private or None))
        return list_remote(repo, self.token)

    def _upload(self) -> list[Any]:
        """Upload the content of large files; return the commit's additions."""
        from huggingface_hub import CommitOperationAdd

        uploads = self.diff.of("upload")
        additions = {op.path: CommitOperationAdd(op.path, self.root / op.path) for op in uploads}
        alone = [op for op in uploads if _is_large(op.path, op.size)]
        together = [additions[op.path] for op in uploads if op not in alone]
        self.progress.begin(f"uploading to {self.diff.repo}", sum(op.size for op in uploads))
        try:
            for op in alone:
                assert op.local
                # saves the client from hashing the file once more
                additions[op.path].upload_info.sha256 = bytes.fromhex(op.local)
                self._preupload(f"{self.diff.repo}, {op.path}", [additions[op.path]])
                self.progress.advance(op.size, op.path)
            if together:
                self._preupload(self.diff.repo, together)
        finally:
            self.progress.end()
        return list(additions.values())

    def _preupload(self, subject: str, additions: list[Any]) -> None:
        # the commit still needs the content; and an empty .gitignore, or the client would leave
        # out files by the repository's own
        def call() -> None:
            self.api.preupload_lfs_files(
                self.diff.repo, additions, free_memory=False, gitignore_content=""
            )

        try:
            _write(subject, call)
        except RuntimeError as error:  # from a thread of the client, or from its Xet library
            if isinstance(error.__cause__, client_errors()):
                raise _refusal(subject, error.__cause__) from error
            hint = "nothing was committed: run again"
            raise HubError(subject, "the upload was interrupted", hint=hint) from error

    def _commit(self, additions: list[Any], message: str, expected: _Expected) -> str:
        """Make the commit; if its answer is lost, find out whether it was made."""
        from huggingface_hub import CommitOperationDelete

        from qwen35.checkpoint.hub_headers import BadAnswerError

        operations = [*additions, *map(CommitOperationDelete, expected.deleted)]
        options = {"commit_message": message, "parent_commit": expected.before.commit}
        try:
            info = self.api.create_commit(self.diff.repo, operations, **options)
        except client_errors() as error:
            if isinstance(error, ValueError) and "README.md" in str(error):
                # the client has the card's metadata checked
                raise InputError("README.md", " ".join(str(error).split())) from error
            status = status_of(error)
            if status == 412:  # the parent is no longer the head
                raise self._moved() from error
            if status is not None and status < 500:
                raise _refusal(self.diff.repo, error) from error
            # no answer, or a 5xx, which a proxy may send although the commit was made
            return self._settle(expected, error)
        if not COMMIT.fullmatch(str(info.oid)):
            return self._settle(expected, BadAnswerError("named a malformed commit"))
        return str(info.oid)

    def _settle(self, expected: _Expected, error: Exception) -> str:
        """Find out whether a commit was made although its answer was lost."""
        repo = self.diff.repo
        for seconds in _SETTLE_SECONDS:
            time.sleep(seconds)
            try:
                now = list_remote(repo, self.token)
            except HubError as failure:
                found = f"the answer to the commit was lost, and then {failure.found}"
                hint = "the commit may exist: look with --mode check"
                raise HubError(repo, found, hint=hint) from error
            if now.commit and now.commit != expected.before.commit:
                if expected.problem(now):
                    raise self._moved() from error
                return now.commit
        raise HubError(
            repo,
            f"the commit was not made ({explain(repo, error).found})",
            hint="nothing changed there; run again: uploaded files are not sent again",
        ) from error

    def _moved(self) -> HubError:
        found = "someone else changed it meanwhile"
        hint = "nothing of yours was committed: look at the difference and run again"
        return HubError(self.diff.repo, found, hint=hint)


def _is_large(path: str, size: int) -> bool:
    return size >= ALONE_BYTES or path.endswith(_LARGE_KINDS)


def _write(subject: str, call: Callable[[], _T]) -> _T:
    """Call the Hub to change something; turn errors of its client into `HubError`."""
    try:
        return call()
    except client_errors() as error:
        raise _refusal(subject, error) from error


def _refusal(subject: str, error: Exception) -> HubError:
    status = status_of(error)
    if status in (401, 403):
        hint = "the token may not write there: check it, and the owner's name"
        return HubError(subject, f"the Hub answered {status}", hint=hint)
    if status == 409:
        return HubError(subject, "someone else has just created it", hint="run again")
    return explain(subject, error)


@dataclass(frozen=True)
class _Expected:
    """The state that the repository must have after the commit."""

    before: RemoteRepo
    uploaded: dict[str, FileDigest]
    deleted: tuple[str, ...]

    def problem(self, after: RemoteRepo) -> str:
        """Return the first difference in `after`, or an empty string."""
        for path, digest in self.uploaded.items():
            there = after.files.get(path)
            if path != ATTRIBUTES and (there is None or not there.holds(digest)):
                return f"{path} {'has another content' if there else 'is missing'} after the push"
        for path in self.deleted:
            if path in after.files:
                return f"{path} is still there after the push"
        changed = {*self.uploaded, *self.deleted, ATTRIBUTES}
        for path in sorted(self.before.files.keys() | after.files.keys()):
            if path not in changed and self.before.files.get(path) != after.files.get(path):
                return f"{path} changed with the push"
        return ""
