"""Exit codes; 0 is success."""

from __future__ import annotations

__all__ = [
    "EXIT_FINDINGS",
    "EXIT_HANGUP",
    "EXIT_INTERRUPTED",
    "EXIT_TERMINATED",
    "EXIT_USAGE",
]

EXIT_FINDINGS = 1
"""A check has findings, or a gate is closed."""

EXIT_USAGE = 2
"""Wrong input or usage."""

EXIT_HANGUP = 129
"""Interrupted by SIGHUP: the terminal was closed."""

EXIT_INTERRUPTED = 130
"""Interrupted by the user."""

EXIT_TERMINATED = 143
"""Interrupted by SIGTERM: a batch scheduler, a container or another program asked for it."""
