"""The flags for the choice of scales, and for the final check of block FP8."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import get_args

from qwen35.api.fp8_options import DEFAULTS, Bands
from qwen35.cli.shared_flags import count
from qwen35.codecs.fp8.layout import ScaleMode

__all__ = ["add_scale_choice"]

_WEIGHING = "statistics of inputs, from `qwen35 calibrate`: they weigh columns (rms, mse, search)"
_STATISTICS_HELP = f"{_WEIGHING}, and are required for --activations, --kv-cache and ModelOpt's FP8"


def add_scale_choice(
    parser: argparse.ArgumentParser, mode: ScaleMode | None, samples: int | None
) -> None:
    """Add the flags for scales and the final check of block FP8.

    Args:
        parser: the parser.
        mode: the default of --calib-mode; None where formats other than block FP8 are written too.
        samples: the default of --verify-samples; None for every weight.
    """
    _add_scales(parser.add_argument_group("scales"), mode)
    _add_check(parser.add_argument_group("check of block FP8"), samples)


def _add(group: argparse._ArgumentGroup, name: str, **options: object) -> None:
    """Add a flag under both spellings, with hyphens and with underscores."""
    spellings = dict.fromkeys((name, "--" + name[2:].replace("-", "_")))
    group.add_argument(*spellings, **options)  # type: ignore[arg-type]


def _add_scales(group: argparse._ArgumentGroup, mode: ScaleMode | None) -> None:
    others = "; NVFP4 and INT4: search or max" if mode is None else ""
    add = partial(_add, group)
    add(
        "--calib-mode",
        choices=get_args(ScaleMode),
        default=mode,
        help=f"how to choose a scale{others} (default: {mode or DEFAULTS.mode})",
    )
    add(
        "--rms-factor",
        type=float,
        default=DEFAULTS.rms_factor,
        metavar="K",
        help="block FP8, mode rms: peak-to-RMS factor (default: %(default)s)",
    )
    add(
        "--calib-percentile",
        type=float,
        default=DEFAULTS.percentile,
        metavar="P",
        help="block FP8, mode percentile: larger magnitudes saturate (default: %(default)s)",
    )
    add(
        "--mse-grid-size",
        type=int,
        default=DEFAULTS.grid_size,
        metavar="N",
        help="block FP8, mode mse: number of scales to try (default: %(default)s)",
    )
    add(
        "--activation-stats",
        type=Path,
        metavar="FILE",
        help=_STATISTICS_HELP if mode is None else _WEIGHING,
    )


def _add_check(group: argparse._ArgumentGroup, samples: int | None) -> None:
    add = partial(_add, group)
    every = "all" if samples is None else str(samples)
    add(
        "--verify-samples",
        type=count,
        default=samples,
        metavar="N",
        help=f"weights to check in each file (default: {every})",
    )
    add("--verify-seed", type=int, default=0, metavar="N", help="seed of the sample")
    add("--skip-verify", action="store_true", help="do not check the output")
    add(
        "--bands",
        choices=get_args(Bands),
        help="derived: from the format; documented: absolute limits (default: derived)",
    )
