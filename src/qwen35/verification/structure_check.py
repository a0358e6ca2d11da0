"""Structure: check headers and small files against each other and the manifest; read no weight."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qwen35.checkpoint.locations import FileLocation
from qwen35.checkpoint.sidecars import LEGAL, MANIFEST_NAME, SIDECARS
from qwen35.errors import Finding, InputError
from qwen35.planning.manifest import read_manifest
from qwen35.verification.memo import MemoFile
from qwen35.verification.subject import Subject, TensorTable

__all__ = ["StructureResult", "check_hashes", "check_structure"]

_DECIDING = {sidecar.name for sidecar in SIDECARS} - {*LEGAL}
"""Sidecars that loaders read."""


@dataclass(frozen=True)
class StructureResult:
    """The result of the structure check.

    Args:
        findings: the findings.
        manifest: the artifact's qwen35.json, if there is a readable one.
    """

    findings: tuple[Finding, ...]
    manifest: Mapping[str, Any] | None


def check_structure(subject: Subject) -> StructureResult:
    """Check the structure of an artifact."""
    findings = list(subject.structure())
    manifest, place = None, subject.place
    if place is not None:
        try:
            manifest = read_manifest(place)
        except InputError as error:
            findings.append(Finding("manifest", error.subject, error.message))
        if manifest is not None:
            findings += _manifest_findings(subject, place, manifest)
    return StructureResult(tuple(findings), manifest)


def _manifest_findings(
    subject: Subject, place: FileLocation, manifest: Mapping[str, Any]
) -> Iterator[Finding]:
    sizes, listed = place.sizes(), manifest["files"]
    for name, entry in listed.items():
        if not subject.whole and name not in subject.files:
            continue
        if name not in sizes:
            yield Finding("files", name, f"missing, but {MANIFEST_NAME} lists it")
        elif sizes[name] != entry["size"]:
            yield Finding("files", name, f"{sizes[name]} bytes, expected {entry['size']}")
        elif not name.endswith(subject.suffix):  # files of weights are hashed at depth numbers
            digest = hashlib.sha256(place.read(name, 0, sizes[name])).hexdigest()
            if digest != entry["sha256"]:
                yield Finding("hash", name, f"changed since it was written (sha256 {digest[:12]})")
    beside = set(subject.files) if subject.unlisted == "files" else set()
    if subject.whole:  # a sidecar that was put there later decides what loaders do
        beside |= _DECIDING & sizes.keys()
    yield from (_unlisted("files", name) for name in sorted(beside - listed.keys()))
    for table in subject.tables(manifest):
        yield from _table_findings(table)


def _unlisted(check: str, name: str) -> Finding:
    return Finding(check, name, f"not listed in {MANIFEST_NAME}")


def _table_findings(table: TensorTable) -> Iterator[Finding]:
    stored, meaning = table.stored, table.meaning
    for name, (text, file) in table.planned.items():
        if name not in stored:
            where = f"for {file} " if file else ""
            yield Finding("plan", name, f"planned {where}as {text}, but missing")
            continue
        stored_text, stored_file = stored[name]
        if (stored_file, meaning(stored_text)) != (file, meaning(text)):
            message = f"{_in_file(stored_text, stored_file)}, planned as {_in_file(text, file)}"
            yield Finding("plan", name, message)
    for name in sorted(stored.keys() - table.planned.keys()):
        yield Finding("plan", name, "not in the plan")


def _in_file(text: str, file: str) -> str:
    return f"{text} in {file}" if file else text


def check_hashes(
    subject: Subject, manifest: Mapping[str, Any], memo: MemoFile
) -> Iterator[Finding]:
    """Hash the files with weights and compare them with the manifest.

    Files of the wrong size are skipped: `check_structure` reports them.
    """
    assert subject.place is not None  # the manifest was read from there
    sizes = subject.place.sizes()
    for name in subject.files:
        entry = manifest["files"].get(name)
        if entry is None:
            if subject.unlisted == "hash":
                yield _unlisted("hash", name)
        elif sizes.get(name) == entry["size"]:
            digest = memo.sha256(subject.folder() / name)
            if digest != entry["sha256"]:
                message = f"sha256 {digest[:12]}..., written as {entry['sha256'][:12]}..."
                yield Finding("hash", name, message)
