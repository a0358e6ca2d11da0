"""The gates: each looks at what lies there and yields why it stays closed, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qwen35.checkpoint.open import GgufFiles, describe, gguf_files
from qwen35.checkpoint.place import Folder
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.errors import Finding, InputError
from qwen35.gguf.container import read_container
from qwen35.gguf.plan import GgufPlan
from qwen35.pipeline.planned import Artifact
from qwen35.plan.manifest import read_manifest
from qwen35.publish.diff import ATTRIBUTES, Diff
from qwen35.publish.signing import SIGNATURE_NAME
from qwen35.verify.artifact import Verdict, verify
from qwen35.verify.gguf import verify_gguf

__all__ = ["artifact_gate", "gguf_of", "publish_gate", "quantization_gate"]


def artifact_gate(artifact: Artifact) -> Iterator[Finding]:
    """Gate 1: the folder exists, holds the format asked for, and is what its plan says."""
    manifest = read_manifest(Folder(artifact.out))
    if manifest is None:
        yield Finding("artifact", MANIFEST_NAME, "missing: the folder was not written to its end")
        return
    if manifest.get("plan") != artifact.plan.digest:
        yield Finding("artifact", MANIFEST_NAME, "of another plan than the one of this run")
    if artifact.kind == "gguf":
        yield from _gguf_structure(artifact).findings
        return
    opened = describe(str(artifact.out.absolute()), lenient=True)
    verdict = verify(opened, depth="structure")
    yield from verdict.findings
    if verdict.kind != artifact.kind:
        yield Finding("format", artifact.name, f"{verdict.kind}, expected {artifact.kind}")
    if opened.config.architecture.vision != artifact.vision:
        found = "with" if opened.config.architecture.vision else "without"
        yield Finding("format", "config.json", f"a model {found} vision tower, expected the other")


def _gguf_structure(artifact: Artifact) -> Verdict:
    folder = str(artifact.out)
    return verify_gguf(folder, gguf_of(artifact), depth="structure")


def gguf_of(artifact: Artifact) -> GgufFiles:
    """Return the GGUF files of an artifact.

    Raises:
        InputError: there is none.
    """
    files = gguf_files(str(artifact.out.absolute()))
    if files is None:
        raise InputError(str(artifact.out), "no GGUF file in it", hint="run again")
    return files


def quantization_gate(artifact: Artifact) -> Iterator[Finding]:
    """Gate 3: the file of every type asked for is there (Path B always asks for F16), and opens."""
    assert isinstance(artifact.plan, GgufPlan)
    for planned in artifact.plan.files:
        path = artifact.out / planned.name
        if not path.is_file():
            yield Finding("quantization", planned.name, "missing")
            continue
        try:
            container = read_container(path)
        except InputError as error:
            yield Finding("quantization", planned.name, error.found)
            continue
        found = container.keys.get("general.file_type")
        if found != planned.file_type.code:
            message = f"file type {found}, expected {planned.file_type.code}"
            yield Finding("quantization", planned.name, message)


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
