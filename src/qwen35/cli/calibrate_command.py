"""Run text through a model and write statistics of its weights' inputs.

Writes activation statistics (for `convert --activation-stats`: block FP8, NVFP4, INT4, KV caches)
and an importance matrix (for `gguf --imatrix`). One decoder layer is in memory at a time; an
interrupted run resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from qwen35.api.calibrate_api import calibrate, planned
from qwen35.api.worker_choice import check_workers, threads_each
from qwen35.calibration.calibration_display import coverage_text, draft_text, plan_json, plan_text
from qwen35.calibration.calibration_plan import CalibrationRequest, Dtype
from qwen35.calibration.sums import FLOOR
from qwen35.cli.console import Console
from qwen35.cli.shared_flags import (
    add_adapter,
    add_chunks,
    add_model,
    add_mtp_from,
    add_onto,
    keywords,
    positive,
    size_of,
)
from qwen35.cli.worker_flags import add_workers
from qwen35.display import size

EXAMPLES = {
    "statistics for `convert`, and an importance matrix for `gguf`": (
        "qwen35 calibrate MODEL --text wiki.train.raw --output statistics"
    ),
    "on 128 chunks, with less memory": (
        "qwen35 calibrate MODEL --text a.txt b.txt --output statistics \\\n"
        "      --chunks 128 --memory 4GB"
    ),
    "on four processes, which share the chunks": (
        "qwen35 calibrate MODEL --text a.txt --output statistics --workers 4"
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_model(parser, files=True)
    add_adapter(parser)
    add_onto(parser)
    parser.add_argument(
        "--text", nargs="+", required=True, type=Path, metavar="FILE", help="plain text, UTF-8"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--context",
        type=positive,
        default=512,
        metavar="N",
        help="tokens per chunk (default: %(default)s)",
    )
    add_chunks(parser, "largest number of chunks (default: the whole text)")
    parser.add_argument(
        "--floor",
        type=positive,
        default=FLOOR,
        metavar="N",
        help="fill up experts that fewer tokens reach from the average of their layer "
        "(default: %(default)s)",
    )
    parser.add_argument("--dat", action="store_true", help="also write the older imatrix.dat")
    parser.add_argument(
        "--draft",
        action="store_true",
        help="also measure how often what the MTP layer drafts is accepted",
    )
    parser.add_argument(
        "--hessian",
        action="store_true",
        help="also write the Hessians of all inputs, for refined codes",
    )
    add_mtp_from(parser)
    parser.add_argument(
        "--dtype",
        choices=get_args(Dtype),
        default="auto",
        help="for computation (auto: bfloat16 for a bfloat16 checkpoint, otherwise float32)",
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:N (auto: a GPU if there is one)"
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="torch threads, of each worker"
    )
    parser.add_argument(
        "--memory", type=size_of, metavar="SIZE", help="smaller batches to stay below, e.g. 4GB"
    )
    add_workers(parser, slices=False)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an output of qwen35, or the interrupted run of another command",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    if args.dry_run:
        check_workers(args.workers, args.ray_address, None, args.memory)
        request = CalibrationRequest(
            args.dtype,
            args.floor,
            args.dat,
            args.memory,
            args.draft,
            args.hessian,
            args.workers or 1,
            threads_each(args.workers, args.ray_address, args.threads),
        )
        plan = planned(
            args.model,
            text=args.text,
            context=args.context,
            chunks=args.chunks,
            request=request,
            adapter=args.adapter,
            onto=args.onto,
            mtp_from=args.mtp_from,
            token=args.hf_token,
            headers_only=True,
        )
        output.data(plan_text(plan), plan_json(plan))
        return 0
    calibration = calibrate(**keywords(args, "dry_run"), progress=output.progress())
    if calibration.resumed:
        output.info(f"resumed after {calibration.resumed} blocks of an interrupted run")
    lines = coverage_text(calibration.coverage)
    if calibration.draft is not None:
        lines.append(draft_text(calibration.draft))
    result = calibration.result
    lines.append(f"{result.out}: {len(result.hashes) + 1} files, {size(result.nbytes)}")
    output.data("\n".join(lines), calibration.to_json())
    return 0
