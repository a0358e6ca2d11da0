"""Quantize a bf16 Qwen3.5 checkpoint to block-wise FP8 (now: qwen35 convert --recipe fp8).

Quantizes what the toolkit of this name did (linear_attn.out_proj and shared experts stay bf16), and
fused experts as well. Statistics of activations are read where --activation_stats says, only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen35.checkpoint.open import fetch
from qwen35.cli.fp8 import (
    EXIT_FINDINGS,
    activations_for,
    add_calibration,
    calibration_for,
    report,
)
from qwen35.cli.output import Output
from qwen35.cli.shared import positive
from qwen35.errors import UsageError
from qwen35.plan.plan import make_plan
from qwen35.plan.recipe import load_recipe
from qwen35.plan.show import packed_text, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--input_dir", "--input-dir", required=True, metavar="DIR", help="bf16 checkpoint"
    )
    parser.add_argument(
        "--output_dir", "--output-dir", required=True, type=Path, metavar="DIR", help="to write"
    )
    add_calibration(parser, mode="rms", samples=5)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (auto is the CPU)")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: all processors)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output of qwen35")


def run(args: argparse.Namespace, output: Output) -> int:
    """Run the command."""
    from qwen35.convert import check_before, convert
    from qwen35.verify.fp8_show import report_text

    if not Path(args.input_dir).is_dir():
        raise UsageError(f"--input_dir {args.input_dir}", "not a folder")
    check_before(args.output_dir, overwrite=args.overwrite, device=args.device)
    calibration, activations = calibration_for(args), activations_for(args)
    source = fetch(str(Path(args.input_dir).absolute()))
    plan = make_plan(
        source, load_recipe("fp8-conservative"), calibration=calibration, activations=activations
    )
    result = convert(
        plan,
        args.output_dir,
        overwrite=args.overwrite,
        threads=args.threads,
        device=args.device,
        progress=output.progress(),
    )
    for note in plan.notes:
        output.info(f"note: {note}")
    made = {"out": str(result.out), "bytes": result.nbytes}
    output.line(f"{result.out}: {size(result.nbytes)}, {packed_text(plan)}")
    checked = report(plan, result.out, args, output)
    if checked is None:
        output.data("verification skipped", made)
        return 0
    output.data(report_text(checked), {**made, "report": checked.to_json()})
    return EXIT_FINDINGS if checked.verdict == "FAIL" else 0
