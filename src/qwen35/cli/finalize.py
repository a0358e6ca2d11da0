"""Put together what the slices of a conversion have written.

Checks that every slice (`qwen35 convert --slice i/N`) is complete, hashes the files, writes index,
config and manifest, and lets OUT appear. What comes out is what one run writes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen35.api.finalize import finalize
from qwen35.cli.output import Output
from qwen35.cli.shared import keywords, positive
from qwen35.plan.show import packed_text
from qwen35.shown import size

EXAMPLES = {
    "put together what two jobs have made": "qwen35 finalize OUT",
    "a job of its own": "qwen35 convert MODEL OUT --recipe nf4 --slice 1/2",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder that the slices were for")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: all processors)"
    )


def run(args: argparse.Namespace, output: Output) -> int:
    """Run the verb."""
    done = finalize(**keywords(args), progress=output.progress())
    output.notes(done.plan.notes)
    if done.plan.calibration is not None:
        check = f"qwen35 verify {done.out} --source {done.plan.checkpoint.name}"
        output.notes([f"FP8 weights are not checked here: {check}"])
    text = f"{done.out}: {len(done.hashes) + 1} files, {size(done.nbytes)}"
    output.data(f"{text}, {packed_text(done.plan)}", done.to_json())
    return 0
