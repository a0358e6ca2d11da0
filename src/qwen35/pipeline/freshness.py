"""Whether artifacts are up to date, by plan digest and the hash of every file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.source import INDEX_NAME, Checkpoint
from qwen35.errors import InputError
from qwen35.pipeline.planned_artifacts import PlannedArtifact
from qwen35.pipeline.run_request import RunRequest
from qwen35.pipeline.run_state import RunState, key_of
from qwen35.planning.manifest import read_manifest
from qwen35.publishing.hashes import FileHasher

__all__ = ["is_up_to_date", "make_key", "source_identity", "up_to_date"]


def source_identity(checkpoint: Checkpoint, hasher: FileHasher) -> Any:
    """Return what identifies a source's content: its commit, or the hash of each file.

    What adapters change follows, and whose MTP layer it has. Times would not do, as a copy changes
    them; nor would headers, as retraining keeps them.

    Raises:
        InputError: a file cannot be read.
    """
    identity = _stored_identity(checkpoint, hasher)
    added: list[Any] = []
    if effects := [adapter.effect_json() for adapter in checkpoint.adapters]:
        added.append(effects)
    if checkpoint.donor is not None:
        added.append(_stored_identity(checkpoint.donor, hasher))
    return [identity, *added] if added else identity


def _stored_identity(checkpoint: Checkpoint, hasher: FileHasher) -> Any:
    if checkpoint.repo:
        return [checkpoint.repo, checkpoint.revision]
    root = checkpoint.folder()
    names = {*checkpoint.file_sizes, *checkpoint.sidecars, "config.json", INDEX_NAME, "README.md"}
    paths = [root / name for name in sorted(names) if (root / name).is_file()]
    return {path.name: digest.sha256 for path, digest in hasher.digests(paths).items()}


def make_key(artifact: PlannedArtifact, identity: Any) -> str:
    """Return a hash of everything that decides an artifact's bytes.

    Args:
        artifact: the planned artifact.
        identity: its source's identity.
    """
    return key_of("make", artifact.plan.digest, identity)


def is_up_to_date(
    artifact: PlannedArtifact, identity: Any, state: RunState, hasher: FileHasher
) -> bool:
    """Return whether an earlier run made the same artifact, and its files are intact."""
    key = make_key(artifact, identity)
    if state.recorded(f"make {artifact.name}", key) is None or not artifact.out.is_dir():
        return False
    try:
        manifest = read_manifest(LocalFolder(artifact.out))
    except InputError:  # damaged: rebuild it
        return False
    if manifest is None or manifest.get("plan") != artifact.plan.digest:
        return False
    paths = {name: artifact.out / name for name in manifest["files"]}
    if not all(path.is_file() for path in paths.values()):
        return False
    # The plan digest alone would not notice files changed since.
    digests = hasher.digests(paths.values())
    return all(
        digests[path].sha256 == manifest["files"][name]["sha256"] for name, path in paths.items()
    )


def up_to_date(
    request: RunRequest, source: Checkpoint, artifacts: Sequence[PlannedArtifact]
) -> frozenset[str]:
    """Return the names of the artifacts that a run would keep; write nothing."""
    state = RunState.load(request.out)
    if not state.steps or (source.repo is None and source.root is None):
        return frozenset()
    hasher = FileHasher(remember=False)
    identity = source_identity(source, hasher)
    return frozenset(a.name for a in artifacts if is_up_to_date(a, identity, state, hasher))
