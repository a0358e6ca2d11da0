"""Rebuild an artifact from its manifest and compare it byte for byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen35.checkpoint.adapter_files import Adapter
from qwen35.checkpoint.hub import HubId, HubLocation
from qwen35.checkpoint.locations import FileLocation, LocalFolder, expanded
from qwen35.checkpoint.open import fetch_commit, hub_token
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.display import counted
from qwen35.errors import Finding, InputError, UsageError
from qwen35.planning.container import ContainerInputs
from qwen35.planning.containers import container_from_manifest
from qwen35.planning.manifest import (
    amendment_notes,
    first_entries,
    manifest_versions,
    read_manifest,
    recorded_donor,
    source_of,
)
from qwen35.planning.merged_source import changed
from qwen35.planning.output_plan import Plan
from qwen35.planning.recorded_adapters import recorded_adapters
from qwen35.planning.sources import fetch_source
from qwen35.planning.work_order import plan_again as plan_from_manifest
from qwen35.progress import Progress
from qwen35.publishing.hashes import digest_file
from qwen35.publishing.listing import RemoteRepo, list_commit
from qwen35.sinks.staging import StagedResult
from qwen35.writing.write import check_before, write

__all__ = ["ArtifactOrigin", "Reproduction", "plan_again", "reproduce"]


@dataclass(frozen=True)
class ArtifactOrigin:
    """An artifact's manifest and location.

    Args:
        name: the user's name for it.
        manifest: the parsed manifest.
        folder: the artifact's folder, if local.
        remote: the artifact's repository, if on the Hub.
    """

    name: str
    manifest: Mapping[str, Any]
    folder: Path | None = None
    remote: RemoteRepo | None = None

    @classmethod
    def find(cls, name: str, token: str | None = None) -> ArtifactOrigin:
        """Read a manifest from a qwen35.json, its folder or a Hub id.

        Raises:
            InputError: the manifest is missing or malformed.
            HubError: the Hub refused, or could not be reached.
        """
        path = expanded(name)
        path = path.parent if path.is_file() and path.name == MANIFEST_NAME else path
        if path.is_dir():
            return cls(name, _manifest(LocalFolder(path), name), folder=path)
        hub_id = HubId.parse(name)
        if hub_id is None or path.exists() or name.startswith((".", "/", "~")):
            expected = f"a {MANIFEST_NAME}, its folder or a Hub id (owner/name)"
            raise InputError(name, "no manifest", expected=expected)
        place = HubLocation(hub_id, hub_token(token))
        remote = list_commit(place.repo, place.revision, hub_token(token))
        return cls(name, _manifest(place, name), remote=remote)


def _manifest(place: FileLocation, name: str) -> Mapping[str, Any]:
    manifest = read_manifest(place)
    if manifest is None:
        hint = "only outputs written by qwen35 can be reproduced"
        raise InputError(name, f"no {MANIFEST_NAME} in it", hint=hint)
    return manifest


@dataclass(frozen=True)
class Reproduction:
    """The result of a reproduction.

    Args:
        files: names of the compared files.
        findings: the differences.
        notes: possible causes: tool versions that differ from the manifest's.
    """

    files: tuple[str, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        found = counted(len(self.findings), "difference") if self.findings else "the same bytes"
        return f"<Reproduction of {counted(len(self.files), 'file')}: {found}>"

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return {
            "same": not self.findings,
            "files": list(self.files),
            "findings": [finding.to_json() for finding in self.findings],
            "notes": list(self.notes),
        }


def plan_again(
    origin: ArtifactOrigin,
    source: str | None = None,
    token: str | None = None,
    inputs: ContainerInputs | None = None,
    adapters: Sequence[Adapter] = (),
    mtp_from: str | None = None,
) -> Plan:
    """Plan the artifact again, from the manifest's source and recipe.

    Args:
        origin: the artifact's manifest.
        source: the source, if not the manifest's repository and commit.
        token: access token for the Hub.
        inputs: the files beside the source that it was made from.
        adapters: those merged into the source.
        mtp_from: the checkpoint whose MTP layer it has, if not the one in the manifest.

    Raises:
        UsageError: the source is unknown, or an adapter or input file is missing.
        InputError: the source is damaged, or the input files differ.
    """
    manifest, inputs = origin.manifest, inputs or ContainerInputs()
    container = container_from_manifest(manifest)
    container.request_from_manifest(manifest, inputs)  # fail before anything is downloaded
    adapters = recorded_adapters(manifest, adapters)
    donor = recorded_donor(manifest, mtp_from)
    if donor and "mtp_from" not in manifest["source"]:
        found = f"{MANIFEST_NAME} records no other checkpoint's MTP layer"
        raise UsageError("--mtp-from", found, hint="leave it out")
    repo, revision = source_of(manifest)
    if source:
        checkpoint = fetch_source(source, token=token, extra=container.extra)
    elif repo and revision and "file" in manifest["source"]:
        address = f"hf:{repo}@{revision}/{manifest['source']['file']}"
        checkpoint = fetch_source(address, token=token, extra=container.extra)
    elif repo and revision:
        checkpoint = fetch_commit(repo, revision, token=token, extra=container.extra)
    else:
        folder = manifest["source"].get("folder")
        found = f"made from a folder called {folder}"
        raise UsageError(origin.name, found, hint="give its location with --source")
    checkpoint = changed(checkpoint, adapters, donor or None, token=token)
    return plan_from_manifest(checkpoint, manifest, inputs)


def reproduce(
    origin: ArtifactOrigin,
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    keep: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Reproduction:
    """Rebuild the artifact and compare it with the manifest and the files beside it.

    Files on the Hub are compared by their listed hashes, without a download. Unfinished work stays
    if `keep` is set.

    Raises:
        OutputError: `out` exists, or the disk is full.
        TensorError: a weight of the source cannot be read.
    """
    check_before(out, overwrite=overwrite)
    result = write(plan, out, overwrite=overwrite, keep=keep, threads=threads, progress=progress)
    return Reproduction(
        tuple(origin.manifest["files"]),
        tuple(_findings(origin, plan, result)),
        tuple(_notes(origin.manifest)),
    )


def _findings(origin: ArtifactOrigin, plan: Plan, result: StagedResult) -> Iterator[Finding]:
    manifest = origin.manifest
    if manifest.get("plan") != plan.digest:
        yield Finding("plan", MANIFEST_NAME, "the plan computed now differs")
    first = first_entries(manifest)
    for name, entry in manifest["files"].items():
        if name in first and not _is_listed_file(origin, name, entry):
            yield Finding("artifact", name, "the file beside the manifest is not as amended")
        written = first.get(name, entry)
        if written is None:  # added on purpose
            continue
        rebuilt = result.hashes.get(name)
        if rebuilt is None:
            yield Finding("missing", name, "not rebuilt")
            continue
        if rebuilt != written["sha256"]:
            message = f"sha256 {rebuilt[:12]} now, {written['sha256'][:12]} in the manifest"
            yield Finding("bytes", name, message)
        # The manifest may be intact while the file beside it is not.
        if name not in first and not _same_file(origin, name, result.out / name):
            message = "the file beside the manifest is missing, or differs from the rebuilt one"
            yield Finding("artifact", name, message)
    for name in sorted(result.hashes.keys() - manifest["files"].keys()):
        yield Finding("extra", name, "rebuilt, but not listed in the manifest")


def _same_file(origin: ArtifactOrigin, name: str, rebuilt: Path) -> bool:
    """Return whether the artifact's own file equals the rebuilt one."""
    digest = digest_file(rebuilt)
    if origin.remote is not None:
        remote_file = origin.remote.files.get(name)
        return remote_file is not None and remote_file.holds(digest)
    assert origin.folder is not None
    path = origin.folder / name
    return path.is_file() and digest_file(path) == digest


def _is_listed_file(origin: ArtifactOrigin, name: str, entry: Mapping[str, Any]) -> bool:
    """Return whether the artifact's own file is the one that its manifest lists.

    Of small files, a repository's listing has only the size and git's hash.
    """
    if origin.remote is not None:
        there = origin.remote.files.get(name)
        listed = (entry["size"], entry["sha256"])
        return there is not None and (there.size, there.sha256 or listed[1]) == listed
    assert origin.folder is not None
    path = origin.folder / name
    return path.is_file() and digest_file(path).sha256 == entry["sha256"]


def _notes(manifest: Mapping[str, Any]) -> list[str]:
    recorded = manifest.get("tool")
    recorded = recorded if isinstance(recorded, dict) else {}
    amended = [f"{text}; compared as first written" for text in amendment_notes(manifest)]
    return amended + [
        f"{name} {version} here, {recorded.get(name, 'unknown')} then"
        for name, version in manifest_versions().items()
        if recorded.get(name) != version
    ]
