"""Write the checkpoint that `qwen35 plan` describes.

Tensors stream one at a time: memory does not grow with the model, and no GPU is needed. The output
folder appears whole, or not at all.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from qwen35.checkpoint.open import describe, fetch
from qwen35.cli.fp8 import (
    EXIT_FINDINGS,
    activations_for,
    add_calibration,
    calibration_for,
    report,
)
from qwen35.cli.output import Output
from qwen35.cli.shared import add_model, add_recipe, plan_for, threads_for
from qwen35.cli.workers import add_workers, check_workers, pool_for
from qwen35.plan.plan import Plan
from qwen35.plan.show import packed_text, plan_json, plan_text, size
from qwen35.threads import default_threads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_model(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    add_recipe(parser)
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:N or a list (auto is the CPU)"
    )
    add_workers(parser)
    add_calibration(parser, mode=None, samples=None)
    parser.add_argument("--overwrite", action="store_true", help="replace an output of qwen35")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")


def run(args: argparse.Namespace, output: Output) -> int:
    """Run the verb."""
    from qwen35.convert import check_before, convert
    from qwen35.verify.fp8_show import report_text

    check_workers(args)
    here = "cpu" if args.ray_address else args.device
    check_before(args.out, overwrite=args.overwrite, device=here)
    scales = calibration_for(args), activations_for(args)
    if args.dry_run:
        plan = plan_for(describe(args.model, token=args.hf_token), args, *scales)
        threads = threads_for(plan, args)
        output.data(plan_text(plan, threads), plan_json(plan, threads))
        return 0
    plan = plan_for(fetch(args.model, token=args.hf_token), args, *scales)
    if args.slice:
        return _slice(plan, args, output)
    with pool_for(plan, args) as pool:
        result = convert(
            plan,
            args.out,
            overwrite=args.overwrite,
            threads=default_threads() if pool else threads_for(plan, args),
            device=args.device,
            progress=output.progress(),
            pool=pool,
        )
    for note in plan.notes:
        output.info(f"note: {note}")
    summary = f"{result.out}: {len(result.hashes) + 1} files, {size(result.nbytes)}"
    summary = f"{summary}, {packed_text(plan)}"
    packed: Counter[str] = Counter(step.packing for step in plan.steps if step.packing)
    made: dict[str, object] = {
        "out": str(result.out),
        "bytes": result.nbytes,
        "sha256": result.hashes,
    }
    made |= packed
    checked = report(plan, result.out, args, output)
    if checked is None:
        output.data(summary, made)
        return 0
    output.data(f"{report_text(checked)}\n{summary}", {**made, "report": checked.to_json()})
    return EXIT_FINDINGS if checked.verdict == "FAIL" else 0


def _slice(plan: Plan, args: argparse.Namespace, output: Output) -> int:
    from qwen35.slices import convert_slice

    number, count = args.slice
    done = convert_slice(
        plan,
        args.out,
        number,
        count,
        overwrite=args.overwrite,
        threads=threads_for(plan, args),
        device=args.device,
        progress=output.progress(),
    )
    output.data(
        f"slice {number}/{count}: {done.weights} weights, {size(done.nbytes)}; when all slices are "
        f"done: qwen35 finalize {args.out}",
        {"slice": number, "of": count, "weights": done.weights, "bytes": done.nbytes},
    )
    return 0
