"""Write the checkpoint that `qwen35 plan` describes.

Tensors stream one at a time, so memory does not grow with the model and no GPU is needed. The
output folder appears complete or not at all.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from qwen35.api.convert_api import convert
from qwen35.api.fp8_options import KvCache
from qwen35.cli.console import Console
from qwen35.cli.fp8_flags import add_scale_choice
from qwen35.cli.shared_flags import (
    add_adapter,
    add_codes,
    add_model,
    add_mtp_from,
    add_onto,
    add_recipe,
    keywords,
)
from qwen35.cli.worker_flags import add_workers
from qwen35.cli.write_summary import show

EXAMPLES = {
    "NF4 for QLoRA": "qwen35 convert Qwen/Qwen3.5-0.8B Qwen3.5-0.8B-bnb-4bit --recipe nf4",
    "block FP8 for vLLM, with columns weighed by statistics": (
        "qwen35 convert MODEL OUT --recipe fp8 --calib-mode search \\\n"
        "      --activation-stats statistics/activation-stats.json"
    ),
    "only show what would be written": ("qwen35 convert MODEL OUT --recipe text-fp8 --dry-run"),
    "one of four parts, as a batch job": ("qwen35 convert MODEL OUT --recipe fp8 --slice 1/4"),
    "decode packed weights to bf16": "qwen35 convert Qwen3.5-0.8B-bnb-4bit restored --recipe bf16",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_model(parser, files=True)
    add_adapter(parser)
    add_onto(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    add_recipe(parser)
    add_mtp_from(parser)
    add_codes(parser)
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:N or a list (auto is the CPU)"
    )
    add_workers(parser)
    add_scale_choice(parser, mode=None, samples=None)
    parser.add_argument(
        "--kv-cache",
        choices=get_args(KvCache),
        help="also write scales for a KV cache in FP8; needs --activation-stats",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output of qwen35")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    result = convert(**keywords(args), progress=None if args.dry_run else output.progress())
    return show(result, output, dry_run=args.dry_run)
