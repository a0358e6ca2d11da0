"""Arguments that several verbs share, and what they mean."""

from __future__ import annotations

import argparse

from qwen35.checkpoint.source import Checkpoint
from qwen35.plan.plan import Plan, make_plan
from qwen35.plan.recipe import BUILT_IN, load_recipe

__all__ = ["add_model", "add_recipe", "plan_for", "positive"]


def positive(text: str) -> int:
    """Parse a positive integer; argparse prints the refusal."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def add_model(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add MODEL and --hf-token."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?" if optional else None,
        help="folder, Hub id (owner/name[@revision]) or, to plan, a published size",
    )
    parser.add_argument("--hf-token", metavar="TOKEN", help="Hub token (default: HF_TOKEN)")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add --recipe and what adjusts it."""
    parser.add_argument(
        "--recipe", default="nf4", metavar="NAME", help=f"{', '.join(BUILT_IN)} or a .toml file"
    )
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="ROLE",
        help="leave these tensors unquantized as well; may be given several times",
    )
    parser.add_argument("--drop-mtp", action="store_true", help="drop the MTP layer")
    parser.add_argument(
        "--keep-prefix",
        action="store_true",
        help="text-only: leave tensors under model.language_model.",
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: all processors)"
    )


def plan_for(checkpoint: Checkpoint, args: argparse.Namespace) -> Plan:
    """Plan `checkpoint` as the arguments ask."""
    recipe = load_recipe(args.recipe).keeping(tuple(args.keep))
    if args.drop_mtp:
        recipe = recipe.dropping_mtp()
    return make_plan(checkpoint, recipe, keep_prefix=args.keep_prefix)
