"""Arguments that several verbs share, and what they mean."""

from __future__ import annotations

import argparse

from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.fp8 import Calibration
from qwen35.errors import UsageError
from qwen35.plan.activations import Activations
from qwen35.plan.plan import Plan, make_plan
from qwen35.plan.recipe import BUILT_IN, load_recipe
from qwen35.plan.show import peak_memory, size
from qwen35.threads import default_threads

__all__ = ["add_model", "add_recipe", "count", "plan_for", "positive", "size_of", "threads_for"]


def positive(text: str) -> int:
    """Parse a positive integer; argparse prints the refusal."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def count(text: str) -> int:
    """Parse an integer that is not negative; argparse prints the refusal."""
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def size_of(text: str) -> int:
    """Parse a size such as ``400MB`` or ``1.5GiB``; argparse prints the refusal.

    >>> size_of("400MB"), size_of("1.5GiB"), size_of("123")
    (400000000, 1610612736, 123)
    """
    units = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    for unit, factor in units.items():
        if text.lower().endswith(unit.lower()):
            return round(min(float(text[: -len(unit)]), 1e9) * factor)
    return int(text)


def threads_for(plan: Plan, args: argparse.Namespace) -> int:
    """Return the number of threads to use, within --memory if that was given.

    Raises:
        UsageError: one thread alone needs more memory.
    """
    threads = args.threads or default_threads()
    if args.memory is None:
        return threads
    while threads > 1 and peak_memory(plan, threads) > args.memory:
        threads -= 1
    needed = peak_memory(plan, threads)
    if needed > args.memory:
        raise UsageError(f"--memory {size(args.memory)}", "too little", expected=f"{size(needed)}")
    return threads


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
    parser.add_argument(
        "--memory", type=size_of, metavar="SIZE", help="use fewer threads to stay below, e.g. 400MB"
    )


def plan_for(
    checkpoint: Checkpoint,
    args: argparse.Namespace,
    calibration: Calibration | None = None,
    activations: Activations | None = None,
) -> Plan:
    """Plan `checkpoint` as the arguments ask."""
    recipe = load_recipe(args.recipe).keeping(tuple(args.keep))
    if args.drop_mtp:
        recipe = recipe.dropping_mtp()
    return make_plan(
        checkpoint,
        recipe,
        keep_prefix=args.keep_prefix,
        calibration=calibration,
        activations=activations,
    )
