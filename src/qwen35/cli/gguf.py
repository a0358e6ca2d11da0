"""Write GGUF files for llama.cpp, all in one pass over the checkpoint.

No f16 file in between and no model in memory. Files are those that llama.cpp's converter and
llama-quantize would write, byte for byte.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.checkpoint.open import describe, fetch, hub_token
from qwen35.checkpoint.source import Checkpoint
from qwen35.cli.output import Output
from qwen35.cli.shared import add_model, positive, size_of
from qwen35.errors import UsageError
from qwen35.plan.show import size
from qwen35.threads import default_threads

if TYPE_CHECKING:
    from qwen35.gguf.imatrix import Imatrix
    from qwen35.gguf.plan import GgufPlan

DEFAULT_TYPES = "F16,Q8_0,Q6_K,Q5_K_M,Q4_K_M"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_model(parser)
    parser.add_argument("out", metavar="OUTDIR", type=Path, help="folder to write")
    parser.add_argument(
        "--types", default=DEFAULT_TYPES, metavar="T,...", help="file types (default: %(default)s)"
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
    from qwen35.gguf.show import plan_json, plan_text
    from qwen35.sinks.staging import check_output

    check_output(args.out, source=None, overwrite=args.overwrite)
    if args.dry_run or args.export is not None:
        checkpoint = describe(args.model, token=args.hf_token)
    else:
        checkpoint = fetch(args.model, token=args.hf_token, extra=("README.md",))
    plan = _plan(checkpoint, args)
    if args.export is not None:
        return _export(plan, args, output)
    threads = _threads(plan, args)
    if args.dry_run:
        output.data(plan_text(plan, threads), plan_json(plan, threads))
        return 0
    from qwen35.gguf.write import write

    result = write(
        plan, args.out, overwrite=args.overwrite, threads=threads, progress=output.progress()
    )
    for note in plan.notes:
        output.info(f"note: {note}")
    output.data(
        f"{result.out}: {len(result.hashes) + 1} files, {size(result.nbytes)}",
        {"out": str(result.out), "bytes": result.nbytes, "sha256": result.hashes},
    )
    return 0


def _plan(checkpoint: Checkpoint, args: argparse.Namespace) -> GgufPlan:
    from qwen35.gguf.plan import Asked, make_plan
    from qwen35.gguf.rules import load_recipe, pattern_rules

    asked = Asked(
        types=_types(args.types),
        recipe=load_recipe(args.recipe),
        rules=pattern_rules(args.tensor_type, args.tensor_type_file),
        imatrix=imatrix_of(args),
        projector="F16" if args.mmproj else None,
        drop_mtp=args.drop_mtp,
        upstream_counters=args.upstream_counters,
    )
    return make_plan(checkpoint, asked)


def _types(text: str) -> tuple[str, ...]:
    from qwen35.gguf.types import FILE_TYPES

    names = tuple(dict.fromkeys(name.strip().upper() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in FILE_TYPES]
    if unknown or not names:
        found = f"{unknown[0]!r} is unknown" if unknown else "empty"
        raise UsageError("--types", found, expected=", ".join(FILE_TYPES))
    return names


def imatrix_of(args: argparse.Namespace) -> Imatrix | None:
    """Read what --imatrix names: a file, or one on the Hub."""
    from qwen35.checkpoint.hub import download_file
    from qwen35.gguf.imatrix import read_imatrix

    if args.imatrix is None:
        return None
    if args.imatrix.startswith("hf:"):
        path = download_file(args.imatrix.removeprefix("hf:"), hub_token(args.hf_token))
    else:
        path = Path(args.imatrix)
    return read_imatrix(path, name=args.imatrix)


def _threads(plan: GgufPlan, args: argparse.Namespace) -> int:
    from qwen35.gguf.show import peak_memory

    threads: int = args.threads or default_threads()
    if args.memory is None:
        return threads
    while threads > 1 and peak_memory(plan, threads) > args.memory:
        threads -= 1
    needed = peak_memory(plan, threads)
    if needed > args.memory:
        raise UsageError(f"--memory {size(args.memory)}", "too little", expected=size(needed))
    return threads


def _export(plan: GgufPlan, args: argparse.Namespace, output: Output) -> int:
    from qwen35.gguf.rules import exported
    from qwen35.gguf.types import quantizable
    from qwen35.sinks.staging import os_errors

    files = [file for file in plan.files if file.file_type.quantized]
    if len(files) != 1:
        raise UsageError("--export", f"{len(files)} quantized types", expected="--types with one")
    tensors = files[0].tensors
    kinds = {t.name: files[0].kinds[t.name] for t in tensors if quantizable(t.name, t.shape)}
    text = "".join(f"{line}\n" for line in exported(kinds))
    with os_errors(args.export):
        args.export.write_text(text, "utf-8")
    output.data(
        f"{args.export}: types of {len(kinds)} tensors of {files[0].name}",
        {"file": str(args.export), "tensors": kinds},
    )
    return 0
