"""Find the recipe with the least loss at a given size, or the smallest at a given loss.

Squared errors of every weight in every type, read in one pass, compare the types; probes (models
with one group of weights quantized, run in their engine) measure how much each group matters.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen35.api.tune_api import carry_out, types_of
from qwen35.cli.console import Console
from qwen35.cli.shared_flags import add_adapter, add_model, add_onto, keywords, positive
from qwen35.errors import UsageError
from qwen35.tuning.formats import FORMATS

DEFAULT_PROBES = 120
DEFAULT_CHUNKS = 8

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
        "--text", type=Path, metavar="FILE", required=True, help="text to measure on"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="recipe to write (.toml)")
    parser.add_argument("--types", metavar="T,...", help="GGUF: types to choose from")
    parser.add_argument("--imatrix", metavar="FILE", help="GGUF: importance matrix, or hf:...")
    parser.add_argument("--measurements", type=Path, metavar="FILE", help=_MEASUREMENTS_HELP)
    parser.add_argument("--start-from", type=Path, metavar="FILE", help=_START_HELP)
    parser.add_argument(
        "--probes",
        type=int,
        default=DEFAULT_PROBES,
        metavar="N",
        help="largest number of groups to measure; 0: squared errors alone (default: %(default)s)",
    )
    parser.add_argument(
        "--chunks",
        type=positive,
        default=DEFAULT_CHUNKS,
        metavar="N",
        help="chunks of the text to measure on (default: %(default)s)",
    )
    parser.add_argument(
        "--context", type=positive, default=512, metavar="N", help="tokens per chunk (default: 512)"
    )
    parser.add_argument(
        "--explicit", action="store_true", help="write a rule for every role in every layer"
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="write tune.json and tune.html")
    parser.add_argument(
        "--device", default="auto", help="for transformers, which runs every format but GGUF"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="default: all processors")
    parser.add_argument("--overwrite", action="store_true", help="replace the recipe or report")
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured")


_MEASUREMENTS_HELP = (
    "save measurements in FILE and resume from it: another budget then takes seconds "
    "(default: the recipe's name with .json)"
)
_START_HELP = "measurements of the model that this one was tuned from: its probes are not repeated"


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    from qwen35.tuning.tuning_display import plan_text, tuned_text
    from qwen35.tuning.tuning_job import TuningRequest, prepare

    request = keywords(args, "report", "dry_run", "hf_token")
    request |= {"types": types_of(args.types), "token": args.hf_token}
    if args.dry_run:
        job = prepare(TuningRequest(**{**request, "output": None}))
        output.notes(job.space.notes)
        output.data(*plan_text(job.space, job.budget, args.probes))
        return 0
    if args.output is None:
        raise UsageError("--output", "missing", expected="a file to write, ending with .toml")
    result = carry_out(TuningRequest(**request), args.report, output.progress)
    output.notes(result.space.notes)
    if args.report is not None:
        output.info(f"{args.report}: tune.json and tune.html")
    text = tuned_text(result.space, result.tuned, result.recipe, output.width)
    output.data(text, result.to_json())
    return 0
