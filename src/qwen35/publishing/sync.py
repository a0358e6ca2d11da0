"""The steps of a sync: documents, both listings, their difference and the checks on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qwen35.checkpoint.header import json_bytes
from qwen35.checkpoint.hub import HubId
from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.open import hub_token
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.errors import Finding, HubError, InputError, UsageError
from qwen35.planning.manifest import read_manifest
from qwen35.progress import Progress
from qwen35.publishing.diff import Diff, pull_diff, push_diff
from qwen35.publishing.hashes import FileHasher
from qwen35.publishing.listing import LocalListing, list_local, list_remote
from qwen35.publishing.modelfile import is_gguf
from qwen35.publishing.ready import readiness
from qwen35.publishing.repo_documents import documents, write_documents
from qwen35.publishing.secret_search import secrets
from qwen35.publishing.signing import sign
from qwen35.publishing.synced import synced_files
from qwen35.sinks.files import replace_file
from qwen35.sinks.staging import os_errors
from qwen35.verification.verdict import Verdict

__all__ = ["SyncTarget", "check_token", "diff_pull", "diff_push", "finish_folder", "save_diff"]


@dataclass(frozen=True)
class SyncTarget:
    """A folder, a repository and the means to read both.

    Args:
        folder: the folder.
        repo: ``owner/name``.
        token: access token; None for that of HF_TOKEN or `hf auth login`.
        hasher: hashes files, with a cache.

    Raises:
        UsageError: the repository's name is malformed.
    """

    folder: Path
    repo: str
    token: str | None
    hasher: FileHasher

    def __post_init__(self) -> None:
        parsed = HubId.parse(self.repo)
        if parsed is None or parsed.revision:
            raise UsageError(
                f"repository {self.repo!r}", "malformed", expected="owner/name", hint=self._swapped
            )

    @property
    def _swapped(self) -> str:
        """A hint, where the repository's place has a folder; empty otherwise."""
        here = Path(self.repo).is_dir() and not self.folder.is_dir()
        return "the folder comes first, then the repository" if here else ""

    @classmethod
    def of(
        cls, folder: Path, repo: str, token: str | None = None, progress: Progress | None = None
    ) -> SyncTarget:
        """Return a target with the default token and the user's cache of hashes."""
        return cls(folder, repo, hub_token(token), FileHasher(progress=progress))

    def secret(self) -> str | None:
        """Return the token in use, given or stored."""
        from huggingface_hub import get_token

        return self.token or get_token()


def check_token(target: SyncTarget) -> None:
    """Check, before a push, that there is a token.

    Raises:
        HubError: there is none.
    """
    if target.secret() is None:
        hint = "set HF_TOKEN or run `hf auth login`"
        raise HubError(target.repo, "no access token", hint=hint)


def diff_push(
    target: SyncTarget,
    *,
    create: bool = False,
    delete: bool = False,
    only: Sequence[str] = (),
    base_model: str | None = None,
    verdict: Verdict | None = None,
) -> Diff:
    """Return what a push would do; findings stop it. Nothing is written.

    For a folder of qwen35 it includes the model card and the other documents, as they will be.

    Args:
        target: the folder and the repository.
        create: treat a missing repository as empty.
        delete: delete files that the folder lacks.
        only: paths to compare; all if empty.
        base_model: the card's base model; by default the manifest's source.
        verdict: a verification's result, for the manifest.

    Raises:
        InputError: the folder is missing, holds no model, or cannot be read.
        HubError: the Hub refused, or was not reached.
    """
    _check_folder(target.folder)
    generated = {} if only else documents(target.folder, target.repo, base_model, verdict)
    remote = list_remote(target.repo, target.token, missing_ok=create)
    local = list_local(target.folder, target.hasher, generated)
    diff = push_diff(local, remote, delete=delete, only=only)
    findings = [*diff.findings, *_secret_findings(target, diff, generated)]
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
    """Write the documents that a diff showed; sign the folder if there is a key.

    Args:
        target: as for the diff.
        base_model: as for the diff.
        verdict: as for the diff.
        signing_key: an elliptic-curve key (PEM).

    Returns:
        Whether there is a new signature, so that the diff must be made again.

    Raises:
        OutputError: a document cannot be written.
        UsageError: the key cannot be used.
    """
    write_documents(target.folder, documents(target.folder, target.repo, base_model, verdict))
    return signing_key is not None and sign(target.folder, signing_key)


def diff_pull(target: SyncTarget, *, delete: bool = False, overwrite: bool = False) -> Diff:
    """Return what a pull would do; a missing folder counts as empty.

    Args:
        target: the folder and the repository.
        delete: remove files that the repository lacks.
        overwrite: also replace or remove files that were changed here; otherwise a finding.

    Raises:
        InputError: the folder cannot be read.
        HubError: the Hub refused, or was not reached.
    """
    folder = target.folder
    if folder.exists() and not folder.is_dir():
        raise InputError(str(folder), "not a folder")
    if folder.is_symlink():  # as `apply_pull`, but before anything is asked
        raise InputError(str(folder), "is a symbolic link", hint="give the folder that it leads to")
    remote = list_remote(target.repo, target.token)
    local = list_local(folder, target.hasher) if folder.exists() else LocalListing({})
    known = None if overwrite or not local.files else _known(folder)
    return pull_diff(local, remote, delete=delete, known=known)


def _known(folder: Path) -> dict[str, set[str]]:
    """Return the contents that each file had when it was pulled, pushed or written by qwen35."""
    known = {name: {identity} for name, identity in synced_files(folder).items()}
    with suppress(InputError):  # a damaged manifest vouches for nothing
        manifest = read_manifest(LocalFolder(folder)) or {}
        for name, entry in {**manifest.get("added", {}), **manifest.get("files", {})}.items():
            known.setdefault(name, set()).add(entry["sha256"])
    return known


def save_diff(diff: Diff, path: Path) -> None:
    """Save a diff to a file, for `qwen35.publishing.diff.load_diff`.

    Raises:
        OutputError: it cannot be written.
    """
    with os_errors(path):
        replace_file(path, json_bytes(diff.to_json()))


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is not an artifact: its name is probably mistyped."""
    if not folder.is_dir():
        raise InputError(str(folder), "not a folder" if folder.exists() else "no such folder")
    names = {path.name for path in folder.iterdir()}
    markers = {"config.json", MANIFEST_NAME}
    if not markers & names and not any(map(is_gguf, names)):
        expected = "config.json, or GGUF files"
        raise InputError(str(folder), "holds no model", expected=expected, hint="check its name")


def _secret_findings(
    target: SyncTarget, diff: Diff, generated: Mapping[str, bytes]
) -> list[Finding]:
    """Search files to be uploaded for secrets, except documents that we generate."""
    token = target.secret()
    findings: list[Finding] = []
    for op in diff.of("upload"):
        if op.path not in generated:
            findings += secrets(target.folder / op.path, op.path, token)
    return findings
