"""Make artifacts of one source in one sweep; a failure of one does not stop the others."""

from __future__ import annotations

from collections.abc import Sequence

from qwen35.errors import Qwen35Error
from qwen35.pipeline.planned_artifacts import PlannedArtifact
from qwen35.progress import Progress
from qwen35.writing.write import WriteJob, write_all

__all__ = ["make_artifacts"]


def make_artifacts(
    artifacts: Sequence[PlannedArtifact], *, threads: int, device: str, progress: Progress
) -> dict[str, Qwen35Error]:
    """Write artifacts, replacing existing ones; return errors by artifact name.

    Args:
        artifacts: artifacts of one source.
        threads: number of step groups processed at a time.
        device: where weights are encoded.
        progress: receives bytes processed; a weight counts once per artifact.
    """
    # The caller has checked that existing outputs may be replaced.
    jobs = [WriteJob(artifact.plan, artifact.out, overwrite=True) for artifact in artifacts]
    _, errors = write_all(jobs, threads=threads, device=device, progress=progress)
    return {artifacts[number].name: error for number, error in errors.items()}
