"""Open an artifact, of whatever container, from what the user typed."""

from __future__ import annotations

from qwen35.verification.gguf_subject import GgufSubject
from qwen35.verification.safetensors_subject import CheckpointSubject
from qwen35.verification.subject import Depth, Engine, Subject

__all__ = ["SUBJECTS", "open_artifact"]

SUBJECTS: tuple[type[Subject], ...] = (GgufSubject, CheckpointSubject)
"""All containers that can be checked; the last one takes whatever the others do not."""


def open_artifact(
    name: str,
    depth: Depth = "structure",
    *,
    engine: Engine | None = None,
    tensor_parallel: int | None = None,
    token: str | None = None,
) -> Subject:
    """Open an artifact for a check; faults in it become findings of the check.

    Args:
        name: folder, GGUF file, Hub id or ``hf:owner/name/path``.
        depth: depth of the check; beyond ``structure``, weights on the Hub are downloaded.
        engine: the engine to ask it in.
        tensor_parallel: number of GPUs that must be able to split its weights.
        token: access token of the Hub.

    Raises:
        UsageError: an option does not apply to the artifact, or the engine is not installed.
        InputError: there is nothing to check.
        HubError: the Hub refused, or was not reached.
    """
    for container in SUBJECTS:
        found = container.find(name, token)
        if found is not None:
            break
    container.refuse(engine, tensor_parallel)
    return container.open(name, found, weights=depth != "structure", token=token)
