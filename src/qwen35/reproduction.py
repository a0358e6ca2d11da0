"""Rebuild an artifact from its manifest and compare it, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen35.checkpoint.hub import HubId, HubLocation
from qwen35.checkpoint.locations import FileLocation, LocalFolder
from qwen35.checkpoint.open import fetch, hub_token
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.errors import Finding, InputError, UsageError
from qwen35.planning.container import ContainerInputs
from qwen35.planning.containers import container_told
from qwen35.planning.manifest import manifest_versions, read_manifest, source_of
from qwen35.planning.output_plan import Plan
from qwen35.planning.work_order import plan_again as plan_from_manifest
from qwen35.progress import Progress
from qwen35.publishing.hashes import digest_file
from qwen35.publishing.listing import RemoteRepo, list_commit
from qwen35.sinks.staging import StagedResult
from qwen35.writing.write import check_before, write

__all__ = ["ArtifactOrigin", "Reproduction", "plan_again", "reproduce"]


@dataclass(frozen=True)
class ArtifactOrigin:
    """An artifact's manifest, and where it was found.

    Args:
        name: what the user called it.
        manifest: parsed.
        folder: the artifact, if it is on this machine.
        remote: the artifact, if it is on the Hub.
    """

    name: str
    manifest: Mapping[str, Any]
    folder: Path | None = None
    remote: RemoteRepo | None = None

    @classmethod
    def find(cls, name: str, token: str | None = None) -> ArtifactOrigin:
        """Read the manifest that `name` means: a qwen35.json, its folder or a Hub id.

        Raises:
            InputError: there is none, or it is malformed.
            HubError: the Hub refused, or was not reached.
        """
        path = Path(name).expanduser()
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
        hint = "only what qwen35 wrote can be made again"
        raise InputError(name, f"no {MANIFEST_NAME} in it", hint=hint)
    return manifest


@dataclass(frozen=True)
class Reproduction:
    """What came of it.

    Args:
        files: names compared.
        findings: every file that is otherwise.
        notes: what may explain a difference: versions that are not those of the manifest.
    """

    files: tuple[str, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
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
) -> Plan:
    """Plan the artifact once more, from the manifest's source and recipe.

    Args:
        origin: the manifest.
        source: where the source is, if not at the manifest's repository and commit.
        token: access token for the Hub.
        inputs: the files that it was made with, beside the source.

    Raises:
        UsageError: the source is not known, or a file that it was made with is not given.
        InputError: the source is damaged, or these are other files.
    """
    manifest, inputs = origin.manifest, inputs or ContainerInputs()
    container = container_told(manifest)
    container.asked_again(manifest, inputs)  # refuses what is wrong before anything is fetched
    repo, revision = source_of(manifest)
    model = source or (f"{repo}@{revision}" if repo else None)
    if model is None:
        folder = manifest["source"].get("folder")
        found = f"made from a folder called {folder}"
        raise UsageError(origin.name, found, hint="say where it is with --source")
    checkpoint = fetch(model, token=token, extra=container.extra)
    return plan_from_manifest(checkpoint, manifest, inputs)


def reproduce(
    origin: ArtifactOrigin,
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Reproduction:
    """Write the artifact again and compare it with the manifest, and with the files beside that.

    Files on the Hub are compared by the hashes that it lists; they are not downloaded.

    Raises:
        OutputError: `out` exists, or the disk is full.
        TensorError: a weight of the source cannot be read.
    """
    check_before(out, overwrite=overwrite)
    result = write(plan, out, overwrite=overwrite, threads=threads, progress=progress)
    return Reproduction(
        tuple(origin.manifest["files"]),
        tuple(_findings(origin, plan, result)),
        tuple(_notes(origin.manifest)),
    )


def _findings(origin: ArtifactOrigin, plan: Plan, result: StagedResult) -> Iterator[Finding]:
    manifest = origin.manifest
    if manifest.get("plan") != plan.digest:
        yield Finding("plan", MANIFEST_NAME, "the plan made now is another")
    for name, entry in manifest["files"].items():
        again = result.hashes.get(name)
        if again is None:
            yield Finding("missing", name, "not made again")
            continue
        if again != entry["sha256"]:
            message = f"sha256 {again[:12]} now, {entry['sha256'][:12]} in the manifest"
            yield Finding("bytes", name, message)
        if not _lies_there(origin, name, result.out / name):
            message = "beside the manifest is missing, or has other bytes than the one now"
            yield Finding("artifact", name, message)
    for name in sorted(result.hashes.keys() - manifest["files"].keys()):
        yield Finding("extra", name, "made now, but the manifest does not list it")


def _lies_there(origin: ArtifactOrigin, name: str, made: Path) -> bool:
    """Whether the artifact's own file is the one made now."""
    digest = digest_file(made)
    if origin.remote is not None:
        there = origin.remote.files.get(name)
        return there is not None and there.holds(digest)
    assert origin.folder is not None
    path = origin.folder / name
    return path.is_file() and digest_file(path) == digest


def _notes(manifest: Mapping[str, Any]) -> list[str]:
    then = manifest.get("tool")
    then = then if isinstance(then, dict) else {}
    return [
        f"{name} {version} here, {then.get(name, 'unknown')} then"
        for name, version in manifest_versions().items()
        if then.get(name) != version
    ]
