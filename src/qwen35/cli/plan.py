"""Print what a conversion would write, from headers alone.

Every output file with its exact bytes, every group of tensors with its role, action and reason.
Nothing is downloaded but headers.
"""

from __future__ import annotations

import argparse

from qwen35.checkpoint.open import describe
from qwen35.cli.output import Output
from qwen35.cli.shared import add_model, add_recipe, plan_for, threads_for
from qwen35.errors import UsageError
from qwen35.plan.show import plan_json, plan_text, roles_json, roles_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_model(parser, optional=True)
    add_recipe(parser)
    parser.add_argument("--roles", action="store_true", help="print the table of roles instead")


def run(args: argparse.Namespace, output: Output) -> int:
    """Run the verb."""
    if args.roles:
        output.data(roles_text(), roles_json())
        return 0
    if args.model is None:
        raise UsageError("MODEL", "not given", hint="qwen35 plan MODEL --recipe NAME")
    plan = plan_for(describe(args.model, token=args.hf_token), args)
    threads = threads_for(plan, args)
    output.data(plan_text(plan, threads), plan_json(plan, threads))
    return 0
