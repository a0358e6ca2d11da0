"""Workers that die or are slow: what the real ones run, but for files that say when.

They lie in the folder that ``QWEN35_DEADLY`` names: ``kill`` holds how many jobs kill their worker
(each death leaves a file), ``tensor``, if it is there, the tensor whose jobs do.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patience import PATIENCE
from qwen35.execution.worker import answer
from qwen35.execution.worker_process import serve

if TYPE_CHECKING:
    import pytest


def deadly(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job, or die when its bytes are written and nothing is told."""
    done = answer(job)
    tensor = Path(os.environ["QWEN35_DEADLY"]) / "tensor"
    if "steps" in job and (not tensor.exists() or _names(done, tensor.read_text())):
        die()
    return done


def die() -> None:
    """Kill this process, unless as many as are told have died."""
    folder = Path(os.environ["QWEN35_DEADLY"])
    for i in range(int((folder / "kill").read_text())):
        try:
            (folder / f"death{i}").touch(exist_ok=False)
        except FileExistsError:
            continue
        os.kill(os.getpid(), signal.SIGKILL)


def dying(patch: pytest.MonkeyPatch, folder: Path, count: int, tensor: str = "") -> Path:
    """Make workers die at so many jobs; returns `folder`, in which each death leaves a file."""
    folder.mkdir()
    (folder / "kill").write_text(str(count))
    if tensor:
        (folder / "tensor").write_text(tensor)
    patch.setenv("QWEN35_DEADLY", str(folder))
    patch.setenv("PYTHONPATH", str(Path(__file__).parent))
    patch.setattr("qwen35.execution.process_pool.MODULE", "deadly")
    return folder


def _names(done: Mapping[str, Any], tensor: str) -> bool:
    return any(tensor in names for names in done["done"]["tensors"].values())


def slow(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job on the processor; note on which node of Ray, and its GPU.

    It waits for a job elsewhere, so that one node, or one GPU, does not do all while the other
    starts; and is a little late, so that it can be killed in between.
    """
    import ray

    node = ray.get_runtime_context().get_node_id()
    what = job.get("steps"), job.get("hash")
    line = [node, os.environ.get("CUDA_VISIBLE_DEVICES"), *what]
    log = Path(os.environ["QWEN35_DEADLY"]) / "log"
    with log.open("a") as file:
        file.write(f"{json.dumps(line)}\n")
    for _ in range(20 * PATIENCE):
        if len({tuple(json.loads(row)[:2]) for row in log.read_text().splitlines()}) > 1:
            break
        time.sleep(0.05)
    time.sleep(0.15)
    return answer({**job, "device": "cpu"})


def absent(job: Mapping[str, Any]) -> dict[str, Any]:
    """Fail as where this package is not installed."""
    raise ModuleNotFoundError("No module named 'qwen35'")


if __name__ == "__main__":
    serve(deadly)
