"""Run a path, or a file's own choice of artifacts, through its gates.

  qwen35 run FILE.toml                    what the file says (docs/pipeline.md)
  qwen35 run --path A MODEL OUT           text-only NF4, to train on
  qwen35 run --path B MODEL OUT           text-only, and GGUF with its F16
  qwen35 run --path fp8 MODEL OUT         block FP8, to serve

Each artifact is made, verified, given its card and, if a repository is named, published. A closed
gate stops what depends on it. Run again, and only what is missing or changed is done. Exit code 0
if every gate opened, 1 if one is closed, 2 for errors before anything was done.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from qwen35.api.run_api import RunOptions, job_for, prepare
from qwen35.cli.console import Console
from qwen35.cli.exits import EXIT_FINDINGS, EXIT_USAGE
from qwen35.cli.shared_flags import keywords, positive, size_of
from qwen35.pipeline.run_request import PathName

DEPTHS = ("structure", "numbers", "behaviour")
_PATH_HELP = "may be given several times"

USAGE = """\
qwen35 run FILE.toml [options]
       qwen35 run --path PATH [--path PATH ...] MODEL OUT [options]"""

EXAMPLES = {
    "text-only NF4 and block FP8 in one pass, verified and documented": (
        "qwen35 run --path A --path fp8 Qwen/Qwen3.5-0.8B made"
    ),
    "what that would read, write and need": (
        "qwen35 run --path A --path fp8 Qwen/Qwen3.5-0.8B made --dry-run"
    ),
    "GGUF, measured on a text and published": (
        "qwen35 run --path B MODEL made --types Q4_K_M --text wiki.test.raw \\\n      --repo me"
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "what", nargs="+", metavar="FILE.toml | MODEL OUT", help="a run's file; or, with --path, "
        "folder or Hub id of the source, and the folder of all artifacts"
    )  # fmt: skip
    group = parser.add_argument_group("instead of a file")
    group.add_argument(
        "--path", action="append", choices=get_args(PathName), help="may be given several times"
    )
    group.add_argument("--types", metavar="T,...", help="path B: types beside its F16")
    group.add_argument("--imatrix", metavar="FILE", help="path B: importance matrix")
    group.add_argument("--depth", choices=DEPTHS, help="of verification (default: behaviour)")
    group.add_argument("--text", type=Path, metavar="FILE", help="measure quality on this text")
    group.add_argument("--chunks", type=positive, metavar="N", help="on so many chunks of it")
    group.add_argument(
        "--repo", metavar="OWNER[/NAME]", help="publish there; names are those of the folders"
    )
    group.add_argument("--private", action="store_true", default=None, help="repositories made")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or a list")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: all processors)"
    )
    parser.add_argument(
        "--memory", type=size_of, metavar="SIZE", help="use fewer threads to stay below, e.g. 400MB"
    )
    parser.add_argument("--hf-token", metavar="TOKEN", help="Hub token (default: HF_TOKEN)")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs of other runs")
    parser.add_argument("--dry-run", action="store_true", help="print the graph, touch nothing")


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    from qwen35.pipeline.outcome import outcomes_text

    how = ("device", "threads", "memory", "overwrite", "hf_token")
    asked = keywords(args, "what", "path", "dry_run", *how)
    job = job_for(args.what, path=args.path or (), **asked)
    options = RunOptions(*(getattr(args, name) for name in how))
    found = prepare(job, options, dry=args.dry_run)
    if found.problems:
        output.errors(found.problems)
        return EXIT_USAGE
    if args.dry_run:
        forecast = found.forecast()
        output.data(forecast.text(), forecast.to_json())
        return 0
    done = found.carry_out(output.progress(), output.progress("chunks"), output.info)
    output.data(outcomes_text(done.outcomes), done.to_json())
    return 0 if done.passed else EXIT_FINDINGS
