"""Quantize a bf16 Qwen3.5 checkpoint to block-wise FP8 (now: qwen35 convert --recipe fp8).

Quantizes the same weights as the original tool (linear_attn.out_proj and shared experts stay bf16),
and also fused experts, and keeps the source's shards. Activation statistics are only read from
--activation_stats.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen35.api.convert_api import convert
from qwen35.cli.console import Console
from qwen35.cli.exits import EXIT_FINDINGS
from qwen35.cli.fp8_flags import add_scale_choice
from qwen35.cli.shared_flags import keywords, positive
from qwen35.display import size
from qwen35.errors import UsageError
from qwen35.planning.safetensors_files.safetensors_display import packed_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--input_dir", "--input-dir", required=True, metavar="DIR", help="bf16 checkpoint"
    )
    parser.add_argument(
        "--output_dir", "--output-dir", required=True, type=Path, metavar="DIR", help="to write"
    )
    add_scale_choice(parser, mode="rms", samples=5)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (auto is the CPU)")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: all processors)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output of qwen35")


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the command."""
    from qwen35.verification.fp8_display import report_text

    if not Path(args.input_dir).is_dir():
        hint = "qwen35 convert takes Hub ids as well"
        raise UsageError(f"--input_dir {args.input_dir}", "not a folder", hint=hint)
    options = keywords(args, "input_dir", "output_dir")
    source = str(Path(args.input_dir).absolute())
    result = convert(
        source,
        args.output_dir,
        recipe="fp8-conservative",
        keep_shards=True,
        **options,
        progress=output.progress(),
    )
    output.notes(result.plan.notes)
    output.line(f"{result.out}: {size(result.nbytes)}, {packed_text(result.plan)}")
    text = (
        "verification skipped" if result.report is None else report_text(result.report, both=True)
    )
    output.data(text, result.to_json())
    return 0 if result.passed else EXIT_FINDINGS
