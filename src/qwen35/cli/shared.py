"""Arguments that several verbs share, and what they mean."""

from __future__ import annotations

import argparse
from typing import Any

from qwen35.model.sizes import PUBLISHED
from qwen35.plan.recipe import BUILT_IN
from qwen35.shown import bytes_of

__all__ = [
    "add_model",
    "add_recipe",
    "count",
    "keywords",
    "positive",
    "size_of",
]


def positive(text: str) -> int:
    """Parse a positive integer; argparse prints the refusal."""
    return _number(text, 1, "a positive number")


def count(text: str) -> int:
    """Parse an integer that is not negative; argparse prints the refusal."""
    return _number(text, 0, "a number, or 0")


def _number(text: str, least: int, expected: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")
    return value


def size_of(text: str) -> int:
    """Parse a size such as ``400MB`` or ``1.5GiB``; argparse prints the refusal."""
    try:
        return bytes_of(text)
    except ValueError as error:
        expected = "a size such as 400MB or 1.5GiB"
        raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}") from error


def keywords(args: argparse.Namespace, *without: str) -> dict[str, Any]:
    """Return a command's arguments as the keywords of the function of the same name."""
    own = ("json", "quiet", *without)
    return {name: value for name, value in vars(args).items() if name not in own}


def add_model(
    parser: argparse.ArgumentParser, *, optional: bool = False, sizes: bool = False
) -> None:
    """Add MODEL and --hf-token.

    Args:
        parser: to add to.
        optional: whether MODEL may be left out.
        sizes: whether it may be a published size, which has no weights.
    """
    published = f", or a published size: {', '.join(PUBLISHED)}" if sizes else ""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?" if optional else None,
        help=f"folder or Hub id (owner/name[@revision]){published}",
    )
    parser.add_argument("--hf-token", metavar="TOKEN", help="Hub token (default: HF_TOKEN)")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add --recipe and what adjusts it."""
    parser.add_argument(
        "--recipe",
        default="nf4",
        metavar="NAME",
        help=f"{', '.join(BUILT_IN)} or a .toml file (default: nf4)",
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
