"""Statistics of what a model's weights read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.calibration.calibration_plan import (
    CalibrationPlan,
    CalibrationRequest,
    Dtype,
    make_plan,
)
from qwen35.calibration.sums import FLOOR
from qwen35.calibration.text_windows import read_text
from qwen35.checkpoint.open import describe, fetch
from qwen35.checkpoint.source import Checkpoint
from qwen35.progress import Progress

if TYPE_CHECKING:
    from qwen35.calibration.calibration_run import CalibrationResult

__all__ = ["calibrate", "planned"]


def calibrate(
    model: str | Path,
    *,
    text: str | Path | Sequence[str | Path],
    output: str | Path,
    context: int = 512,
    windows: int | None = None,
    floor: int = FLOOR,
    dat: bool = False,
    dtype: Dtype = "auto",
    device: str = "auto",
    threads: int | None = None,
    memory: int | None = None,
    overwrite: bool = False,
    hf_token: str | None = None,
    progress: Progress | None = None,
) -> CalibrationResult:
    """Run text through a model and write activation statistics and an importance matrix.

    One decoder layer is in memory at a time; an interrupted run goes on where it was.

    Args:
        model: folder or Hub id (``owner/name[@revision]``).
        text: plain text files, UTF-8.
        output: folder to write.
        context: tokens of a window.
        windows: at most so many; all of the text if None.
        floor: experts that fewer tokens reach are filled up from the average of their layer.
        dat: write the older imatrix.dat as well.
        dtype: to compute in; ``auto`` is bfloat16 for a bfloat16 checkpoint, else float32.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        threads: of torch.
        memory: smaller batches to stay below so many bytes.
        overwrite: replace an output of qwen35, or the interrupted run of another call.
        hf_token: for the Hub; by default HF_TOKEN.
        progress: told of the bytes worked through.

    Raises:
        UsageError: something does not fit, or torch or transformers is not installed.
        InputError: the model or the text cannot be read.
        OutputError: the output exists, or the disk is full.
        HubError: the Hub refused, or was not reached.
    """
    from qwen35.calibration.calibration_run import calibrate as carry_out
    from qwen35.calibration.calibration_run import check_before

    output = Path(output)
    check_before(output, overwrite=overwrite, device=device)
    plan = planned(
        model,
        text=text,
        context=context,
        windows=windows,
        asked=CalibrationRequest(dtype, floor, dat, memory),
        token=hf_token,
    )
    return carry_out(
        plan, output, overwrite=overwrite, threads=threads, device=device, progress=progress
    )


def planned(
    model: str | Path,
    *,
    text: str | Path | Sequence[str | Path],
    context: int,
    windows: int | None,
    asked: CalibrationRequest,
    token: str | None,
    headers_only: bool = False,
) -> CalibrationPlan:
    """Plan a calibration; arguments and errors as for `calibrate`.

    With `headers_only` no weights are fetched, and the plan cannot be carried out.
    """
    opened = describe if headers_only else fetch
    checkpoint: Checkpoint = opened(str(model), token=token)
    files = [text] if isinstance(text, str | Path) else text
    tokens = read_text(checkpoint, [Path(file) for file in files], context=context, windows=windows)
    return make_plan(checkpoint, tokens, asked)
