"""Verify a Qwen3.5 checkpoint, pictures included (now: qwen35 verify --depth behaviour).

Config, load, precision, a picture, then questions with thinking off and on. Answers are checked,
and the exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse

from qwen35.cli.console import Console
from qwen35.cli.old.old_verify import add_arguments, stages

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the command."""
    return stages(args, output, image=True)
