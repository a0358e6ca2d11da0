"""Put together what slices of a run have written.

Checks that every slice (`--slice i/N` of convert or gguf) is complete, hashes the files, writes
index, config and manifest, and lets OUT appear. What comes out is what one run writes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen35.api.finalize_api import finalize
from qwen35.cli.console import Console
from qwen35.cli.shared_flags import keywords, positive
from qwen35.cli.write_summary import show

EXAMPLES = {
    "put together what two jobs have made": "qwen35 finalize OUT",
    "one of these jobs": "qwen35 convert MODEL OUT --recipe nf4 --slice 1/2",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder that the slices were for")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: all processors)"
    )


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    done = finalize(**keywords(args), progress=output.progress())
    if done.plan.settings is not None and done.report is None:
        check = f"qwen35 verify {done.out} --source {done.plan.checkpoint.name}"
        output.notes([f"FP8 weights were not checked by the slices: {check}"])
    return show(done, output)
