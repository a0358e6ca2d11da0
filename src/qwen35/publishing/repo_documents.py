"""What a repository needs beside the weights: model card, Modelfile, the manifest with both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen35.checkpoint.header import json_bytes
from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import read_json
from qwen35.errors import InputError
from qwen35.planning.manifest import read_manifest
from qwen35.publishing.card import CardMeasurements, card_text
from qwen35.publishing.hashes import digest_bytes, digest_file
from qwen35.publishing.modelfile import is_gguf, modelfile_text
from qwen35.sinks.files import write_file
from qwen35.sinks.staging import os_errors
from qwen35.verification.verdict import Verdict

__all__ = [
    "CARD_NAME",
    "MODELFILE_NAME",
    "REPORT_NAME",
    "documents",
    "record_verdict",
    "write_documents",
]

CARD_NAME = "README.md"
MODELFILE_NAME = "Modelfile"
REPORT_NAME = "report.json"


def documents(
    folder: Path, repo: str, base_model: str | None = None, verdict: Verdict | None = None
) -> dict[str, bytes]:
    """Return the documents that a folder of ours lacks or has in an older form.

    A README.md or Modelfile that someone wrote or changed stays as it is. The same folder gives the
    same bytes again.

    Args:
        folder: the artifact; without a manifest it is not ours, and gets nothing.
        repo: where it will be published; the card's examples name it.
        base_model: what the card names as base, if not the manifest's source.
        verdict: of a verification, for the manifest; without one it keeps what it has.

    Raises:
        InputError: the manifest or the report cannot be read.
    """
    place = LocalFolder(folder)
    found = read_manifest(place)
    if found is None:
        return {}
    manifest = dict(found)
    measures = _measures(place)
    texts = {CARD_NAME: card_text(place, manifest, repo, base_model, measures)}
    if any(map(is_gguf, place.sizes())):
        texts[MODELFILE_NAME] = modelfile_text(place)
    added = dict(manifest.get("added", {}))
    made = {}
    for name, text in texts.items():
        if _is_ours(folder / name, added.get(name)):
            made[name] = text.encode()
            digest = digest_bytes(made[name])
            added[name] = {"size": digest.size, "sha256": digest.sha256}
        else:
            added.pop(name, None)
    if measures:
        digest = digest_file(folder / REPORT_NAME)
        added[REPORT_NAME] = {"size": digest.size, "sha256": digest.sha256}
    manifest["added"] = added
    if verdict:
        manifest["verified"] = _verified(verdict)
    if measures:
        manifest["measures"] = measures.to_json()
    else:
        manifest.pop("measures", None)
    made[MANIFEST_NAME] = json_bytes(manifest)
    return {name: made[name] for name in made if not _holds(folder / name, made[name])}


def record_verdict(folder: Path, verdict: Verdict) -> bool:
    """Write a verdict into the manifest of the artifact it is of, found faults included.

    Returns:
        Whether there is a manifest to hold it.

    Raises:
        InputError: the manifest cannot be read.
        OutputError: the disk refuses.
    """
    manifest = read_manifest(LocalFolder(folder))
    if manifest is None:
        return False
    content = json_bytes({**manifest, "verified": _verified(verdict)})
    if not _holds(folder / MANIFEST_NAME, content):
        write_documents(folder, {MANIFEST_NAME: content})
    return True


def _verified(verdict: Verdict) -> dict[str, Any]:
    """What the manifest says of a verdict: all of it but where the artifact lay."""
    said = verdict.to_json()
    return {name: said[name] for name in said if name != "artifact"}


def write_documents(folder: Path, made: Mapping[str, bytes]) -> None:
    """Write documents to the folder, each whole: beside its place, then renamed to it.

    Raises:
        OutputError: the disk refuses.
    """
    for name, content in made.items():
        beside = folder / f".qwen35-{name}.partial"
        with os_errors(folder):
            beside.unlink(missing_ok=True)
            write_file(beside, content)
            beside.replace(folder / name)


def _is_ours(path: Path, entry: Any) -> bool:
    """Whether there is no such file, or it is the one that an earlier call wrote."""
    if not path.is_file() or path.is_symlink():
        return not path.is_symlink()
    return isinstance(entry, dict) and entry.get("sha256") == digest_file(path).sha256


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and digest_file(path) == digest_bytes(content)


def _measures(place: LocalFolder) -> CardMeasurements | None:
    """Read the table of a report, if there is a report."""
    if REPORT_NAME not in place.sizes():
        return None
    report = read_json(place, REPORT_NAME)
    table = report.get("table") if isinstance(report, dict) else None
    measures = CardMeasurements.parse(table)
    if measures is None:
        expected = "a table of columns and rows"
        raise InputError(REPORT_NAME, "no measures in it", expected=expected)
    return measures
