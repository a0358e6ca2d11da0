"""Evaluation as a step of a run: what is compared, and where the report goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwen35.checkpoint.source import Checkpoint
from qwen35.pipeline.planned_artifacts import PlannedArtifact
from qwen35.pipeline.run_request import MeasurementRequest
from qwen35.progress import Progress

__all__ = ["candidates", "measure"]


def candidates(artifacts: Sequence[PlannedArtifact]) -> list[Path]:
    """Return what is measured: the folder of each artifact, or each of its GGUF models."""
    return [path for a in artifacts for path in a.plan.container.models(a.out)]


def measure(
    source: Checkpoint,
    compared: Sequence[Path],
    measuring: MeasurementRequest,
    folder: Path,
    *,
    threads: int,
    device: str,
    token: str | None,
    progress: Progress,
) -> None:
    """Measure how far artifacts are from their source; write report.json and report.html.

    An interrupted measurement goes on where it was (a file beside `folder`).

    Args:
        source: what they were made from, unquantized.
        compared: what `candidates` found.
        measuring: on what.
        folder: where the report goes.
        threads: of engines and statistics.
        device: for transformers; the first of several.
        token: for the Hub.
        progress: told of the chunks.

    Raises:
        InputError: something cannot be read, compared or run.
        UsageError: a library is missing.
    """
    from qwen35.evaluation.evaluation_run import evaluate
    from qwen35.reporting.report_files import write_report

    base = f"{source.repo}@{source.revision}" if source.repo else str(source.folder())
    report = evaluate(
        base,
        [str(path) for path in compared],
        measuring.text,
        chunks=measuring.chunks,
        state=folder.absolute().with_name(f".{folder.name}.evaluation"),
        threads=threads,
        device=device.split(",")[0],
        token=token,
        progress=progress,
    )
    write_report(report, folder)
