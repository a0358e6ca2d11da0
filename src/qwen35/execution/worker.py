"""The worker: runs a job given as plain JSON and returns its result as plain JSON.

A job names the work folder, the SHA-256 of the order in it (proof that this machine sees the same
folder), the work, the device and the number of threads.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qwen35.checkpoint.source import FolderReader, Reader
from qwen35.codecs.devices import kernels_for
from qwen35.errors import InputError, Qwen35Error
from qwen35.execution.failures import answered
from qwen35.execution.judging import compare_steps
from qwen35.execution.step_runner import StepRunner, ThreadCrew
from qwen35.execution.window import RangeReader
from qwen35.planning.output_plan import Plan
from qwen35.planning.rows import RowSpan
from qwen35.planning.step import Step, StepTarget
from qwen35.planning.work_order import SHARED, plan_from
from qwen35.sinks.checksums import PieceSums
from qwen35.sinks.files import TensorFile, hash_file
from qwen35.sinks.tensor_writer import noted
from qwen35.sinks.work_folder import FILES_NAME, ORDER_NAME

__all__ = ["answer", "order_in"]


def answer(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run a job.

    Args:
        job: ``work``, ``order``, ``device``, ``threads``, and either ``hash``, the name of a file,
            or ``steps``, the numbers of steps in `Plan.written`.

    Returns:
        ``done``: the file's SHA-256; or ``tensors``, the flushed pieces by file (first tensor to
        checksum), and ``compared``, the results of the check if the order asks for one. After an
        error, ``failure`` instead (`qwen35.execution.failures`).
    """
    return answered(_do, job)


def _do(job: Mapping[str, Any]) -> Any:
    if "hash" in job:
        order_in(job["work"], job["order"])
        return hash_file(Path(job["work"]) / FILES_NAME / job["hash"])
    prepared = _prepare(job["work"], job["order"], job["device"])
    steps = prepared.plan.written
    return prepared.fill([steps[i] for i in job["steps"]], job["threads"])


@lru_cache(maxsize=1)  # all jobs of a run share one plan, which takes seconds for large models
def _prepare(work: str, digest: str, device: str) -> _Prepared:
    order = order_in(work, digest)
    plan = plan_from(order)
    plan.container.prepare(plan)
    runner, reader = StepRunner(plan, kernels_for(device)), Reader(plan.checkpoint)
    return _Prepared(plan, Path(work) / FILES_NAME, runner, reader, bool(order["check"]))


@lru_cache(maxsize=1)
def order_in(work: str, digest: str) -> dict[str, Any]:
    """Read the order in a work folder, and check its SHA-256.

    Raises:
        InputError: this machine does not see the folder.
    """
    try:
        content = (Path(work) / ORDER_NAME).read_bytes()
    except OSError as error:
        here = f"not seen on {platform.node()} ({error.strerror})"
        raise InputError(work, here, hint=SHARED) from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise InputError(work, f"another folder on {platform.node()}", hint=SHARED)
    order: dict[str, Any] = json.loads(content)
    return order


@dataclass(frozen=True)
class _Prepared:
    """Shared state of an order's jobs."""

    plan: Plan
    folder: Path
    runner: StepRunner
    reader: Reader
    check: bool

    def fill(self, steps: Sequence[Step], threads: int) -> dict[str, Any]:
        """Run steps, flush what they wrote and, if the order says so, compare it."""
        names = dict.fromkeys(file for step in steps for file in step.files)
        planned = {file.name: file for file in self.plan.files if file.name in names}
        with ExitStack() as stack, ThreadPoolExecutor(threads) as pool:
            files = {
                name: TensorFile.join(self.folder / name, planned[name].offsets) for name in names
            }
            for file in files.values():
                stack.callback(file.close)

            sums = PieceSums()

            def write(target: StepTarget, name: str, offset: int, data: memoryview) -> None:
                sums.add(target.outputs, target.files, name, offset, data)
                for file in target.files:
                    files[file].write(name, offset, data)

            self._run(steps, write, pool, threads)
            for file in files.values():
                file.sync()
            compared = {}
            if self.check:
                written = stack.enter_context(FolderReader(self.folder))
                compared = compare_steps(steps, planned, written, self.reader, pool)
        tensors: dict[str, dict[str, str]] = {name: {} for name in names}
        for step in steps:
            for target in step.targets:
                digits = self.runner.refiners.take(step, target)
                checksum = noted(sums.take(target.outputs, target.files), digits)
                for name in target.files:
                    tensors[name][target.outputs[0].name] = checksum
        return {"tensors": tensors, "compared": compared}

    def _run(
        self, steps: Sequence[Step], write: Any, pool: ThreadPoolExecutor, threads: int
    ) -> None:
        errors: list[Qwen35Error] = []

        def range_reader(step: Step, span: RowSpan) -> RangeReader:
            def run(reader: FolderReader) -> Iterator[int]:
                return self.runner.run(step, span, write, reader)

            return RangeReader(0, *step.rows.bounds(span), (0, 0), run)

        readers = [range_reader(step, span) for step in steps for span in self.runner.spans(step)]
        crew = ThreadCrew(readers, lambda _, error: errors.append(error), lambda _: bool(errors))
        crew.run(pool, threads, self.reader)
        for error in errors:
            raise error
