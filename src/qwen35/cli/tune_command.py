"""Find the recipe with the least loss at a given size, or the smallest at a given loss.

One pass of a text through the model and one back price every weight in every type: how much the
model's predictions diverge if it is stored so. One layer is in memory at a time; an interrupted run
resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen35.api.tune_api import carry_out, types_of
from qwen35.api.worker_choice import check_workers
from qwen35.cli.console import Console
from qwen35.cli.shared_flags import (
    Joined,
    add_adapter,
    add_chunks,
    add_model,
    add_onto,
    keywords,
    positive,
    size_of,
)
from qwen35.cli.worker_flags import add_workers
from qwen35.errors import UsageError
from qwen35.tuning.formats import ENGINES, FORMATS

EXAMPLES = {
    "the best mix of GGUF types at 4.5 bits per weight": (
        "qwen35 tune MODEL --format gguf --size 4.5bpw --text other.txt \\\n"
        "      --output tuned.toml"
    ),
    "the smallest NF4 with a loss of at most 0.02 nats": (
        "qwen35 tune MODEL --format nf4 --max-kld 0.02 --text other.txt \\\n"
        "      --output tuned.toml"
    ),
    "then write it": "qwen35 gguf MODEL OUT --types Q4_K_M --recipe tuned.toml",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_model(parser, files=True)
    add_adapter(parser)
    add_onto(parser)
    parser.add_argument("--format", required=True, choices=FORMATS, help="format of the artifact")
    parser.add_argument(
        "--size", metavar="S", help="largest size of the weight files: 4.5bpw, 3.2GB, 800MiB"
    )
    parser.add_argument(
        "--max-kld", type=float, metavar="K", help="largest mean divergence on the text, in nats"
    )
    parser.add_argument(
        "--active", action="store_true", help="sizes are of what a token reads, of few experts"
    )
    parser.add_argument("--for", dest="engine", choices=ENGINES, help=_ENGINE_HELP)
    parser.add_argument(
        "--text", type=Path, metavar="FILE", required=True, help="text to measure on"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="recipe to write (.toml)")
    parser.add_argument(
        "--types", action=Joined, metavar="T,...", help="GGUF: types to choose from"
    )
    parser.add_argument("--imatrix", metavar="FILE", help="GGUF: importance matrix, or hf:...")
    parser.add_argument("--hessian", type=Path, metavar="DIR", help=_HESSIAN_HELP)
    parser.add_argument("--measurements", type=Path, metavar="FILE", help=_MEASUREMENTS_HELP)
    parser.add_argument("--start-from", type=Path, metavar="FILE", help=_START_HELP)
    parser.add_argument(
        "--probes",
        type=int,
        default=0,
        metavar="N",
        help="as a check, write and measure N models: the result, and its dearest groups alone "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--sample",
        type=positive,
        default=1,
        metavar="N",
        help="compare types on every Nth row (default: all)",
    )
    add_chunks(
        parser, "chunks of the text to measure on (default: 16; of a mixture of experts, 32)"
    )
    parser.add_argument(
        "--context", type=positive, default=512, metavar="N", help="tokens per chunk (default: 512)"
    )
    parser.add_argument(
        "--explicit", action="store_true", help="write a rule for every role in every layer"
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="write tune.json and tune.html")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:N (auto: a GPU if there is one)"
    )
    parser.add_argument(
        "--memory", type=size_of, metavar="SIZE", help="read experts one by one to stay below"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="default: all processors")
    parser.add_argument("--overwrite", action="store_true", help=_OVERWRITE_HELP)
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured")
    add_workers(parser, slices=False)


_MEASUREMENTS_HELP = (
    "save measurements in FILE and resume from it: another budget then takes seconds "
    "(default: the recipe's name with .json)"
)
_HESSIAN_HELP = "price codes that are refined by these Hessians, of calibrate --hessian"
_START_HELP = "measurements of the model that this one was tuned from: its prices are taken"
_ENGINE_HELP = (
    "whose rounding of inputs counts: llama.cpp's on CPUs (default for GGUF), or nobody's"
)
_OVERWRITE_HELP = "replace the recipe or report, or the interrupted run of another command"


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    from qwen35.tuning.tuning_display import plan_text, tuned_text
    from qwen35.tuning.tuning_job import prepare
    from qwen35.tuning.tuning_request import TuningRequest

    request = keywords(args, "report", "dry_run", "hf_token")
    request |= {"types": types_of(args.types), "token": args.hf_token}
    check_workers(args.workers, args.ray_address, None, args.memory)
    if args.dry_run and args.start_from is not None:
        hint = "leave it out: prices are taken from that file, and nothing is measured"
        raise UsageError("--dry-run", "given with --start-from", hint=hint)
    if args.dry_run:
        job = prepare(TuningRequest(**{**request, "output": None}))
        output.notes(job.notes)
        output.data(*plan_text(job.space, job.budget, job.plan, args.probes, job.hessians_memory))
        return 0
    if args.output is None:
        raise UsageError("--output", "missing", expected="a file to write, ending with .toml")
    result = carry_out(TuningRequest(**request), args.report, output.progress)
    output.notes(result.notes)
    if args.report is not None:
        output.info(f"{args.report}: tune.json and tune.html")
    text = tuned_text(result.space, result.tuned, result.measured, result.recipe, output.width)
    output.data(text, result.to_json())
    return 0
