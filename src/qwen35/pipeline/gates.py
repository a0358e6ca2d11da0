"""The gates: each looks at what lies there and yields why it stays closed, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.errors import Finding
from qwen35.pipeline.planned_artifacts import PlannedArtifact
from qwen35.planning.manifest import read_manifest
from qwen35.publishing.diff import ATTRIBUTES, Diff
from qwen35.publishing.signing import SIGNATURE_NAME
from qwen35.verification.opening import open_artifact
from qwen35.verification.verdict import verify

__all__ = ["artifact_gate", "publish_gate", "quantization_gate"]


def artifact_gate(artifact: PlannedArtifact) -> Iterator[Finding]:
    """Gate 1: the folder exists, holds the format asked for, and is what its plan says."""
    manifest = read_manifest(LocalFolder(artifact.out))
    if manifest is None:
        yield Finding("artifact", MANIFEST_NAME, "missing: the folder was not written to its end")
        return
    if manifest.get("plan") != artifact.plan.digest:
        yield Finding("artifact", MANIFEST_NAME, "of another plan than the one of this run")
    subject = open_artifact(str(artifact.out.absolute()))
    verdict = verify(subject, depth="structure")
    yield from verdict.findings
    if verdict.kind != artifact.kind:
        yield Finding("format", artifact.name, f"{verdict.kind}, expected {artifact.kind}")
    if verdict.findings:
        return  # what was not read to its end says nothing of the tower
    if subject.vision != artifact.vision:
        found = "with" if subject.vision else "without"
        yield Finding("format", artifact.name, f"a model {found} vision tower, expected the other")


def quantization_gate(artifact: PlannedArtifact) -> Iterator[Finding]:
    """Gate 3: the file of every type asked for is there (Path B always asks for F16), and opens."""
    yield from artifact.plan.container.file_findings(artifact.plan, artifact.out)


def publish_gate(diff: Diff, documents: Iterable[str]) -> Iterator[Finding]:
    """Gate 4: a push is clean, uploads nothing but the artifact, and deletes nothing.

    Args:
        diff: of the push.
        documents: what belongs to the artifact beside the files that its manifest lists.
    """
    yield from diff.findings
    expected = {*documents, MANIFEST_NAME, SIGNATURE_NAME, ATTRIBUTES}
    for operation in diff.of("upload"):
        if operation.path not in expected:
            yield Finding("publish", operation.path, "not a part of the artifact")
    for operation in diff.of("delete", "remove"):
        yield Finding("publish", operation.path, "would be deleted")
