"""Sync a folder with a Hub repository (now: qwen35 publish DIR REPO).

  init    create the repository if needed; upload new and changed files (default)
  files   upload the files named with --files
  diff    upload new and changed files
  check   show what diff would do
  pull    download new and changed files
  fetch   show what pull would do

Unlike the original, it deletes files that only one side has only with --delete.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen35.cli.publish_command import add_options, run

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--local",
        dest="folder",
        metavar="DIR",
        type=Path,
        default=Path("./Qwen3.5-0.8B-bnb-4bit"),
        help="folder of the artifact (default: ./%(default)s)",
    )
    parser.add_argument("--repo", metavar="USER/NAME", required=True, help="repository")
    add_options(parser)
