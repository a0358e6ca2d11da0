"""Check an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qwen35.checkpoint.adapted import with_adapters
from qwen35.checkpoint.adapter_files import Adapter, open_adapters
from qwen35.checkpoint.open import describe, fetch
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import Checkpoint
from qwen35.errors import InputError, UsageError
from qwen35.planning.manifest import read_manifest
from qwen35.planning.recorded_adapters import recorded_adapters
from qwen35.progress import Progress
from qwen35.publishing.repo_documents import record_verdict
from qwen35.publishing.signing import SIGNATURE_NAME
from qwen35.verification.opening import open_artifact
from qwen35.verification.subject import Subject
from qwen35.verification.verdict import Depth, Engine, Verdict
from qwen35.verification.verdict import verify as check

__all__ = ["verify"]


def verify(
    model: str | Path,
    *,
    source: str | Path | None = None,
    adapter: Sequence[str | Path] = (),
    depth: Depth | None = None,
    engine: Engine | None = None,
    threads: int | None = None,
    tensor_parallel: int | None = None,
    record: bool = False,
    hf_token: str | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Check an artifact, alone or against its source.

    The verdict holds the findings; it only raises if the artifact cannot be checked at all.

    Args:
        model: folder, GGUF file, Hub id or ``hf:owner/name/path``.
        source: the checkpoint that it was made from.
        adapter: the adapters merged into it, as for `convert`; with a source only.
        depth: ``structure`` reads headers and small files, ``numbers`` every byte, ``behaviour``
            also loads it and asks it questions; if None, ``numbers`` with a source, otherwise
            ``structure``.
        engine: engine for checkpoints at depth ``behaviour``; ``transformers`` if None.
        threads: number of threads; all processors if None.
        tensor_parallel: FP8: number of GPUs that must be able to split every weight in whole tiles.
        record: write the verdict into the artifact's qwen35.json.
        hf_token: for the Hub; by default HF_TOKEN.
        progress: receives bytes read.

    Raises:
        UsageError: arguments do not fit together, or an engine is not installed.
        InputError: there is nothing to check, or the source cannot be read.
        HubError: the Hub refused a request or could not be reached.

    >>> verify("assets/qwen3.5-tiny").passed
    True
    """
    name = str(model)
    folder = _record_folder(name) if record else None
    depth = depth or ("numbers" if source else "structure")
    if engine and depth != "behaviour":
        hint = "add --depth behaviour, or leave it out"
        raise UsageError("--engine", f"is not used at depth {depth}", hint=hint)
    if adapter and not source:
        raise UsageError("--adapter", "needs --source, which it changes", hint="give both")
    subject = open_artifact(
        name, depth, engine=engine, tensor_parallel=tensor_parallel, token=hf_token
    )
    original = None
    if source and subject.files:
        adapters = _adapters(subject, adapter)
        original = with_adapters(_source(str(source), depth, hf_token), adapters)
    verdict = check(
        subject,
        source=original,
        depth=depth,
        threads=threads,
        tensor_parallel=tensor_parallel,
        engine=engine,
        progress=None if depth == "structure" else progress,
    )
    if folder is not None:
        record_verdict(folder, verdict)
    return verdict


def _source(model: str, depth: Depth, token: str | None) -> Checkpoint:
    """Open the source as far as the depth needs it: on the Hub, weights stay there."""
    if depth == "structure":
        described = describe(model, token=token)
        if described.place is not None:
            return described
    return fetch(model, token=token)  # refuses a published size, which has no files


def _adapters(subject: Subject, texts: Sequence[str | Path]) -> tuple[Adapter, ...]:
    """Open the adapters that an artifact was made with; its manifest knows their weights."""
    adapters, manifest = open_adapters(texts), None
    with suppress(InputError):  # a finding of the check
        manifest = read_manifest(subject.place) if subject.place else None
    recorded = manifest and isinstance(manifest.get("source"), dict)
    if not (manifest and recorded and manifest["source"].get("adapters")):
        return adapters
    return recorded_adapters(manifest, adapters)


def _record_folder(name: str) -> Path:
    """Return the folder whose manifest will hold the verdict.

    Raises:
        UsageError: it has no manifest, or is signed: any change would break the signature.
    """
    folder = Path(name).expanduser()
    if not (folder / MANIFEST_NAME).is_file():
        raise UsageError("--record", f"{name} holds no {MANIFEST_NAME}", hint="leave it out")
    if (folder / SIGNATURE_NAME).is_file():
        hint = "remove it, record, then sign again with `qwen35 publish --sign`"
        raise UsageError("--record", f"{SIGNATURE_NAME} signs the manifest as it is", hint=hint)
    return folder
