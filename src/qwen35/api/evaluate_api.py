"""Measure the divergence of quantized models from the unquantized one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.checkpoint.open import hub_token
from qwen35.progress import Progress

if TYPE_CHECKING:
    from qwen35.evaluation.evaluation_job import EvaluationJob
    from qwen35.evaluation.evaluation_report import EvaluationReport

__all__ = ["evaluate", "prepared", "state_of"]


def evaluate(
    base: str | Path,
    candidates: Sequence[str | Path] = (),
    *,
    text: str | Path | None = None,
    context: int | None = None,
    chunks: int | None = None,
    report: str | Path | None = None,
    overwrite: bool = False,
    resume: str | Path | None = None,
    kl_divergence_base: str | Path | None = None,
    cache: str | Path | None = None,
    unquantized: str | Path | None = None,
    speed: bool = False,
    device: str = "auto",
    threads: int | None = None,
    memory: int | None = None,
    hf_token: str | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Measure perplexity and KL divergence of candidates; without any, the base's perplexity.

    Args:
        base: folder, Hub id or GGUF file of the unquantized model.
        candidates: folders, Hub ids, GGUF files or folders of them, ``hf:owner/name/path``.
        text: the text file to measure on; optional if `kl_divergence_base` is read.
        context: tokens per chunk; 512 if None.
        chunks: the largest number of chunks; the whole text if None.
        report: folder to write report.json and report.html to.
        overwrite: replace an existing report.
        resume: file that holds results until the run is complete, to resume from; by default
            beside the report.
        kl_divergence_base: a llama-perplexity file: read instead of running the base if it
            exists, otherwise written.
        cache: the same in a compact format.
        unquantized: the base in the other engine's format, for the noise floor between engines.
        speed: also measure tokens per second of GGUF candidates.
        device: for transformers: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: number of threads; all processors if None.
        memory: refuse to use more than this many bytes.
        hf_token: for the Hub; by default HF_TOKEN.
        progress: receives chunks.

    Raises:
        UsageError: arguments are missing or contradict each other, or a library is not installed.
        InputError: an input cannot be read, compared or run.
        OutputError: the report exists, or the disk is full.
        HubError: the Hub refused a request or could not be reached.
    """
    from qwen35.evaluation.evaluation_run import run
    from qwen35.reporting.report_files import write_report

    job = prepared(
        base,
        candidates,
        text=text,
        context=context,
        chunks=chunks,
        report=report,
        overwrite=overwrite,
        resume=resume,
        kl_divergence_base=kl_divergence_base,
        cache=cache,
        unquantized=unquantized,
        device=device,
        threads=threads,
        memory=memory,
        hf_token=hf_token,
    )
    result = run(job, speed=speed, state=state_of(resume, report), progress=progress)
    if report is not None:
        write_report(result, Path(report))
    return result


def prepared(
    base: str | Path,
    candidates: Sequence[str | Path],
    *,
    text: str | Path | None,
    context: int | None,
    chunks: int | None,
    report: str | Path | None,
    overwrite: bool,
    resume: str | Path | None,
    kl_divergence_base: str | Path | None,
    cache: str | Path | None,
    unquantized: str | Path | None,
    device: str,
    threads: int | None,
    memory: int | None,
    hf_token: str | None,
) -> EvaluationJob:
    """Prepare an evaluation without running it; arguments and errors as for `evaluate`."""
    from qwen35.evaluation.chunk_sweep import check_state
    from qwen35.evaluation.evaluation_job import EvaluationRequest, prepare
    from qwen35.reporting.report_files import check_report

    if report is not None:
        check_report(Path(report), overwrite=overwrite)
    if state := state_of(resume, report):
        check_state(state)
    request = EvaluationRequest(
        base=str(base),
        candidates=tuple(map(str, candidates)),
        text=Path(text) if text else None,
        context=context or 0,
        chunks=chunks or 0,
        threads=threads or 0,
        device=device,
        unquantized=str(unquantized) if unquantized else None,
        kld_file=Path(kl_divergence_base) if kl_divergence_base else None,
        cache=Path(cache) if cache else None,
        memory=memory or 0,
        token=hub_token(hf_token),
    )
    return prepare(request)


def state_of(resume: str | Path | None, report: str | Path | None) -> Path | None:
    """Return the file of an unfinished evaluation's results, by default beside a report.

    None if there is neither.
    """
    if resume or report is None:
        return Path(resume) if resume else None
    path = Path(report)
    return path.absolute().with_name(f".{path.name}.evaluation")
