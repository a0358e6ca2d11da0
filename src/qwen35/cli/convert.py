"""Write the checkpoint that `qwen35 plan` describes.

Tensors stream one at a time: memory does not grow with the model, and no GPU is needed. The output
folder appears whole, or not at all.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from qwen35.checkpoint.open import describe, fetch
from qwen35.cli.output import Output
from qwen35.cli.shared import add_model, add_recipe, plan_for, threads_for
from qwen35.plan.show import packed_text, plan_json, plan_text, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_model(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    add_recipe(parser)
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (auto is the CPU)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output of qwen35")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")


def run(args: argparse.Namespace, output: Output) -> int:
    """Run the verb."""
    from qwen35.convert import check_before, convert

    check_before(args.out, overwrite=args.overwrite, device=args.device)
    if args.dry_run:
        plan = plan_for(describe(args.model, token=args.hf_token), args)
        threads = threads_for(plan, args)
        output.data(plan_text(plan, threads), plan_json(plan, threads))
        return 0
    plan = plan_for(fetch(args.model, token=args.hf_token), args)
    result = convert(
        plan,
        args.out,
        overwrite=args.overwrite,
        threads=threads_for(plan, args),
        device=args.device,
        progress=output.progress(),
    )
    for note in plan.notes:
        output.info(f"note: {note}")
    packed = Counter(step.packing for step in plan.steps if step.packing)
    output.data(
        f"{result.out}: {len(result.hashes) + 1} files, {size(result.nbytes)}, {packed_text(plan)}",
        {"out": str(result.out), "bytes": result.nbytes, "sha256": result.hashes, **packed},
    )
    return 0
