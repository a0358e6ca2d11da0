"""Check that an artifact is fit to publish: it matches its manifest and passes verification."""

from __future__ import annotations

from pathlib import Path

from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.errors import Finding
from qwen35.planning.containers import container_from_manifest
from qwen35.planning.manifest import read_manifest
from qwen35.publishing.listing import LocalListing
from qwen35.verification.opening import open_artifact
from qwen35.verification.verdict import verify

__all__ = ["readiness"]


def readiness(folder: Path, local: LocalListing) -> list[Finding]:
    """Compare every file's SHA-256 with the manifest, and check the structure.

    A folder without a manifest has no findings: qwen35 did not write it.

    Args:
        folder: the folder.
        local: its files.
    """
    manifest = read_manifest(LocalFolder(folder))
    if manifest is None:
        return []
    findings: list[Finding] = []
    amendable = container_from_manifest(manifest).amendable(vision=True)
    verified = manifest.get("verified")
    if isinstance(verified, dict) and verified.get("passed") is False:
        message = "records a failed verification: fix the artifact, then verify with --record"
        findings.append(Finding("verified", MANIFEST_NAME, message))
    served = manifest.get("served")
    if isinstance(served, dict) and served.get("passed") is False:
        message = "records findings at the server that runs it: run the pipeline again"
        findings.append(Finding("served", MANIFEST_NAME, message))
    for name, entry in manifest["files"].items():
        digest = local.files.get(name)
        if digest is None:
            findings.append(Finding("missing", name, "missing, but the manifest lists it"))
        elif digest.sha256 != entry["sha256"]:
            message = "not the file that the manifest lists"
            if name in amendable:
                message += "; if you edited it on purpose, record that with `qwen35 amend`"
            findings.append(Finding("changed", name, message))
    if findings or not any(name.endswith(".safetensors") for name in local.files):
        return findings
    return list(verify(open_artifact(str(folder.absolute()))).findings)
