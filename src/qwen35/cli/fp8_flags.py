"""The flags of the commands that write FP8: the choice of scales and the final check."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from qwen35.api.fp8_options import DEFAULTS, Bands
from qwen35.cli.shared_flags import count
from qwen35.codecs.fp8.layout import ScaleMode

__all__ = ["add_scale_choice"]


def add_scale_choice(
    parser: argparse.ArgumentParser, mode: ScaleMode | None, samples: int | None
) -> None:
    """Add the flags for FP8 scales and the final check.

    Args:
        parser: the parser.
        mode: the default of --calib-mode; None if it is optional.
        samples: the default of --verify-samples; None for every weight.
    """
    group = parser.add_argument_group("FP8")

    def add(name: str, **options: object) -> None:
        spellings = dict.fromkeys((name, "--" + name[2:].replace("-", "_")))
        group.add_argument(*spellings, **options)  # type: ignore[arg-type]

    shown = mode or f"{DEFAULTS.mode} with an FP8 recipe"
    add(
        "--calib-mode",
        choices=get_args(ScaleMode),
        default=mode,
        help=f"how to choose the scale of a tile (default: {shown})",
    )
    add(
        "--rms-factor",
        type=float,
        default=DEFAULTS.rms_factor,
        metavar="K",
        help="mode rms: peak-to-RMS factor (default: %(default)s)",
    )
    add(
        "--calib-percentile",
        type=float,
        default=DEFAULTS.percentile,
        metavar="P",
        help="mode percentile: larger magnitudes saturate (default: %(default)s)",
    )
    add(
        "--mse-grid-size",
        type=int,
        default=DEFAULTS.grid_size,
        metavar="N",
        help="mode mse: number of scales to try (default: %(default)s)",
    )
    add(
        "--activation-stats",
        type=Path,
        metavar="FILE",
        help="JSON of activation statistics that weigh the columns (rms, mse, search)",
    )
    every = "all" if samples is None else str(samples)
    add(
        "--verify-samples",
        type=count,
        default=samples,
        metavar="N",
        help=f"FP8 weights to check in each file (default: {every})",
    )
    add("--verify-seed", type=int, default=0, metavar="N", help="seed of the sample")
    add("--skip-verify", action="store_true", help="do not check the output")
    add(
        "--bands",
        choices=get_args(Bands),
        help="derived: from the format; documented: absolute limits (default: derived)",
    )
