"""Verify a Qwen3.5 checkpoint, including vision (now: qwen35 verify --depth behaviour).

Checks config, loading and precision, then asks about an image and questions with thinking off and
on. The exit code is 1 if an answer or anything else is wrong.
"""

from __future__ import annotations

import argparse

from qwen35.cli.console import Console
from qwen35.cli.old.old_verify import add_arguments, stages

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the command."""
    return stages(args, output, image=True)
