"""Exit codes; 0 is success."""

from __future__ import annotations

__all__ = ["EXIT_FINDINGS", "EXIT_INTERRUPTED", "EXIT_USAGE"]

EXIT_FINDINGS = 1
"""A check has findings, or a gate is closed."""

EXIT_USAGE = 2
"""Wrong input or usage."""

EXIT_INTERRUPTED = 130
"""Interrupted by the user."""
