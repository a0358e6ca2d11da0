"""Merge LoRA adapters of peft into a checkpoint, one weight at a time.

Everything that the adapters do not change stays as it is, multi-token prediction and vision tower
included. For other formats, give --adapter to `qwen35 convert` or `qwen35 gguf` instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen35.api.merge_api import merge
from qwen35.cli.console import Console
from qwen35.cli.shared_flags import (
    add_model,
    add_mtp_from,
    add_onto,
    keywords,
    positive,
    size_of,
)
from qwen35.cli.write_summary import show

EXAMPLES = {
    "an adapter and its base, as one checkpoint": (
        "qwen35 merge Qwen/Qwen3.5-0.8B my-adapter Qwen3.5-0.8B-mine"
    ),
    "two adapters, the second one by half": "qwen35 merge MODEL first second=0.5 OUT",
    "straight to GGUF": "qwen35 gguf MODEL OUT --types Q4_K_M --adapter my-adapter",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_model(parser, files=True)
    parser.add_argument(
        "adapter", metavar="ADAPTER[=WEIGHT]", nargs="+", help="folder that peft saved"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    add_onto(parser)
    add_mtp_from(parser)
    parser.add_argument(
        "--keep-shards", action="store_true", help="write the base's files instead of 5 GB each"
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: all processors)"
    )
    parser.add_argument(
        "--memory", type=size_of, metavar="SIZE", help="use fewer threads to stay below, e.g. 400MB"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output of qwen35")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    result = merge(**keywords(args), progress=None if args.dry_run else output.progress())
    return show(result, output, dry_run=args.dry_run)
