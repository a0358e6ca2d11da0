"""Print what `convert` (or, with --types, `gguf`) would write, from headers alone.

Lists every output file with its exact bytes, every group of tensors with its role, action and
reason, and for GGUF files every tensor's type. Only headers and small files are downloaded.
"""

from __future__ import annotations

import argparse

from qwen35.api.plan_api import DEFAULT_CONTEXT, plan, types_that_fit
from qwen35.cli.console import Console
from qwen35.cli.shared_flags import (
    add_adapter,
    add_model,
    add_mtp_from,
    add_onto,
    add_recipe,
    add_types,
    keywords,
    size_of,
)
from qwen35.cli.write_summary import show_plan
from qwen35.errors import UsageError
from qwen35.planning.memory import peak_memory, threads_within
from qwen35.planning.safetensors_files.safetensors_display import roles_json, roles_text

EXAMPLES = {
    "every file and tensor of NF4, to the byte, without a download": (
        "qwen35 plan Qwen3.5-9B --recipe nf4"
    ),
    "the same without the vision tower, and one group of weights in bf16": (
        "qwen35 plan Qwen/Qwen3.5-9B --recipe text-nf4 --keep self_attn"
    ),
    "GGUF files, and their sizes with the other built-in recipes": (
        "qwen35 plan Qwen3.5-9B --types Q8_0,Q4_K_M"
    ),
    "the GGUF types that fit a memory with a context": (
        "qwen35 plan Qwen3.5-9B --fit 6GB --context 32k"
    ),
    "the names for --keep and recipes": "qwen35 plan --roles",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_model(parser, optional=True, sizes=True, files=True)
    add_adapter(parser)
    add_onto(parser)
    add_mtp_from(parser)
    add_recipe(parser, default=None)
    add_types(parser, default=None)
    parser.add_argument(
        "--fit",
        type=size_of,
        metavar="SIZE",
        help="list the GGUF types that fit a memory, e.g. 6GB, with cache, state and --mmproj",
    )
    parser.add_argument(
        "--context",
        type=_tokens,
        metavar="N",
        help="with --fit: tokens of context, e.g. 8192 or 32k (default: 32k)",
    )
    parser.add_argument("--roles", action="store_true", help="print the table of roles instead")


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    if args.roles:
        _check_alone(args)
        output.data(roles_text(output.width), roles_json())
        return 0
    if args.model is None:
        raise UsageError("MODEL", "not given", hint="qwen35 plan MODEL --recipe NAME")
    if args.fit is not None:
        return _show_fitting(args, output)
    if args.context is not None:
        raise UsageError("--context", "has no effect without --fit", hint="leave it out")
    planned = plan(**keywords(args, "roles", "fit", "context", "threads", "memory"))
    threads = threads_within(lambda n: peak_memory(planned, n), args.threads, args.memory)
    show_plan(planned, threads, output)
    return 0


def _tokens(text: str) -> int:
    """Parse a number of tokens, such as ``8192`` or ``32k``; argparse prints the error."""
    number, unit = (text[:-1], 1024) if text[-1:].lower() == "k" else (text, 1)
    if not (number.isascii() and number.isdecimal() and len(number) < 10):
        tokens = 0
    else:
        tokens = int(number) * unit
    if not 0 < tokens < 2**31:
        expected = "tokens such as 8192 or 32k, below 2**31"
        raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")
    return tokens


def _show_fitting(args: argparse.Namespace, output: Console) -> int:
    """Print the types that fit a memory."""
    from qwen35.planning.gguf_files.memory_fit import fit_text

    others = (
        *("types", "keep", "keep_prefix", "keep_shards", "layout", "activations", "adapter"),
        *("onto", "mtp_from", "mtp_type", "split_max_size", "threads", "memory"),
    )
    for name in others:
        if getattr(args, name):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(flag, "has no effect with --fit", hint="leave it out")
    args.context = args.context or DEFAULT_CONTEXT
    found = types_that_fit(**keywords(args, "roles", *others))
    output.notes(found.notes)
    output.data(fit_text(found), found.to_json())
    return 0


def _check_alone(args: argparse.Namespace) -> None:
    """Refuse options that have no effect on the table of roles."""
    flags = {
        "MODEL": args.model is not None,
        "--recipe": args.recipe is not None,
        "--types": args.types is not None,
        "--fit": args.fit is not None,
        "--context": args.context is not None,
        "--keep": bool(args.keep),
        "--mtp": args.mtp is not None,
        "--drop-mtp": args.drop_mtp,
        "--keep-prefix": args.keep_prefix,
        "--keep-shards": args.keep_shards,
    }
    for name, given in flags.items():
        if given:
            found = f"prints all roles, regardless of {name}"
            raise UsageError("--roles", found, hint="leave one of them out")
