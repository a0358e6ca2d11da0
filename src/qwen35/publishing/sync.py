"""Publishing from end to end: the documents, the two listings, the difference, its application."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwen35.checkpoint.header import json_bytes
from qwen35.checkpoint.hub import HubId
from qwen35.checkpoint.open import hub_token
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.errors import Finding, HubError, InputError, UsageError
from qwen35.progress import Progress
from qwen35.publishing.diff import Diff, pull_diff, push_diff
from qwen35.publishing.guard import secrets
from qwen35.publishing.hashes import FileHasher
from qwen35.publishing.listing import LocalListing, list_local, list_remote
from qwen35.publishing.modelfile import is_gguf
from qwen35.publishing.ready import readiness
from qwen35.publishing.repo_documents import documents, write_documents
from qwen35.publishing.signing import sign
from qwen35.sinks.staging import os_errors
from qwen35.verification.verdict import Verdict

__all__ = ["SyncTarget", "check_token", "diff_pull", "diff_push", "finish_folder", "save_diff"]


@dataclass(frozen=True)
class SyncTarget:
    """A folder, a repository and what is needed to look at both.

    Args:
        folder: the folder.
        repo: ``owner/name``.
        token: access token, or None for HF_TOKEN's or the one that `hf auth login` stored.
        hasher: knows files that it has seen before.

    Raises:
        UsageError: no repository can be called so.
    """

    folder: Path
    repo: str
    token: str | None
    hasher: FileHasher

    def __post_init__(self) -> None:
        parsed = HubId.parse(self.repo)
        if parsed is None or parsed.revision:
            raise UsageError(f"repository {self.repo!r}", "malformed", expected="owner/name")

    @classmethod
    def of(
        cls, folder: Path, repo: str, token: str | None = None, progress: Progress | None = None
    ) -> SyncTarget:
        """Return a target with the token that is at hand and the user's cache of hashes."""
        return cls(folder, repo, hub_token(token), FileHasher(progress=progress))

    def secret(self) -> str | None:
        """Return the token in use, wherever it comes from."""
        from huggingface_hub import get_token

        return self.token or get_token()


def check_token(target: SyncTarget) -> None:
    """Refuse to begin a push without a token.

    Raises:
        HubError: there is none.
    """
    if target.secret() is None:
        hint = "set HF_TOKEN or run `hf auth login`"
        raise HubError(target.repo, "no token to write there with", hint=hint)


def diff_push(
    target: SyncTarget,
    *,
    create: bool = False,
    delete: bool = False,
    only: Sequence[str] = (),
    base_model: str | None = None,
    verdict: Verdict | None = None,
) -> Diff:
    """Return what a push would do, with what stops it among its findings; nothing is written.

    In a folder of ours the model card and the other documents are part of it, as they will be.

    Args:
        target: what to compare.
        create: a repository that does not exist counts as empty.
        delete: delete there what the folder does not have.
        only: paths to look at; all if empty.
        base_model: what the card names as base, if not the manifest's source.
        verdict: of a verification, for the manifest.

    Raises:
        InputError: the folder is missing, holds no model, or cannot be read.
        HubError: the Hub refused, or was not reached.
    """
    _check_folder(target.folder)
    made = {} if only else documents(target.folder, target.repo, base_model, verdict)
    remote = list_remote(target.repo, target.token, missing_ok=create)
    local = list_local(target.folder, target.hasher, made)
    diff = push_diff(local, remote, delete=delete, only=only)
    findings = [*diff.findings, *_found(target, diff, made)]
    if not only:
        findings += readiness(target.folder, local)
    return replace(diff, findings=tuple(findings))


def finish_folder(
    target: SyncTarget,
    *,
    base_model: str | None = None,
    verdict: Verdict | None = None,
    signing_key: Path | None = None,
) -> bool:
    """Write the documents that a diff showed, and sign the folder if there is a key.

    Args:
        target: as for the diff.
        base_model: as for the diff.
        verdict: as for the diff.
        signing_key: an elliptic-curve key (PEM).

    Returns:
        Whether the diff has to be made again: there is a new signature.

    Raises:
        OutputError: the disk refuses.
        UsageError: the key cannot be used.
    """
    made = documents(target.folder, target.repo, base_model, verdict)
    write_documents(target.folder, made)
    return signing_key is not None and sign(target.folder, signing_key)


def diff_pull(target: SyncTarget, *, delete: bool = False) -> Diff:
    """Return what a pull would do; a folder that does not exist counts as empty.

    Raises:
        InputError: the folder cannot be read.
        HubError: the Hub refused, or was not reached.
    """
    folder = target.folder
    if folder.exists() and not folder.is_dir():
        raise InputError(str(folder), "not a folder")
    remote = list_remote(target.repo, target.token)
    local = list_local(folder, target.hasher) if folder.exists() else LocalListing({})
    return pull_diff(local, remote, delete=delete)


def save_diff(diff: Diff, path: Path) -> None:
    """Write a diff to a file, for `qwen35.publishing.diff.load_diff`.

    Raises:
        OutputError: it cannot be written.
    """
    with os_errors(path):
        path.write_bytes(json_bytes(diff.to_json()))


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is not an artifact: most likely its name is mistyped."""
    if not folder.is_dir():
        raise InputError(str(folder), "not a folder" if folder.exists() else "no such folder")
    names = {path.name for path in folder.iterdir()}
    known = {"config.json", MANIFEST_NAME}
    if not known & names and not any(map(is_gguf, names)):
        expected = "config.json, or GGUF files"
        raise InputError(str(folder), "holds no model", expected=expected, hint="check its name")


def _found(target: SyncTarget, diff: Diff, made: Mapping[str, bytes]) -> list[Finding]:
    """Search what would be uploaded for secrets, but for the documents of our own."""
    token = target.secret()
    findings: list[Finding] = []
    for op in diff.of("upload"):
        if op.path not in made:
            findings += secrets(target.folder / op.path, op.path, token)
    return findings
