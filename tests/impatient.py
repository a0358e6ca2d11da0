"""The command, with little patience for a Hub that does not answer."""

from __future__ import annotations

from collections.abc import Sequence

from qwen35.checkpoint import hub_listing, hub_session
from qwen35.cli.main import main as qwen35

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Run a command line.

    A server that is asked for 1,000 entries or a megabyte has answered at length.
    """
    hub_session.READ_SECONDS = hub_session.CHANGE_SECONDS = 0.3
    hub_session.BODY_SECONDS, hub_session.SLOW_SECONDS = 1.0, 0.2
    hub_session.ANSWER_BYTES, hub_listing.MAX_ENTRIES = 10**6, 1000
    return qwen35(argv)
