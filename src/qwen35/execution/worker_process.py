"""A worker process: reads jobs and writes answers as lines of JSON.

It exits as soon as its input ends, because the run that started it is over or dead.
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
    """Answer jobs until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print: keep that out of the answers
    jobs: SimpleQueue[str] = SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            jobs.put(line)
        os._exit(0)  # in the middle of a job too: its tasks are not in the journal yet

    # a thread, not PR_SET_PDEATHSIG, which is tied to the thread that started this process
    Thread(target=listen, daemon=True).start()
    while True:
        answers.write(f"{json.dumps(work(json.loads(jobs.get())))}\n")
        answers.flush()


if __name__ == "__main__":
    serve(answer)
