"""Make artifacts of one source; what goes wrong with one does not stop the others."""

from __future__ import annotations

from collections.abc import Sequence

from qwen35.convert import convert
from qwen35.errors import Qwen35Error
from qwen35.gguf.plan import GgufPlan
from qwen35.gguf.write import write
from qwen35.pipeline.planned import Artifact
from qwen35.progress import Progress

__all__ = ["make_artifacts"]


def make_artifacts(
    artifacts: Sequence[Artifact], *, threads: int, device: str, progress: Progress
) -> dict[str, Qwen35Error]:
    """Write artifacts over whatever of theirs lies there; return what went wrong, by name.

    Whether they may be replaced was asked before.
    """
    failed: dict[str, Qwen35Error] = {}
    for artifact in artifacts:
        try:
            _make(artifact, threads, device, progress)
        except Qwen35Error as error:
            failed[artifact.name] = error
    return failed


def _make(artifact: Artifact, threads: int, device: str, progress: Progress) -> None:
    plan = artifact.plan
    if isinstance(plan, GgufPlan):
        write(plan, artifact.out, overwrite=True, threads=threads, progress=progress)
    else:
        convert(
            plan, artifact.out, overwrite=True, threads=threads, device=device, progress=progress
        )
