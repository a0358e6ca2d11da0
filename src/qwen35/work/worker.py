"""The worker: takes a job as plain JSON, does it, and says in plain JSON what came of it.

A job names the work folder, the SHA-256 of the order in it (which proves that this machine sees
the same folder), what to do, on which device and with how many threads.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Event
from typing import Any

from qwen35.checkpoint.source import Reader
from qwen35.codecs.devices import encoders_for
from qwen35.errors import InputError
from qwen35.plan.order import ORDER_NAME, SHARED, plan_from
from qwen35.plan.plan import PlannedFile
from qwen35.plan.step import Step
from qwen35.sinks.files import TensorFile, hash_file
from qwen35.work.failures import failure_json
from qwen35.work.steps import Carrier, each

__all__ = ["answer"]


def answer(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job.

    Args:
        job: ``work``, ``order``, ``device``, ``threads``, and either ``hash``: the name of a file,
            or ``file`` and ``steps``: the numbers of its steps to carry out.

    Returns:
        ``done``: the file's SHA-256, or the tensors that lie in it, on the disk, when this
        returns; or ``failure``: what went wrong (`qwen35.work.failures`).
    """
    try:
        return {"done": _do(job)}
    except Exception as error:  # noqa: BLE001 - told to the other side, which raises it
        return {"failure": failure_json(error)}


def _do(job: Mapping[str, Any]) -> Any:
    if "hash" in job:
        _order(job["work"], job["order"])
        return hash_file(Path(job["work"]) / "files" / job["hash"])
    prepared = _prepare(job["work"], job["order"], job["device"])
    file = prepared.files[job["file"]]
    return _fill(prepared, file, [file.steps[i] for i in job["steps"]], job["threads"])


@dataclass(frozen=True)
class _Prepared:
    """What the jobs of one order share."""

    folder: Path
    carrier: Carrier
    reader: Reader
    files: Mapping[str, PlannedFile]


@lru_cache(maxsize=1)
def _prepare(work: str, digest: str, device: str) -> _Prepared:
    plan = plan_from(_order(work, digest))
    files = {file.name: file for file in plan.files}
    carrier = Carrier(plan, encoders_for(device))
    return _Prepared(Path(work) / "files", carrier, Reader(plan.checkpoint), files)


@lru_cache(maxsize=1)
def _order(work: str, digest: str) -> dict[str, Any]:
    """Read the order in the work folder, if this is the one that was meant."""
    try:
        content = (Path(work) / ORDER_NAME).read_bytes()
    except OSError as error:
        here = f"not seen on {platform.node()} ({error.strerror})"
        raise InputError(work, here, hint=SHARED) from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise InputError(work, f"another folder on {platform.node()}", hint=SHARED)
    order: dict[str, Any] = json.loads(content)
    return order


def _fill(prepared: _Prepared, file: PlannedFile, steps: list[Step], threads: int) -> list[str]:
    out = TensorFile.join(prepared.folder / file.name, file.offsets)

    def pieces(step: Step) -> Iterator[int]:
        return prepared.carrier.pieces(step, out, prepared.reader)

    try:
        with ThreadPoolExecutor(threads) as pool:
            each(pool, steps, pieces, Event())
        out.sync()
    finally:
        out.close()
    return [step.outputs[0].name for step in steps]
