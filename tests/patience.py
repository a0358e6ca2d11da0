"""How long a test waits for what may hang.

A machine that is busy with other things may take many times as long as usual. So a limit is only
there for what would never end, and no test fails because of how long something took; where speed
is what a test is about, it measures time of the processor.
"""

from __future__ import annotations

__all__ = ["PATIENCE"]

PATIENCE = 3600
"""Seconds."""
