"""Find the recipe with the least loss under a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.api.given_values import listed
from qwen35.progress import Progress, Silent

if TYPE_CHECKING:
    from qwen35.tuning.tuning_job import Format, TuningRequest, TuningResult

__all__ = ["carry_out", "tune", "types_of"]


def tune(
    model: str | Path,
    *,
    format: Format,  # noqa: A002 - the flag's name
    text: str | Path,
    output: str | Path,
    adapter: str | Path | Sequence[str | Path] = (),
    onto: str | None = None,
    size: str | int | None = None,
    max_kld: float | None = None,
    types: str | Sequence[str] | None = None,
    imatrix: str | Path | None = None,
    measurements: str | Path | None = None,
    start_from: str | Path | None = None,
    probes: int = 120,
    chunks: int = 8,
    context: int = 512,
    explicit: bool = False,
    report: str | Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    hf_token: str | None = None,
    progress: Progress | None = None,
) -> TuningResult:
    """Find the recipe with the least loss at a given size, or the smallest at a given loss.

    Args:
        model: folder, GGUF file, Hub id (``owner/name[@revision]``) or ``hf:owner/name/path``.
        format: of the artifact, ``gguf``, ``nf4`` or ``fp8``.
        text: the text to measure on.
        output: recipe to write (.toml).
        adapter: LoRA adapters of peft to merge: folders, as ``DIR`` or ``DIR=WEIGHT``.
        onto: merge them into the weights as this format holds them, such as ``nf4``.
        size: the largest size of the weight files: bytes, or ``4.5bpw``, ``3.2GB``, ``800MiB``.
        max_kld: the largest mean divergence on the text, in nats; instead of a size.
        types: GGUF: types to choose from, as names or as a comma-separated string.
        imatrix: GGUF: importance matrix: a file, or ``hf:owner/name/path``.
        measurements: file to save measurements to and resume from; by default the recipe's name
            with .json.
        start_from: measurements of the model that this one was tuned from.
        probes: the largest number of groups to measure; 0 for squared errors alone.
        chunks: number of chunks of the text to measure on.
        context: tokens per chunk.
        explicit: write a rule for every role in every layer.
        report: folder to write tune.json and tune.html to.
        device: for transformers, which runs every format but GGUF.
        threads: number of threads; all processors if None.
        overwrite: replace the recipe or report.
        hf_token: for the Hub; by default HF_TOKEN.
        progress: receives weights, then probes.

    Raises:
        UsageError: the budget cannot be met, or arguments contradict each other.
        InputError: the model, the text or the matrix cannot be read.
        OutputError: the report exists, or the disk is full.
        HubError: the Hub refused a request or could not be reached.
    """
    from qwen35.tuning.tuning_job import TuningRequest

    request = TuningRequest(
        model=str(model),
        format=format,
        text=Path(text),
        size=size,
        max_kld=max_kld,
        output=Path(output),
        adapter=tuple(map(str, listed(adapter))),
        onto=onto,
        types=types_of(types),
        imatrix=str(imatrix) if imatrix else None,
        measurements=Path(measurements) if measurements else None,
        start_from=Path(start_from) if start_from else None,
        probes=probes,
        chunks=chunks,
        context=context,
        explicit=explicit,
        device=device,
        threads=threads,
        overwrite=overwrite,
        token=hf_token,
    )
    return carry_out(request, report, lambda _: progress or Silent())


def carry_out(
    request: TuningRequest, report: str | Path | None, progress: Callable[[str], Progress]
) -> TuningResult:
    """Run a tuning; `progress` makes a progress display for a unit. Errors as for `tune`."""
    from qwen35.tuning.tuning_job import prepare, run

    if report is None:
        return run(prepare(request), progress)
    from qwen35.reporting.report_files import check_report
    from qwen35.reporting.tuning_page import TUNE_NAMES, write_tuning

    check_report(Path(report), overwrite=request.overwrite, names=TUNE_NAMES)
    result = run(prepare(request), progress)
    write_tuning(Path(report), result.measured.name, result.space, result.tuned, result.measured)
    return result


def types_of(types: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return names of types from a sequence or a comma-separated string."""
    return tuple(types.split(",") if isinstance(types, str) else types or ())
