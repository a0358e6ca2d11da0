"""The gates: each checks the files on disk and yields findings that keep it closed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import Checkpoint
from qwen35.errors import Finding
from qwen35.pipeline.planned_artifacts import PlannedArtifact
from qwen35.planning.manifest import read_manifest
from qwen35.publishing.diff import ATTRIBUTES, Diff
from qwen35.publishing.signing import SIGNATURE_NAME
from qwen35.serving.served_model import identify
from qwen35.serving.server_client import ServerClient
from qwen35.serving.started_server import StartedServers
from qwen35.verification.opening import open_artifact
from qwen35.verification.served_verdict import check_served
from qwen35.verification.template_comparison import stored_templates
from qwen35.verification.verdict import Verdict, served_verdict, verify

__all__ = ["artifact_gate", "publish_gate", "quantization_gate", "serving_gate"]


def artifact_gate(artifact: PlannedArtifact) -> Iterator[Finding]:
    """Gate 1: the folder exists, has the requested format, and matches its plan."""
    manifest = read_manifest(LocalFolder(artifact.out))
    if manifest is None:
        yield Finding("artifact", MANIFEST_NAME, "missing: the folder is incomplete")
        return
    if manifest.get("plan") != artifact.plan.digest:
        yield Finding("artifact", MANIFEST_NAME, "its plan differs from this run's")
    subject = open_artifact(str(artifact.out.absolute()))
    verdict = verify(subject, depth="structure")
    yield from verdict.findings
    if verdict.kind != artifact.kind:
        yield Finding("format", artifact.name, f"{verdict.kind}, expected {artifact.kind}")
    if verdict.findings:
        return  # the check may have stopped early, before the vision tower was seen
    if subject.vision != artifact.vision:
        found, expected = ("with", "without") if subject.vision else ("without", "with")
        message = f"a model {found} vision tower, expected {expected}"
        yield Finding("format", artifact.name, message)


def quantization_gate(artifact: PlannedArtifact) -> Iterator[Finding]:
    """Gate 3: the file of every requested type (in path B also F16) exists and opens."""
    yield from artifact.plan.container.file_findings(artifact.plan, artifact.out)


def serving_gate(artifact: PlannedArtifact, source: Checkpoint, started: StartedServers) -> Verdict:
    """Ask the server that runs an artifact, and compare its chat template with the artifact's.

    Args:
        artifact: which has the server's address.
        source: whose template it has, if it has none of its own.
        started: the server, if it was started for this.

    Raises:
        EndpointError: the server does not answer.
        UsageError: it does not serve that model, or several.
    """
    endpoint = artifact.request.endpoint
    assert endpoint is not None  # otherwise the graph has no such step
    own = LocalFolder(artifact.out)
    place = own if stored_templates(own) else source.place
    with ServerClient(endpoint) as client:
        served = identify(client, artifact.request.served_model)
        result = check_served(client, served, source=place).after(started.fate())
        return served_verdict(result, artifact.name)


def publish_gate(diff: Diff, documents: Iterable[str]) -> Iterator[Finding]:
    """Gate 4: a push has no findings, uploads only the artifact, and deletes nothing.

    Args:
        diff: the diff of the push.
        documents: the artifact's files, as its manifest lists them.
    """
    yield from diff.findings
    expected = {*documents, MANIFEST_NAME, SIGNATURE_NAME, ATTRIBUTES}
    for operation in diff.of("upload"):
        if operation.path not in expected:
            yield Finding("publish", operation.path, "not part of the artifact")
    for operation in diff.of("delete", "remove"):
        yield Finding("publish", operation.path, "would be deleted")
