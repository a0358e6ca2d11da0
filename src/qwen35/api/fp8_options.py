"""Options that the verbs writing FP8 share: the choice of scales and the final check."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qwen35.api.given_values import refuse_given
from qwen35.checkpoint.open import describe
from qwen35.codecs.fp8.layout import ScaleChoice, ScaleMode
from qwen35.errors import UsageError
from qwen35.planning.activations import Activations, load_activations
from qwen35.planning.output_plan import Plan
from qwen35.progress import Progress

if TYPE_CHECKING:
    from qwen35.api.write_result import WriteResult
    from qwen35.verification.fp8_report import Fp8Report

__all__ = [
    "DEFAULTS",
    "Bands",
    "KvCache",
    "activations_of",
    "check_fp8_output",
    "check_unused",
    "scale_choice_of",
]

Bands = Literal["derived", "documented"]
KvCache = Literal["fp8"]

DEFAULTS = ScaleChoice()


def scale_choice_of(
    mode: ScaleMode | None, rms_factor: float, percentile: float, grid_size: int
) -> ScaleChoice | None:
    """Return the choice of scales; None without a mode.

    Raises:
        UsageError: a parameter is invalid, or given without its mode.
    """
    scale_choice = ScaleChoice(mode or DEFAULTS.mode, rms_factor, percentile, grid_size)
    if mode is not None:
        return scale_choice
    if scale_choice != DEFAULTS:
        flags = "--rms-factor, --calib-percentile and --mse-grid-size"
        raise UsageError(flags, "have no effect without their mode", hint="add --calib-mode")
    return None


def activations_of(
    path: str | Path | None, scale_choice: ScaleChoice | None, *, needed: bool = False
) -> Activations | None:
    """Return the statistics in a file, if there is one.

    They are not read for modes that ignore them, unless they are `needed` for something else.
    """
    if not path:
        return None
    if not needed and scale_choice is not None and not scale_choice.weighted:
        return Activations(Path(path).name, "", {})
    return load_activations(Path(path))


def check_unused(
    plan: Plan, *, bands: Bands | None, samples: int | None, seed: int, skip: bool
) -> None:
    """Refuse options of the FP8 check if no weight is encoded as FP8.

    Raises:
        UsageError: an option would have no effect.
    """
    flags = {
        "--bands": bands is not None,
        "--verify-samples": samples is not None,
        "--verify-seed": seed != 0,
        "--skip-verify": skip,
    }
    if not plan.banded:
        refuse_given(flags, "nothing is encoded as FP8 here")


def check_fp8_output(
    result: WriteResult,
    *,
    bands: Bands | None,
    samples: int | None,
    seed: int,
    progress: Progress | None,
) -> Fp8Report:
    """Check an FP8 output against its source; weights checked by workers are not read again.

    Arguments as for `qwen35.verification.fp8_report.check_fp8`.
    """
    from qwen35.verification.fp8_report import check_fp8

    return check_fp8(
        describe(str(result.out.absolute()), lenient=True),
        result.plan.checkpoint,
        result.plan.settings,
        bands=bands or "derived",
        samples=samples,
        seed=seed,
        threads=result.threads,
        progress=progress,
        seen=result.compared,
    )
