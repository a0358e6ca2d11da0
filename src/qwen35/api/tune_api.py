"""The recipe that loses least under a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
    """Find the recipe that loses least at a given size, or takes least at a given loss.

    Args:
        model: folder or Hub id (``owner/name[@revision]``).
        format: of the artifact: ``gguf``, ``nf4`` or ``fp8``.
        text: to measure on.
        output: recipe to write (.toml).
        size: of the weight files, at most: bytes, or ``4.5bpw``, ``3.2GB``, ``800MiB``.
        max_kld: mean divergence on the text, at most, in nats; instead of a size.
        types: GGUF: types to choose from, as names or as one text with commas.
        imatrix: GGUF: importance matrix: a file, or ``hf:owner/name/path``.
        measurements: keep what is measured here and go on from it; by default the recipe's name
            with .json.
        start_from: measurements of the model that this one was tuned from.
        probes: groups to measure at most; 0 for squared errors alone.
        chunks: of the text, to measure on.
        context: tokens a chunk.
        explicit: a rule for every role in every layer.
        report: folder to write tune.json and tune.html to.
        device: for transformers (NF4, FP8).
        threads: at most so many; all processors if None.
        overwrite: replace the recipe or report.
        hf_token: for the Hub; by default HF_TOKEN.
        progress: told of weights, then of probes.

    Raises:
        UsageError: the budget cannot be kept to, or arguments contradict.
        InputError: the model, the text or the matrix cannot be read.
        OutputError: there is a report already, or the disk is full.
        HubError: the Hub refused, or was not reached.
    """
    from qwen35.tuning.tuning_job import TuningRequest

    asked = TuningRequest(
        model=str(model),
        format=format,
        text=Path(text),
        size=size,
        max_kld=max_kld,
        output=Path(output),
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
    return carry_out(asked, report, lambda _: progress or Silent())


def carry_out(
    asked: TuningRequest, report: str | Path | None, progress: Callable[[str], Progress]
) -> TuningResult:
    """Tune as asked; `progress` makes progress that counts a unit. Errors are those of `tune`."""
    from qwen35.tuning.tuning_job import prepare, run

    if report is None:
        return run(prepare(asked), progress)
    from qwen35.reporting.report_files import check_report
    from qwen35.reporting.tuning_page import TUNE_NAMES, write_tuning

    check_report(Path(report), overwrite=asked.overwrite, names=TUNE_NAMES)
    found = run(prepare(asked), progress)
    write_tuning(Path(report), found.measured.name, found.space, found.tuned, found.measured)
    return found


def types_of(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return names of types, given as such or as one text with commas."""
    return tuple(given.split(",") if isinstance(given, str) else given or ())
