"""Put together what the slices of a conversion have written.

Checks that every slice (`qwen35 convert --slice i/N`) is complete, hashes the files, writes index,
config and manifest, and lets OUT appear. What comes out is what one run writes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen35.cli.output import Output
from qwen35.cli.shared import positive
from qwen35.plan.show import packed_text, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder that the slices were for")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: all processors)"
    )


def run(args: argparse.Namespace, output: Output) -> int:
    """Run the verb."""
    from qwen35.slices import finalize

    plan, result = finalize(args.out, threads=args.threads, progress=output.progress())
    for note in plan.notes:
        output.info(f"note: {note}")
    if plan.calibration is not None:
        check = f"qwen35 verify {result.out} --source {plan.checkpoint.name}"
        output.info(f"note: FP8 weights are not checked here: {check}")
    output.data(
        f"{result.out}: {len(result.hashes) + 1} files, {size(result.nbytes)}, {packed_text(plan)}",
        {"out": str(result.out), "bytes": result.nbytes, "sha256": result.hashes},
    )
    return 0
