"""From what a user typed to an artifact that can be checked, whatever container holds it."""

from __future__ import annotations

from qwen35.verification.gguf_subject import GgufSubject
from qwen35.verification.safetensors_subject import CheckpointSubject
from qwen35.verification.subject import Depth, Engine, Subject

__all__ = ["SUBJECTS", "open_artifact"]

SUBJECTS: tuple[type[Subject], ...] = (GgufSubject, CheckpointSubject)
"""Every container that can be checked; the last takes what no other holds."""


def open_artifact(
    name: str,
    depth: Depth = "structure",
    *,
    engine: Engine | None = None,
    tensor_parallel: int | None = None,
    token: str | None = None,
) -> Subject:
    """Open an artifact to be checked; what is wrong with it is left to the check.

    Args:
        name: folder, GGUF file, Hub id or ``hf:owner/name/path``.
        depth: how deep it will be checked: ``structure`` needs no weights; for all else those of
            the Hub are downloaded.
        engine: what it will be asked in.
        tensor_parallel: GPUs that will have to share its weights.
        token: of the Hub.

    Raises:
        UsageError: what cannot be asked of such an artifact, or an engine that is not installed.
        InputError: there is nothing that could be checked.
        HubError: the Hub refused, or was not reached.
    """
    for container in SUBJECTS:
        found = container.find(name, token)
        if found is not None:
            break
    container.refuse(engine, tensor_parallel)
    return container.open(name, found, weights=depth != "structure", token=token)
