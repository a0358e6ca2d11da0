"""Run a pipeline: a path, or the artifacts of a run file, through its gates.

  qwen35 run FILE.toml                    a run file (docs/pipeline.md)
  qwen35 run --path A MODEL OUT           text-only NF4, for training
  qwen35 run --path B MODEL OUT           text-only, and GGUF with its F16
  qwen35 run --path fp8 MODEL OUT         block FP8, to serve; nvfp4, int4 too
  qwen35 run --path mlx MODEL OUT         MLX in 4 bits, for Macs

Each artifact is made, verified, documented and, if a repository is named, published. A closed gate
stops the steps that depend on it. A repeated run only does what is missing or changed. Exit code 0
if every gate opened, 1 if one is closed, 2 for errors before any work.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from qwen35.api.run_api import RunOptions, job_for, prepare
from qwen35.cli.console import Console
from qwen35.cli.exits import EXIT_FINDINGS, EXIT_USAGE
from qwen35.cli.shared_flags import (
    Joined,
    add_chunks,
    add_codes,
    add_mtp_from,
    add_onto,
    keywords,
    positive,
    size_of,
)
from qwen35.pipeline.run_request import PathName

DEPTHS = ("structure", "numbers", "behaviour")

USAGE = """\
qwen35 run FILE.toml [options]
       qwen35 run --path PATH [--path PATH ...] MODEL OUT [options]"""

EXAMPLES = {
    "text-only NF4 and block FP8 in one pass, verified and documented": (
        "qwen35 run --path A --path fp8 Qwen/Qwen3.5-0.8B made"
    ),
    "what it would read, write and need": (
        "qwen35 run --path A --path fp8 Qwen/Qwen3.5-0.8B made --dry-run"
    ),
    "GGUF, measured on a text and published": (
        "qwen35 run --path B MODEL made --types Q4_K_M --text wiki.test.raw \\\n      --repo me"
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "what", nargs="+", metavar="FILE.toml | MODEL OUT", help="a run file; or, with --path, "
        "folder, GGUF file or Hub id of the source, and the folder of all artifacts"
    )  # fmt: skip
    group = parser.add_argument_group("instead of a file")
    group.add_argument(
        "--path",
        action="append",
        choices=get_args(PathName),
        help="may be repeated; A is nf4, B is gguf",
    )
    group.add_argument("--types", action=Joined, metavar="T,...", help="path B: types besides F16")
    group.add_argument("--imatrix", metavar="FILE", help="path B: importance matrix")
    add_codes(group, texts=False)
    group.add_argument(
        "--adapter",
        action="append",
        metavar="DIR[=WEIGHT]",
        help="merge a LoRA adapter of peft as weights are read; may be repeated",
    )
    add_onto(group)
    add_mtp_from(group)
    group.add_argument("--depth", choices=DEPTHS, help="depth of verification (default: behaviour)")
    group.add_argument("--text", type=Path, metavar="FILE", help="measure quality on this text")
    add_chunks(group, "number of chunks to measure on")
    group.add_argument(
        "--repo",
        metavar="OWNER[/NAME]",
        help="where to publish; repositories are named after the folders",
    )
    group.add_argument(
        "--private", action="store_true", default=None, help="make new repositories private"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or a list")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: all processors)"
    )
    parser.add_argument(
        "--memory", type=size_of, metavar="SIZE", help="use fewer threads to stay below, e.g. 400MB"
    )
    parser.add_argument("--hf-token", metavar="TOKEN", help="Hub token (default: HF_TOKEN)")
    parser.add_argument(
        "--serve",
        metavar="NAME=COMMAND",
        action="append",
        type=_served,
        default=[],
        help="start the server at this artifact's endpoint with this command to ask it, and end it "
        "afterwards; may be repeated",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace outputs of other runs")
    parser.add_argument("--dry-run", action="store_true", help="print the graph, change nothing")


def _served(text: str) -> tuple[str, str]:
    name, equals, command = text.partition("=")
    if not (name and equals and command.strip()):
        raise argparse.ArgumentTypeError(f"{text[:80]!r}, expected NAME=COMMAND")
    return name, command


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    from qwen35.pipeline.outcome import outcomes_text

    option_names = ("device", "threads", "memory", "overwrite", "hf_token")
    request = keywords(args, "what", "path", "dry_run", "serve", *option_names)
    job = job_for(args.what, path=args.path or (), **request)
    limits = (args.device, args.threads, args.memory)
    options = RunOptions(*limits, args.overwrite, args.hf_token, dict(args.serve))
    prepared = prepare(job, options, dry=args.dry_run)
    if prepared.problems:
        output.errors(prepared.problems)
        return EXIT_USAGE
    if args.dry_run:
        forecast = prepared.forecast()
        output.data(forecast.text(), forecast.to_json())
        return 0
    result = prepared.carry_out(
        output.progress(), output.progress("chunks"), output.info, output.progress("questions")
    )
    # On a terminal each step was told when it ended.
    text = outcomes_text(result.outcomes, told=output.one_screen)
    output.data(text, result.to_json())
    return 0 if result.passed else EXIT_FINDINGS
