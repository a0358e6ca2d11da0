"""Collect statistics of the inputs of a model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.api.argument_kinds import plain_arguments
from qwen35.api.given_values import listed, size_given
from qwen35.api.worker_choice import check_workers, pool_of, threads_each
from qwen35.calibration.calibration_plan import (
    CalibrationPlan,
    CalibrationRequest,
    Dtype,
    make_plan,
)
from qwen35.calibration.sums import FLOOR
from qwen35.calibration.text_windows import read_text
from qwen35.execution.failures import Work
from qwen35.planning.merged_source import opened_adapters, opened_source
from qwen35.progress import Progress

if TYPE_CHECKING:
    from qwen35.calibration.calibration_run import CalibrationResult

__all__ = ["calibrate", "planned"]


@plain_arguments
def calibrate(
    model: str | Path,
    *,
    text: str | Path | Sequence[str | Path],
    output: str | Path,
    adapter: str | Path | Sequence[str | Path] = (),
    onto: str | None = None,
    context: int = 512,
    chunks: int | None = None,
    floor: int = FLOOR,
    dat: bool = False,
    draft: bool = False,
    hessian: bool = False,
    mtp_from: str | Path | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    threads: int | None = None,
    memory: int | str | None = None,
    workers: int | None = None,
    ray_address: str | None = None,
    overwrite: bool = False,
    hf_token: str | None = None,
    progress: Progress | None = None,
) -> CalibrationResult:
    """Run text through a model and write activation statistics and an importance matrix.

    One decoder layer is in memory at a time; an interrupted run resumes.

    Args:
        model: folder, GGUF file, Hub id (``owner/name[@revision]``) or ``hf:owner/name/path``; not
            quantized.
        text: plain text files, UTF-8.
        output: folder to write.
        adapter: LoRA adapters of peft to merge: folders, as ``DIR`` or ``DIR=WEIGHT``.
        onto: merge them into the weights as this format holds them, such as ``nf4``.
        context: tokens per chunk.
        chunks: the largest number of chunks; the whole text if None.
        floor: fill up experts that fewer tokens reach from the average of their layer.
        dat: also write the older imatrix.dat.
        draft: also measure how often what the MTP layer drafts is accepted.
        hessian: also write the Hessians of all inputs, for refined codes.
        mtp_from: take the MTP layer of this checkpoint, the original of a model saved without it.
        dtype: for computation; ``auto`` is bfloat16 for a bfloat16 checkpoint, otherwise float32.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        threads: number of torch threads, of each worker.
        memory: use smaller batches to stay below this many bytes, or ``4GB``; shared by `workers`.
        workers: number of processes that chunks are shared out to.
        ray_address: share them out on this Ray cluster.
        overwrite: replace an output of qwen35, or the interrupted run of another call.
        hf_token: for the Hub; by default HF_TOKEN.
        progress: receives bytes processed.

    Raises:
        WorkerError: the workers of some chunks died at every attempt.
        UsageError: an argument does not fit, or torch or transformers is not installed.
        InputError: the model or the text cannot be read.
        OutputError: the output exists, or the disk is full.
        HubError: the Hub refused a request or could not be reached.
    """
    from qwen35.calibration.calibration_run import calibrate as carry_out
    from qwen35.calibration.calibration_run import check_before, device_for

    output = Path(output)
    given = size_given("--memory", memory)
    check_workers(workers, ray_address, None, given)
    # The devices of a cluster are not those of this machine.
    check_before(output, overwrite=overwrite, device="cpu" if ray_address else device)
    plan = planned(
        model,
        text=text,
        context=context,
        chunks=chunks,
        request=CalibrationRequest(
            dtype,
            floor,
            dat,
            given,
            draft,
            hessian,
            workers or 1,
            threads_each(workers, ray_address, threads),
        ),
        adapter=listed(adapter),
        onto=onto,
        mtp_from=mtp_from,
        token=hf_token,
    )
    own = device if workers is None and ray_address is None else "cpu"
    others = device if ray_address else device_for(device)
    with pool_of(
        workers, ray_address, device=others, threads=threads, work=_calibration_work
    ) as pool:
        return carry_out(
            plan,
            output,
            overwrite=overwrite,
            threads=threads,
            device=own,
            pool=pool,
            progress=progress,
        )


def _calibration_work() -> tuple[str, Work]:
    from qwen35.calibration.share_worker import MODULE, answer

    return MODULE, answer


def planned(
    model: str | Path,
    *,
    text: str | Path | Sequence[str | Path],
    context: int,
    chunks: int | None,
    request: CalibrationRequest,
    adapter: Sequence[str | Path] = (),
    onto: str | None = None,
    mtp_from: str | Path | None = None,
    token: str | None,
    headers_only: bool = False,
) -> CalibrationPlan:
    """Plan a calibration; arguments and errors as for `calibrate`.

    With `headers_only`, no weights are fetched and the plan cannot be run.
    """
    adapters = opened_adapters(adapter, onto)
    checkpoint = opened_source(model, adapters, mtp_from, headers=headers_only, token=token)
    files = [text] if isinstance(text, str | Path) else text
    tokens = read_text(checkpoint, [Path(file) for file in files], context=context, windows=chunks)
    return make_plan(checkpoint, tokens, request)
