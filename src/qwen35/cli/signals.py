"""Signals that end a command as Ctrl-C does: with a sentence, and nothing left behind.

Batch schedulers, containers and `timeout` send SIGTERM before they kill; closed terminals send
SIGHUP.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

from qwen35.cli.exits import EXIT_HANGUP, EXIT_TERMINATED

__all__ = ["REPEATED_SECONDS", "SignalInterrupt", "raise_on_signals"]

_CODES = {signal.SIGHUP: EXIT_HANGUP, signal.SIGTERM: EXIT_TERMINATED}

REPEATED_SECONDS = 1.0
"""`timeout` and others signal a process and its group: the second must not end the tidying."""


class SignalInterrupt(KeyboardInterrupt):
    """A signal asks the command to end.

    Args:
        number: the signal's.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__()
        self.name = number.name
        self.code = _CODES[number]


def raise_on_signals() -> None:
    """Raise `SignalInterrupt` in the main thread for signals that would end the process at once.

    Signals that the caller ignores stay ignored: `nohup` does so with SIGHUP.
    """
    raised = -REPEATED_SECONDS

    def raise_it(number: int, _: FrameType | None) -> None:
        nonlocal raised
        before, raised = raised, time.monotonic()
        if raised - before >= REPEATED_SECONDS:
            raise SignalInterrupt(signal.Signals(number))

    for number in _CODES:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, raise_it)
