"""What the verbs that write FP8 share: how scales are chosen, and the check afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qwen35.checkpoint.open import describe
from qwen35.codecs.fp8.layout import ScaleChoice, ScaleMode
from qwen35.errors import UsageError
from qwen35.planning.activations import Activations, load_activations
from qwen35.planning.output_plan import Plan
from qwen35.progress import Progress

if TYPE_CHECKING:
    from qwen35.api.write_result import WriteResult
    from qwen35.verification.fp8_report import Fp8Report

__all__ = ["DEFAULTS", "Bands", "activations_of", "check_made", "check_unused", "scale_choice_of"]

Bands = Literal["derived", "documented"]

DEFAULTS = ScaleChoice()


def scale_choice_of(
    mode: ScaleMode | None, rms_factor: float, percentile: float, grid_size: int
) -> ScaleChoice | None:
    """Return the calibration asked for; None if no mode was.

    Raises:
        UsageError: a parameter makes no sense, or there is one without its mode.
    """
    scale_choice = ScaleChoice(mode or DEFAULTS.mode, rms_factor, percentile, grid_size)
    if mode is not None:
        return scale_choice
    if scale_choice != DEFAULTS:
        flags = "--rms-factor, --calib-percentile and --mse-grid-size"
        raise UsageError(flags, "mean nothing without their mode", hint="add --calib-mode")
    return None


def activations_of(path: str | Path | None) -> Activations | None:
    """Return the statistics in a file, if one was given."""
    return load_activations(Path(path)) if path else None


def check_unused(
    plan: Plan, *, bands: Bands | None, samples: int | None, seed: int, skip: bool
) -> None:
    """Refuse what says how to check FP8 weights, where none are encoded.

    Raises:
        UsageError: something was asked for that would have no effect.
    """
    asked = {
        "--bands": bands is not None,
        "--verify-samples": samples is not None,
        "--verify-seed": seed != 0,
        "--skip-verify": skip,
    }
    for flag, given in asked.items():
        if given and plan.settings is None:
            raise UsageError(flag, "nothing is encoded as FP8 here", hint="leave it out")


def check_made(
    made: WriteResult,
    *,
    bands: Bands | None,
    samples: int | None,
    seed: int,
    progress: Progress | None,
) -> Fp8Report:
    """Check an FP8 output against its source; what workers have checked is not read again.

    Arguments are those of `qwen35.verification.fp8_report.check_fp8`.
    """
    from qwen35.verification.fp8_report import check_fp8

    return check_fp8(
        describe(str(made.out.absolute()), lenient=True),
        made.plan.checkpoint,
        made.plan.settings,
        bands=bands or "derived",
        samples=samples,
        seed=seed,
        threads=made.threads,
        progress=progress,
        seen=made.compared,
    )
