"""Write GGUF files for llama.cpp, all in one pass over the checkpoint.

No f16 file in between and no model in memory. Files are those that llama.cpp's converter and
llama-quantize would write, byte for byte.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen35.api.gguf import DEFAULT_TYPES, gguf
from qwen35.cli.output import Output
from qwen35.cli.shared import add_model, keywords, positive, size_of
from qwen35.shown import size

EXAMPLES = {
    "three types in one pass, with an importance matrix": (
        "qwen35 gguf MODEL OUT --types Q8_0,Q5_K_M,Q4_K_M \\\n"
        "      --imatrix statistics/imatrix.gguf"
    ),
    "how large each type would be with each recipe": "qwen35 gguf MODEL OUT --dry-run",
    "linear attention in Q8_0, and the vision tower beside it": (
        "qwen35 gguf MODEL OUT --types Q4_K_M --recipe q8-gates --mmproj"
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_model(parser)
    parser.add_argument("out", metavar="OUTDIR", type=Path, help="folder to write")
    parser.add_argument(
        "--types",
        default=",".join(DEFAULT_TYPES),
        metavar="T,...",
        help="file types (default: %(default)s)",
    )
    parser.add_argument(
        "--recipe", default="mix", metavar="NAME", help="mix, q8-gates, q8-gates-plus or a .toml"
    )
    parser.add_argument(
        "--imatrix", metavar="FILE", help="importance matrix, or hf:owner/name/path of one"
    )
    parser.add_argument(
        "--tensor-type",
        action="append",
        default=[],
        metavar="PATTERN=TYPE",
        help="type for tensors whose name the pattern matches; may be given several times",
    )
    parser.add_argument(
        "--tensor-type-file",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a file of such lines, as llama-quantize reads it",
    )
    parser.add_argument(
        "--upstream-counters",
        action="store_true",
        help="let named tensors shift the mix of the others, as llama-quantize does",
    )
    parser.add_argument("--mmproj", action="store_true", help="write the vision tower too, as F16")
    parser.add_argument("--drop-mtp", action="store_true", help="drop the MTP layer")
    parser.add_argument("--export", type=Path, metavar="FILE", help=_EXPORT_HELP)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"), help="the CPU")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: all processors)"
    )
    parser.add_argument(
        "--memory", type=size_of, metavar="SIZE", help="use fewer threads to stay below, e.g. 400MB"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output of qwen35")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")


_EXPORT_HELP = (
    "write the types of the one quantized file asked for as a --tensor-type-file for stock "
    "llama-quantize, and nothing else"
)


def run(args: argparse.Namespace, output: Output) -> int:
    """Run the verb."""
    dry = args.dry_run or args.export is not None
    done = gguf(**keywords(args), progress=None if dry else output.progress())
    if done.exported is not None:
        path, kinds = done.exported
        (name,) = (file.name for file in done.plan.files if file.file_type.quantized)
        output.data(f"{path}: types of {len(kinds)} tensors of {name}", done.to_json())
        return 0
    if args.dry_run:
        from qwen35.gguf.show import plan_json, plan_text

        output.data(plan_text(done.plan, done.threads), plan_json(done.plan, done.threads))
        return 0
    output.notes(done.plan.notes)
    text = f"{done.out}: {len(done.hashes) + 1} files, {size(done.nbytes)}"
    output.data(text, done.to_json())
    return 0
