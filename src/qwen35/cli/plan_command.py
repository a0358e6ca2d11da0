"""Print what `convert` (or, with --types, `gguf`) would write, from headers alone.

Lists every output file with its exact bytes, every group of tensors with its role, action and
reason, and for GGUF files every tensor's type. Only headers and small files are downloaded.
"""

from __future__ import annotations

import argparse

from qwen35.api.plan_api import plan
from qwen35.cli.console import Console
from qwen35.cli.shared_flags import add_model, add_recipe, add_types, keywords
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
    "the names for --keep and recipes": "qwen35 plan --roles",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_model(parser, optional=True, sizes=True)
    add_recipe(parser, default=None)
    add_types(parser, default=None)
    parser.add_argument("--roles", action="store_true", help="print the table of roles instead")


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    if args.roles:
        _check_alone(args)
        output.data(roles_text(output.width), roles_json())
        return 0
    if args.model is None:
        raise UsageError("MODEL", "not given", hint="qwen35 plan MODEL --recipe NAME")
    planned = plan(**keywords(args, "roles", "threads", "memory"))
    threads = threads_within(lambda n: peak_memory(planned, n), args.threads, args.memory)
    container = planned.container
    output.data(container.text(planned, threads), container.json(planned, threads))
    return 0


def _check_alone(args: argparse.Namespace) -> None:
    """Refuse options that have no effect on the table of roles."""
    flags = {
        "MODEL": args.model is not None,
        "--recipe": args.recipe is not None,
        "--types": args.types is not None,
        "--keep": bool(args.keep),
        "--drop-mtp": args.drop_mtp,
        "--keep-prefix": args.keep_prefix,
        "--keep-shards": args.keep_shards,
    }
    for name, given in flags.items():
        if given:
            found = f"prints all roles, regardless of {name}"
            raise UsageError("--roles", found, hint="leave one of them out")
