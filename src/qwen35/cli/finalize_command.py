"""Complete an output from its slices.

Checks that every slice (`--slice i/N` of convert or gguf) is complete, hashes the files, writes
index, config and manifest, and commits OUT. The output equals that of a single run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen35.api.finalize_api import finalize
from qwen35.cli.console import Console
from qwen35.cli.shared_flags import keywords, positive
from qwen35.cli.write_summary import show

EXAMPLES = {
    "complete the output of two jobs": "qwen35 finalize OUT",
    "one of the jobs": "qwen35 convert MODEL OUT --recipe nf4 --slice 1/2",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("out", metavar="OUT", type=Path, help="output folder of the slices")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: all processors)"
    )


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    result = finalize(**keywords(args), progress=output.progress())
    if result.plan.banded and result.report is None:
        check = f"qwen35 verify {result.out} --source {result.plan.checkpoint.name}"
        output.notes([f"FP8 weights were not checked by the slices: {check}"])
    return show(result, output)
