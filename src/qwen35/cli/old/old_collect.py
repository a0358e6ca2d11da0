"""Collect activation statistics while a loaded model continues prompts (now: qwen35 calibrate).

Loads the whole model. `qwen35 calibrate` needs one layer in memory, reads your own text and also
writes an importance matrix.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen35.checkpoint.open import fetch
from qwen35.cli.console import Console
from qwen35.cli.shared_flags import positive
from qwen35.errors import OutputError, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--model_dir", "--model-dir", required=True, metavar="DIR", help="bf16 model"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="JSON file to write"
    )
    parser.add_argument(
        "--prompts_file",
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="text, one prompt per line (default: twelve built-in prompts)",
    )
    parser.add_argument(
        "--max_tokens",
        "--max-tokens",
        type=positive,
        default=256,
        metavar="N",
        help="largest number of new tokens per prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--device_map",
        "--device-map",
        default="auto",
        metavar="MAP",
        help="passed to from_pretrained (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file")


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the command."""
    from qwen35.calibration.generate import PROMPTS, collect, read_prompts
    from qwen35.sinks.staging import os_errors

    if not Path(args.model_dir).is_dir():
        hint = "qwen35 calibrate takes Hub ids as well"
        raise UsageError(f"--model_dir {args.model_dir}", "not a folder", hint=hint)
    _check(args.output, overwrite=args.overwrite)
    prompts = read_prompts(args.prompts_file) if args.prompts_file else PROMPTS
    checkpoint = fetch(str(Path(args.model_dir).absolute()))
    # renamed at the end, so that the file appears complete or not at all
    partial = args.output.with_name(f".{args.output.name}.partial")
    try:
        with os_errors(args.output):
            partial.unlink(missing_ok=True)  # of a killed run
            summary = collect(
                checkpoint,
                partial,
                prompts,
                tokens=args.max_tokens,
                device_map=args.device_map,
                progress=output.progress(),
            )
            partial.replace(args.output)
    finally:
        partial.unlink(missing_ok=True)
    output.data(
        f"{args.output}: statistics of {summary['tokens']} tokens from {len(prompts)} prompts",
        {"output": str(args.output), **summary},
    )
    return 0


def _check(path: Path, *, overwrite: bool) -> None:
    if path.is_dir():
        raise OutputError(str(path), "is a folder", expected="a JSON file to write")
    if path.exists() and not overwrite:
        raise OutputError(str(path), "exists already", hint="give --overwrite to replace it")
    if not path.absolute().parent.is_dir():
        raise OutputError(str(path), "its folder does not exist", hint="create it first")
