"""The flags for scaling out: processes, a Ray cluster, or slices."""

from __future__ import annotations

import argparse

from qwen35.cli.shared_flags import positive

__all__ = ["add_workers"]


def add_workers(parser: argparse.ArgumentParser, *, slices: bool = True) -> None:
    """Add the flags; docs/scale.md explains them."""
    group = parser.add_argument_group("scale")
    group.add_argument("--workers", type=positive, metavar="N", help=_WORKERS_HELP)
    group.add_argument(
        "--ray-address", metavar="ADDRESS", help="use this Ray cluster: auto or HOST:PORT"
    )
    if not slices:
        return
    group.add_argument(
        "--slice",
        type=_slice,
        metavar="i/N",
        help="write one of N parts; then run `qwen35 finalize OUT`",
    )


_WORKERS_HELP = "processes, each with --threads threads, at most 8 per processor"


def _slice(text: str) -> tuple[int, int]:
    number, _, total = text.partition("/")
    part = (int(number), int(total)) if number.isdecimal() and total.isdecimal() else (0, 0)
    if not 1 <= part[0] <= part[1]:
        raise argparse.ArgumentTypeError(f"{text!r}, expected i/N, with i from 1 to N")
    return part
