"""Find the recipe with the least loss under a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.api.argument_kinds import plain_arguments
from qwen35.api.given_values import listed, size_given
from qwen35.api.worker_choice import check_workers, pool_of
from qwen35.execution.dispatch import WorkerPool
from qwen35.execution.failures import Work
from qwen35.progress import Progress, Silent

if TYPE_CHECKING:
    from qwen35.tuning.formats import Engine
    from qwen35.tuning.tuning_job import TuningResult
    from qwen35.tuning.tuning_request import Format, TuningRequest

__all__ = ["carry_out", "tune", "types_of"]


@plain_arguments
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
    active: bool = False,
    engine: Engine | None = None,
    types: str | Sequence[str] | None = None,
    imatrix: str | Path | None = None,
    hessian: str | Path | None = None,
    measurements: str | Path | None = None,
    start_from: str | Path | None = None,
    probes: int = 0,
    sample: int = 1,
    chunks: int | None = None,
    context: int = 512,
    explicit: bool = False,
    report: str | Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    memory: int | str | None = None,
    workers: int | None = None,
    ray_address: str | None = None,
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
        active: sizes are those of what computing one token reads, of a few experts.
        engine: whose rounding of inputs counts: ``llama.cpp`` (the default for GGUF) or
            ``weights``, nobody's.
        types: GGUF: types to choose from, as names or as a comma-separated string.
        imatrix: GGUF: importance matrix: a file, or ``hf:owner/name/path``.
        hessian: folder of `calibrate` with Hessians: price codes that are refined by them.
        measurements: file to save measurements to and resume from; by default the recipe's name
            with .json.
        start_from: measurements of the model that this one was tuned from.
        probes: as a check, write and measure so many models: the result, and its dearest groups
            alone.
        sample: compare types on every so many rows.
        chunks: number of chunks of the text to measure on; None for 16, or 32 of a mixture of
            experts.
        context: tokens per chunk.
        explicit: write a rule for every role in every layer.
        report: folder to write tune.json and tune.html to.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        threads: number of threads, of each worker; all processors if None.
        memory: read experts one by one to stay below this many bytes, or ``4GB``; shared
            by `workers`.
        workers: number of processes that chunks and rows of weights are shared out to.
        ray_address: share them out on this Ray cluster.
        overwrite: replace the recipe or report, or the interrupted run of another call.
        hf_token: for the Hub; by default HF_TOKEN.
        progress: receives bytes, then probes.

    Raises:
        WorkerError: the workers of a job died at every attempt.
        UsageError: the budget cannot be met, or arguments contradict each other.
        InputError: the model, the text or the matrix cannot be read.
        OutputError: the report exists, or the disk is full.
        HubError: the Hub refused a request or could not be reached.
    """
    from qwen35.tuning.tuning_request import TuningRequest

    request = TuningRequest(
        model=str(model),
        format=format,
        text=Path(text),
        size=size,
        max_kld=max_kld,
        active=active,
        engine=engine,
        output=Path(output),
        adapter=tuple(map(str, listed(adapter))),
        onto=onto,
        types=types_of(types),
        imatrix=str(imatrix) if imatrix else None,
        hessian=Path(hessian) if hessian else None,
        measurements=Path(measurements) if measurements else None,
        start_from=Path(start_from) if start_from else None,
        probes=probes,
        sample=sample,
        memory=size_given("--memory", memory),
        chunks=chunks,
        context=context,
        explicit=explicit,
        device=device,
        threads=threads,
        workers=workers,
        ray_address=ray_address,
        overwrite=overwrite,
        token=hf_token,
    )
    return carry_out(request, report, lambda _: progress or Silent())


def carry_out(
    request: TuningRequest, report: str | Path | None, progress: Callable[[str], Progress]
) -> TuningResult:
    """Run a tuning; `progress` makes a progress display for a unit. Errors as for `tune`."""
    from qwen35.tuning.tuning_job import prepare, run

    check_workers(request.workers, request.ray_address, None, request.memory)
    if report is None:
        with _pool(request) as pool:
            return run(prepare(request), progress, pool)
    from qwen35.reporting.report_files import check_report
    from qwen35.reporting.tuning_page import TUNE_NAMES, write_tuning

    check_report(Path(report), overwrite=request.overwrite, names=TUNE_NAMES)
    with _pool(request) as pool:
        result = run(prepare(request), progress, pool)
    write_tuning(Path(report), result)
    return result


def _pool(request: TuningRequest) -> AbstractContextManager[WorkerPool | None]:
    """Return the workers that measure prices."""
    if request.workers is None and request.ray_address is None:
        return nullcontext()
    from qwen35.calibration.calibration_run import device_for

    device = request.device if request.ray_address else device_for(request.device)
    return pool_of(
        request.workers,
        request.ray_address,
        device=device,
        threads=request.threads,
        work=_pricing_work,
    )


def _pricing_work() -> tuple[str, Work]:
    from qwen35.tuning.price_worker import MODULE, answer

    return MODULE, answer


def types_of(types: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return names of types from a sequence or a comma-separated string."""
    return tuple(types.split(",") if isinstance(types, str) else types or ())
