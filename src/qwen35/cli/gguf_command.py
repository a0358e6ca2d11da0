"""Write GGUF files for llama.cpp, all in one pass over the checkpoint.

Needs no intermediate f16 file and no model in memory. The files equal those of llama.cpp's
converter and llama-quantize, byte for byte.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen35.api.gguf_api import DEFAULT_TYPES, gguf
from qwen35.cli.console import Console
from qwen35.cli.shared_flags import (
    add_adapter,
    add_codes,
    add_model,
    add_mtp,
    add_mtp_from,
    add_onto,
    add_types,
    keywords,
    positive,
    size_of,
)
from qwen35.cli.worker_flags import add_workers
from qwen35.cli.write_summary import show

EXAMPLES = {
    "three types in one pass, with an importance matrix": (
        "qwen35 gguf MODEL OUT --types Q8_0,Q5_K_M,Q4_K_M \\\n      --imatrix statistics"
    ),
    "the same types, closer to the model at the same size": (
        "qwen35 gguf MODEL OUT --types Q4_K_M --codes refined --hessian statistics"
    ),
    "how large each type would be with each recipe": "qwen35 gguf MODEL OUT --dry-run",
    "one of four parts, as a batch job": ("qwen35 gguf MODEL OUT --types Q4_K_M --slice 1/4"),
    "files of 40 GB, which llama.cpp loads as one": (
        "qwen35 gguf MODEL OUT --types Q8_0 --split-max-size 40G"
    ),
    "an adapter by itself, which llama.cpp adds to any file of the model": (
        "qwen35 gguf MODEL OUT --adapter DIR --adapter-only"
    ),
    "linear attention in Q8_0, plus the vision tower": (
        "qwen35 gguf MODEL OUT --types Q4_K_M --recipe q8-gates --mmproj"
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_model(parser, files=True)
    add_adapter(parser)
    add_onto(parser)
    parser.add_argument("--adapter-only", action="store_true", help=_ADAPTER_HELP)
    parser.add_argument("out", metavar="OUTDIR", type=Path, help="folder to write")
    add_codes(parser)
    add_types(parser, default=f"{','.join(DEFAULT_TYPES)}; F32 with --adapter-only")
    parser.add_argument(
        "--recipe", default="mix", metavar="NAME", help="mix, q8-gates, q8-gates-plus or a .toml"
    )
    add_mtp(parser)
    add_mtp_from(parser)
    parser.add_argument("--export", type=Path, metavar="FILE", help=_EXPORT_HELP)
    parser.add_argument(
        "--device",
        default="auto",
        help="where refined codes are chosen: auto (the CPU), cuda, cuda:N",
    )
    parser.add_argument("--encoder", default="auto", choices=("auto", "ggml"), help=_ENCODER_HELP)
    add_workers(parser)
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: all processors)"
    )
    parser.add_argument(
        "--memory", type=size_of, metavar="SIZE", help="use fewer threads to stay below, e.g. 400MB"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output of qwen35")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")


_ADAPTER_HELP = "write the adapter itself, for llama.cpp's --lora, instead of the merged model"

_ENCODER_HELP = (
    "what quantizes: our own kernels where there are some, or llama-cpp-python for every type "
    "(slower, the same bytes)"
)

_EXPORT_HELP = (
    "only write the types of the one quantized file, as a --tensor-type-file for stock "
    "llama-quantize"
)


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    dry = args.dry_run or args.export is not None
    result = gguf(**keywords(args), progress=None if dry else output.progress())
    if result.exported is not None:
        from qwen35.planning.gguf_files.gguf_plan import files_of

        path, kinds = result.exported
        (name,) = (file.name for file in files_of(result.plan) if file.quantized)
        output.data(f"{path}: types of {len(kinds)} tensors of {name}", result.to_json())
        return 0
    return show(result, output, dry_run=args.dry_run)
