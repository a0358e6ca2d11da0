"""Amend a written artifact: check small files that were edited on purpose, and record them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen35.checkpoint.header import json_bytes
from qwen35.checkpoint.locations import LocalFolder, read_bounded
from qwen35.checkpoint.sidecars import MANIFEST_NAME, SIDECARS
from qwen35.display import counted, cut
from qwen35.errors import Finding, InputError
from qwen35.planning.container import EditedFile
from qwen35.planning.containers import container_from_manifest
from qwen35.planning.manifest import read_manifest
from qwen35.planning.safetensors_files.chat_template import compiles
from qwen35.publishing.hashes import FileHasher
from qwen35.publishing.listing import LocalListing, list_local
from qwen35.publishing.repo_documents import write_documents
from qwen35.sinks.staging import check_space, locked, os_errors
from qwen35.sinks.work_folder import open_ours
from qwen35.verification.chat_prompts import ChatPrompts, special_tokens
from qwen35.verification.opening import open_artifact

__all__ = ["Amendment", "prepare_amendment"]

_MAX_TEMPLATE = 2**20
_SIDECARS = {sidecar.name for sidecar in SIDECARS}
_ABSENT = {"size": 0, "sha256": ""}


@dataclass(frozen=True)
class Amendment:
    """What is recorded, or was.

    Args:
        out: the artifact.
        why: the user's reason; may be empty.
        files: changed file to its earlier entry in the manifest; None: it was not listed.
        findings: reasons not to record anything.
        manifest: the new manifest.
        edited: files to be written first.
    """

    out: Path
    why: str
    files: Mapping[str, Any]
    findings: tuple[Finding, ...]
    manifest: Mapping[str, Any] = field(repr=False)
    edited: Mapping[str, EditedFile] = field(repr=False)

    def __repr__(self) -> str:
        found = counted(len(self.findings), "finding") if self.findings else ", ".join(self.files)
        return f"<Amendment of {self.out}: {cut(found or 'nothing changed', 200)}>"

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        listed = self.manifest["files"]
        return {
            "out": str(self.out),
            "why": self.why,
            "files": {
                name: {"was": _sha256(was), "now": _sha256(listed.get(name))}
                for name, was in self.files.items()
            },
            "findings": [finding.to_json() for finding in self.findings],
        }

    def carry_out(self) -> None:
        """Write the edited files and the manifest.

        A run that is killed between them leaves hashes that do not match; the same call mends that.

        Raises:
            InputError: there are findings.
            OutputError: a file cannot be written, or another run is writing the folder.
        """
        for finding in self.findings:
            raise InputError(finding.subject, finding.message, hint="nothing was recorded")
        check_space(self.out, sum(map(_size, self.edited.values())))
        with os_errors(self.out), locked(self.out):
            parts = {name: self.out / f".qwen35-{name}.partial" for name in self.edited}
            try:
                for name, part in parts.items():
                    _write(part, self.edited[name])
                if self.files:
                    write_documents(self.out, {MANIFEST_NAME: json_bytes(self.manifest)})
                for name, part in parts.items():
                    part.replace(self.out / name)
            finally:
                for part in parts.values():
                    part.unlink(missing_ok=True)


def prepare_amendment(
    out: Path, *, template: Path | None = None, why: str = "", hasher: FileHasher | None = None
) -> Amendment:
    """Compare an artifact with its manifest and check what changed; write nothing.

    Args:
        out: the folder of the artifact.
        template: a file with a new chat template.
        why: the reason, for the record.
        hasher: hashes files, with a cache.

    Raises:
        InputError: the folder has no manifest or cannot be read, or the template is not valid.
    """
    manifest = read_manifest(LocalFolder(out))
    if manifest is None:
        hint = "only outputs of qwen35 can be amended"
        raise InputError(str(out), f"no {MANIFEST_NAME} in it", hint=hint)
    text = None if template is None else _template(template, LocalFolder(out))
    check = _Comparison(out, manifest, list_local(out, hasher or FileHasher()))
    findings = list(check.findings())
    edited: Mapping[str, EditedFile] = {}
    if text is not None and not findings:
        container = container_from_manifest(manifest)
        edited = container.with_template(out, manifest["tensors"], text) or {}
    present = check.present | {name: _entry(file) for name, file in edited.items()}
    edited = {name: file for name, file in edited.items() if present[name] != check.here(name)}
    findings += check.structure(edited)
    files = check.changed(present)
    return Amendment(out, why, files, tuple(findings), check.amended(files, present, why), edited)


@dataclass(frozen=True)
class _Comparison:
    """An artifact beside its manifest."""

    out: Path
    manifest: Mapping[str, Any]
    local: LocalListing

    @cached_property
    def present(self) -> dict[str, Any]:
        """Entries of the present files that the manifest lists or may list."""
        names = {*self.manifest["files"], *self.added, *self.amendable}
        return {name: self.here(name) for name in names if name in self.local.files}

    @cached_property
    def amendable(self) -> frozenset[str]:
        container = container_from_manifest(self.manifest)
        vision = open_artifact(str(self.out.absolute())).vision
        return frozenset(container.amendable(vision=vision))

    @property
    def added(self) -> Mapping[str, Any]:
        """Documents that were added later."""
        entries: Mapping[str, Any] = self.manifest.get("added", {})
        return entries

    def here(self, name: str) -> dict[str, Any]:
        """Return the entry of a file as it is."""
        digest = self.local.files.get(name)
        return {"size": digest.size, "sha256": digest.sha256} if digest else _ABSENT

    def findings(self) -> Iterator[Finding]:
        """Yield files that are not as written and may not be amended."""
        listed = self.manifest["files"]
        named = {*listed, *self.added, *_SIDECARS}
        links = [one for one in self.local.findings if one.check in ("link", "kind")]
        yield from (one for one in links if one.subject in named)
        known = {one.subject for one in links}
        rows = self.manifest.get("amended", [])
        unfinished = rows[-1]["files"] if rows else {}
        for name, entry in listed.items():
            here = self.here(name)
            if _same(here, entry) or name in self.amendable & self.local.files.keys():
                continue
            if name in known or _same(here, unfinished.get(name)):
                continue
            yield Finding("files" if here is _ABSENT else "hash", name, self._trouble(name, here))
        for name in sorted(_SIDECARS & self.local.files.keys() - listed.keys() - self.amendable):
            yield Finding("files", name, "nothing reads it in an artifact of this kind: remove it")

    def _trouble(self, name: str, here: Mapping[str, Any]) -> str:
        if here is _ABSENT:
            return "missing: put it back, only changed and new files can be recorded"
        if name in self.manifest["tensors"]:
            return "its weights are not those that were written: make the artifact again"
        return "changed, but it says how weights are read: make the artifact again"

    def structure(self, edited: Mapping[str, EditedFile]) -> Iterator[Finding]:
        """Check the small files as at writing, except files that will be replaced."""
        subject = open_artifact(str(self.out.absolute()))
        yield from (one for one in subject.structure() if one.subject not in edited)

    def changed(self, present: Mapping[str, Any]) -> dict[str, Any]:
        """Return changed files with their earlier entries; only documents may be gone."""
        listed = {**self.added, **self.manifest["files"]}
        names = [name for name in listed if name in self.added or name in present]
        names += sorted(present.keys() - listed.keys())
        return {
            name: listed.get(name)
            for name in names
            if not _same(present.get(name, _ABSENT), listed.get(name))
        }

    def amended(
        self, files: Mapping[str, Any], present: Mapping[str, Any], why: str
    ) -> Mapping[str, Any]:
        """Return the new manifest; a passed verdict no longer holds."""
        if not files:
            return self.manifest
        result = dict(self.manifest)
        now = {name: present[name] for name in files if name not in self.added}
        result["files"] = {**self.manifest["files"], **now}
        if "added" in result:
            result["added"] = {n: e for n, e in self.added.items() if n not in files}
        row = {"when": _now(), "why": why, "files": dict(files)}
        result["amended"] = [*self.manifest.get("amended", []), row]
        verdict = result.get("verified")
        if not isinstance(verdict, dict) or verdict.get("passed") is not False:
            result.pop("verified", None)
        return result


def _same(here: Mapping[str, Any], entry: Mapping[str, Any] | None) -> bool:
    return entry is not None and all(here[key] == entry[key] for key in ("size", "sha256"))


def _sha256(entry: Mapping[str, Any] | None) -> str | None:
    return entry["sha256"] if entry else None


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _template(path: Path, place: LocalFolder) -> str:
    """Return a template that compiles and writes prompts with the questions in them."""
    try:
        text = read_bounded(path, _MAX_TEMPLATE).decode()
    except UnicodeDecodeError as error:
        raise InputError(str(path), f"not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise InputError(str(path), "is empty", expected="a chat template")
    try:
        compiles(text, str(path))
    except InputError as error:  # its hint is about a source
        raise InputError(str(path), error.found) from error
    ChatPrompts(str(path), text, special_tokens(place))
    return text


def _size(file: EditedFile) -> int:
    rest = file.rest.stat().st_size - file.start if file.rest is not None else 0
    return len(file.head) + rest


def _entry(file: EditedFile) -> dict[str, Any]:
    digest = hashlib.sha256()
    for piece in file.pieces():
        digest.update(piece)
    return {"size": _size(file), "sha256": digest.hexdigest()}


def _write(path: Path, file: EditedFile) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(open_ours(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY), "wb") as target:
        for piece in file.pieces():
            target.write(piece)
        target.flush()
        os.fsync(target.fileno())
