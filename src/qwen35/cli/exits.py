"""Exit codes; 0 is fine."""

from __future__ import annotations

__all__ = ["EXIT_FINDINGS", "EXIT_INTERRUPTED", "EXIT_USAGE"]

EXIT_FINDINGS = 1
"""Something was found, or a gate is closed."""

EXIT_USAGE = 2
"""The input or the usage is wrong."""

EXIT_INTERRUPTED = 130
"""The user stopped it."""
