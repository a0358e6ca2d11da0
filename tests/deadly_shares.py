"""Workers of a calibration that die: what the real ones run, but for files that say when.

They lie in the folder that ``QWEN35_DEADLY`` names, as for `deadly`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deadly import die
from qwen35.calibration.share_worker import answer
from qwen35.execution.worker_process import serve


def deadly(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job, or die when states and sums are saved and nothing is told."""
    done = answer(job)
    die()
    return done


if __name__ == "__main__":
    serve(deadly)
