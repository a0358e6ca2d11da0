"""The command, with little patience for a Hub that does not answer."""

from __future__ import annotations

from collections.abc import Sequence

from qwen35.checkpoint import hub
from qwen35.cli.main import main as qwen35

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Run a command line."""
    hub.ANSWER_SECONDS = 0.3
    return qwen35(argv)
