"""Quantize a bf16 Qwen3.5 checkpoint to block-wise FP8 (now: qwen35 convert --recipe fp8).

Quantizes what the toolkit of this name did (linear_attn.out_proj and shared experts stay bf16), and
fused experts as well. Statistics of activations are read where --activation_stats says, only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen35.api.convert import convert
from qwen35.cli.exits import EXIT_FINDINGS
from qwen35.cli.fp8 import add_calibration
from qwen35.cli.output import Output
from qwen35.cli.shared import keywords, positive
from qwen35.errors import UsageError
from qwen35.plan.safetensors.show import packed_text
from qwen35.shown import size


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
    from qwen35.verify.fp8_show import report_text

    if not Path(args.input_dir).is_dir():
        hint = "qwen35 convert takes Hub ids as well"
        raise UsageError(f"--input_dir {args.input_dir}", "not a folder", hint=hint)
    asked = keywords(args, "input_dir", "output_dir")
    source = str(Path(args.input_dir).absolute())
    done = convert(
        source, args.output_dir, recipe="fp8-conservative", **asked, progress=output.progress()
    )
    output.notes(done.plan.notes)
    output.line(f"{done.out}: {size(done.nbytes)}, {packed_text(done.plan)}")
    text = "verification skipped" if done.report is None else report_text(done.report)
    output.data(text, done.to_json())
    return 0 if done.passed else EXIT_FINDINGS
