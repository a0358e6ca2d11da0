"""Workers that die: what `qwen35.work.process` runs, but for a file that says when.

In the folder that ``QWEN35_DEADLY`` names, ``kill`` holds how many jobs kill their worker; each
death leaves a file there.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen35.work.process import serve
from qwen35.work.worker import answer


def deadly(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job, or die in the middle of it: when its bytes are written and nothing is told."""
    done = answer(job)
    folder = Path(os.environ["QWEN35_DEADLY"])
    wanted = os.environ.get("QWEN35_DEADLY_TENSOR", "")
    if "steps" in job and (not wanted or wanted in done["done"]):
        for i in range(int((folder / "kill").read_text())):
            try:
                (folder / f"death{i}").touch(exist_ok=False)
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)
    return done


if __name__ == "__main__":
    serve(deadly)
