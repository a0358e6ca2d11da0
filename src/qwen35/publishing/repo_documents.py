"""The documents of a repository: model card, Modelfile, and the manifest that records both."""

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
from qwen35.publishing.modelfile import gguf_adapters, gguf_models, is_gguf, modelfile_text
from qwen35.sinks.files import write_file
from qwen35.sinks.staging import os_errors
from qwen35.verification.verdict import Verdict

__all__ = [
    "CARD_NAME",
    "MODELFILE_NAME",
    "REPORT_NAME",
    "documents",
    "record_served",
    "record_verdict",
    "write_documents",
]

CARD_NAME = "README.md"
MODELFILE_NAME = "Modelfile"
REPORT_NAME = "report.json"


def documents(
    folder: Path, repo: str, base_model: str | None = None, verdict: Verdict | None = None
) -> dict[str, bytes]:
    """Return the documents of an artifact that are missing or out of date.

    A README.md or Modelfile that someone else wrote or edited is left alone. The same folder gives
    the same bytes.

    Args:
        folder: the artifact; without a manifest it gets no documents.
        repo: the repository's name, for the card's examples.
        base_model: the card's base model; by default the manifest's source.
        verdict: a verification's result, for the manifest; by default the earlier one stays.

    Raises:
        InputError: the manifest or the report cannot be read.
    """
    place = LocalFolder(folder)
    existing = read_manifest(place)
    if existing is None:
        return {}
    manifest = dict(existing)
    measures = _measures(place)
    texts = {CARD_NAME: card_text(place, manifest, repo, base_model, measures)}
    if any(map(is_gguf, place.sizes())) and (gguf_models(place) or not gguf_adapters(place)):
        texts[MODELFILE_NAME] = modelfile_text(place)
    added = dict(manifest.get("added", {}))
    result = {}
    for name, text in texts.items():
        if _may_write(folder / name, added.get(name)):
            result[name] = text.encode()
            digest = digest_bytes(result[name])
            added[name] = {"size": digest.size, "sha256": digest.sha256}
        else:  # someone else's by now
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
    result[MANIFEST_NAME] = json_bytes(manifest)
    return {name: result[name] for name in result if not _holds(folder / name, result[name])}


def record_verdict(folder: Path, verdict: Verdict) -> bool:
    """Record a verdict, passed or failed, in the artifact's manifest.

    Returns:
        Whether the artifact has a manifest.

    Raises:
        InputError: the manifest cannot be read.
        OutputError: the manifest cannot be written.
    """
    manifest = read_manifest(LocalFolder(folder))
    if manifest is None:
        return False
    content = json_bytes({**manifest, "verified": _verified(verdict)})
    if not _holds(folder / MANIFEST_NAME, content):
        write_documents(folder, {MANIFEST_NAME: content})
    return True


def record_served(folder: Path, verdict: Verdict) -> None:
    """Record the verdict on a served artifact in its manifest: without address and answers.

    Raises:
        InputError: the manifest cannot be read.
        OutputError: the manifest cannot be written.
    """
    manifest = read_manifest(LocalFolder(folder))
    assert verdict.served is not None
    if manifest is None:
        return
    entry = {
        "server": verdict.served.model.server,
        "context": verdict.served.model.context,
        "passed": verdict.passed,
        "result": verdict.result,
        "asked": list(verdict.served.asked),
        "acceptance": verdict.served.acceptance,
    }
    content = json_bytes({**manifest, "served": entry})
    if not _holds(folder / MANIFEST_NAME, content):
        write_documents(folder, {MANIFEST_NAME: content})


def _verified(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict for the manifest: without the artifact's path on this machine."""
    values = verdict.to_json()
    return {name: values[name] for name in values if name != "artifact"}


def write_documents(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write documents to the folder, each under a temporary name that is then renamed.

    Raises:
        OutputError: a document cannot be written.
    """
    for name, content in contents.items():
        temporary = folder / f".qwen35-{name}.partial"
        with os_errors(folder):
            temporary.unlink(missing_ok=True)
            write_file(temporary, content)
            temporary.replace(folder / name)


def _may_write(path: Path, entry: Any) -> bool:
    """Return whether the file is missing, or still as an earlier call wrote it."""
    if not path.is_file() or path.is_symlink():
        return not path.is_symlink()
    return isinstance(entry, dict) and entry.get("sha256") == digest_file(path).sha256


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and digest_file(path) == digest_bytes(content)


def _measures(place: LocalFolder) -> CardMeasurements | None:
    """Read the table of report.json, if there is one."""
    if REPORT_NAME not in place.sizes():
        return None
    report = read_json(place, REPORT_NAME)
    table = report.get("table") if isinstance(report, dict) else None
    measures = CardMeasurements.parse(table)
    if measures is None:
        expected = "a table of columns and rows"
        raise InputError(REPORT_NAME, "no measures in it", expected=expected)
    return measures
