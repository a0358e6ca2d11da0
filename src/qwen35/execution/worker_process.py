"""A worker process: jobs come in and answers go out as lines of JSON.

When its input ends, because the run that began it is over or dead, it ends at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from threading import Thread
from typing import Any

from qwen35.execution.worker import answer

__all__ = ["serve"]


def serve(work: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    """Answer jobs until there is nobody to answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    jobs: SimpleQueue[str] = SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            jobs.put(line)
        os._exit(0)

    Thread(target=listen, daemon=True).start()
    while True:
        answers.write(f"{json.dumps(work(json.loads(jobs.get())))}\n")
        answers.flush()


if __name__ == "__main__":
    serve(answer)
