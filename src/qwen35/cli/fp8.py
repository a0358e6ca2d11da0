"""What the commands that write FP8 share: calibration flags, and the report afterwards."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from qwen35.checkpoint.open import describe
from qwen35.cli.output import Output
from qwen35.cli.shared import count
from qwen35.codecs.fp8 import Calibration, Mode
from qwen35.errors import UsageError
from qwen35.plan.activations import Activations, load_activations
from qwen35.plan.plan import Plan

if TYPE_CHECKING:
    from qwen35.verify.fp8_report import Report

__all__ = ["EXIT_FINDINGS", "activations_for", "add_calibration", "calibration_for", "report"]

EXIT_FINDINGS = 1
_DEFAULTS = Calibration()


def add_calibration(
    parser: argparse.ArgumentParser, mode: Mode | None, samples: int | None
) -> None:
    """Add the flags that choose FP8 scales and the check afterwards.

    Args:
        parser: to add to.
        mode: the default of --calib-mode; None if it may be left out.
        samples: the default of --verify-samples; None for every weight.
    """
    group = parser.add_argument_group("FP8")

    def add(name: str, **options: object) -> None:
        spellings = dict.fromkeys((name, "--" + name[2:].replace("-", "_")))
        group.add_argument(*spellings, **options)  # type: ignore[arg-type]

    shown = mode or f"{_DEFAULTS.mode} with an FP8 recipe"
    add(
        "--calib-mode",
        choices=get_args(Mode),
        default=mode,
        help=f"how the scale of a tile is chosen (default: {shown})",
    )
    add(
        "--rms-factor",
        type=float,
        default=_DEFAULTS.rms_factor,
        metavar="K",
        help="mode rms: peak-to-RMS factor (default: %(default)s)",
    )
    add(
        "--calib-percentile",
        type=float,
        default=_DEFAULTS.percentile,
        metavar="P",
        help="mode percentile: what lies beyond saturates (default: %(default)s)",
    )
    add(
        "--mse-grid-size",
        type=int,
        default=_DEFAULTS.grid_size,
        metavar="N",
        help="mode mse: scales tried (default: %(default)s)",
    )
    add(
        "--activation-stats",
        type=Path,
        metavar="FILE",
        help="JSON of activation statistics that weigh the columns (rms, mse, search)",
    )
    every = "every one" if samples is None else str(samples)
    add(
        "--verify-samples",
        type=count,
        default=samples,
        metavar="N",
        help=f"FP8 weights to check in each file (default: {every})",
    )
    add("--verify-seed", type=int, default=0, metavar="N", help="chooses the samples")
    add("--skip-verify", action="store_true", help="do not check the output")
    add(
        "--bands",
        choices=("derived", "documented"),
        default="derived",
        help="derived: from the format; documented: absolute limits (default: derived)",
    )


def calibration_for(args: argparse.Namespace) -> Calibration | None:
    """Return the calibration asked for; None if no mode was.

    Raises:
        UsageError: a parameter makes no sense, or there is one without its mode.
    """
    parameters = args.rms_factor, args.calib_percentile, args.mse_grid_size
    calibration = Calibration(args.calib_mode or _DEFAULTS.mode, *parameters)
    if args.calib_mode is not None:
        return calibration
    if calibration != _DEFAULTS:
        flags = "--rms-factor, --calib-percentile and --mse-grid-size"
        raise UsageError(flags, "mean nothing without their mode", hint="add --calib-mode")
    return None


def activations_for(args: argparse.Namespace) -> Activations | None:
    """Return the statistics asked for."""
    return load_activations(args.activation_stats) if args.activation_stats else None


def report(plan: Plan, out: Path, args: argparse.Namespace, output: Output) -> Report | None:
    """Check an FP8 output against its source; None if it is not FP8, or if not asked to."""
    from qwen35.verify.fp8_report import check_fp8

    if plan.calibration is None or args.skip_verify:
        return None
    return check_fp8(
        describe(str(out.absolute()), lenient=True),
        plan.checkpoint,
        plan.calibration,
        bands=args.bands,
        samples=args.verify_samples,
        seed=args.verify_seed,
        threads=args.threads,
        progress=output.progress(),
    )
