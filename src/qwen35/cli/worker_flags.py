"""The flags that say who does the work: threads, processes, a Ray cluster, or slices."""

from __future__ import annotations

import argparse

from qwen35.cli.shared_flags import positive

__all__ = ["add_workers"]


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add the flags; docs/scale.md has their use."""
    group = parser.add_argument_group("scale")
    group.add_argument(
        "--workers", type=positive, metavar="N", help="processes, each with --threads threads"
    )
    group.add_argument(
        "--ray-address", metavar="ADDRESS", help="work on this Ray cluster: auto or HOST:PORT"
    )
    group.add_argument(
        "--slice", type=_slice, metavar="i/N", help="do one of N parts; then `qwen35 finalize OUT`"
    )


def _slice(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    found = (int(number), int(of)) if number.isdecimal() and of.isdecimal() else (0, 0)
    if not 1 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"{text!r}, expected i/N, with i from 1 to N")
    return found
