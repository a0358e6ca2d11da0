"""The evaluation step of a run: its candidates and its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qwen35.checkpoint.source import Checkpoint
from qwen35.errors import Finding
from qwen35.pipeline.planned_artifacts import PlannedArtifact
from qwen35.pipeline.run_request import MeasurementRequest
from qwen35.progress import Progress

__all__ = ["candidates", "measure"]


def candidates(artifacts: Sequence[PlannedArtifact]) -> list[Path]:
    """Return the paths to measure: each artifact's folder, or its GGUF models."""
    return [path for a in artifacts for path in a.plan.container.models(a.out)]


def measure(
    source: Checkpoint,
    compared: Sequence[Path],
    measurement: MeasurementRequest,
    folder: Path,
    *,
    threads: int,
    device: str,
    memory: int | None,
    token: str | None,
    progress: Progress,
) -> list[Finding]:
    """Measure how far artifacts are from their source; write report.json and report.html.

    Returns its findings: figures that an unquantized model cannot have.

    An interrupted measurement resumes from a file beside `folder`.

    Args:
        source: the unquantized source, with its adapters.
        compared: the result of `candidates`.
        measurement: the text to measure on.
        folder: the report's folder.
        threads: for engines and statistics.
        device: for transformers; of several, the first is used.
        memory: models run layer by layer if they would take more bytes.
        token: access token for the Hub.
        progress: receives chunks.

    Raises:
        InputError: a model or the text cannot be read, compared or run.
        UsageError: a library is missing.
    """
    # Late: runs that measure nothing do not load these.
    from qwen35.evaluation.evaluation_job import EvaluationRequest, prepare
    from qwen35.evaluation.evaluation_run import run
    from qwen35.reporting.report_files import write_report

    base = f"{source.repo}@{source.revision}" if source.repo else str(source.folder())
    request = EvaluationRequest(
        base,
        tuple(map(str, compared)),
        measurement.text,
        chunks=measurement.chunks,
        adapters=source.adapters,
        threads=threads,
        device=device.split(",")[0],
        streamed=measurement.streamed,
        llama_inputs=bool(measurement.simulate),
        token=token,
    )
    job = prepare(request)
    if memory is not None and job.stream is None and job.memory > memory:
        # With the least that a pass takes: what was made is not lost for a little memory.
        job = prepare(replace(request, streamed=True))
    state = folder.absolute().with_name(f".{folder.name}.evaluation")
    report = run(job, state=state, progress=progress)
    write_report(report, folder)
    return report.findings
