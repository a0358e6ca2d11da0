"""A worker of a calibration: runs some windows of text through one block."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self

from qwen35.calibration.calibration_plan import CalibrationPlan, CalibrationRequest, make_plan
from qwen35.calibration.calibration_stream import BlockRecord, calibration_stream
from qwen35.calibration.hessian_inputs import Matrix, PlannedInput, passed_matrices
from qwen35.calibration.hessian_record import HessianRecord
from qwen35.calibration.states import CalibrationFolder
from qwen35.calibration.sums import Sums
from qwen35.calibration.text_windows import TextWindows
from qwen35.checkpoint.source import Reader
from qwen35.engines.torch_model import torch_and_transformers
from qwen35.execution.failures import answered
from qwen35.execution.worker import order_in
from qwen35.execution.worker_process import serve
from qwen35.forward.forward_stream import ForwardStream, Track
from qwen35.forward.shared_windows import shared_windows
from qwen35.planning.key_differences import key_differences
from qwen35.planning.work_order import different_here, source_from
from qwen35.progress import Silent

__all__ = ["MODULE", "answer"]

MODULE = "qwen35.calibration.share_worker"
"""This module, which a worker process runs."""


def answer(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job.

    Args:
        job: ``work``, the folder of hidden states; ``order``, the SHA-256 of the order in it;
            ``device``, ``threads``; ``block``, ``number`` of the files that it reads, and the
            ``windows``, from the first to behind the last; with Hessians ``wanted``, the experts
            that this pass is for, null in the first, and ``part``, the name of a file.

    Returns:
        ``done`` when hidden states and sums are saved, with the tokens that Hessians are of in the
        first pass; or ``failure`` after an error.
    """
    return answered(_do, job)


def _do(job: Mapping[str, Any]) -> list[tuple[str, int | None, int, int]]:
    torch, _ = torch_and_transformers("calibrate")
    torch.set_num_threads(job["threads"])
    share = _prepare(job["work"], job["order"], job["device"])
    products = _Products.of(job) if "part" in job else None
    return share.run(job["block"], job["number"], range(*job["windows"]), products)


class _Products(NamedTuple):
    """What Hessians are made of, as a job asks for it.

    Args:
        wanted: experts to sum up; None in the first pass.
        file: the name of the file for the sums.
    """

    wanted: list[Matrix] | None
    file: str

    @classmethod
    def of(cls, job: Mapping[str, Any]) -> Self:
        """Return what a job asks for."""
        wanted = job["wanted"]
        return cls(None if wanted is None else [Matrix(*one) for one in wanted], job["part"])


@lru_cache(maxsize=1)
def _prepare(work: str, digest: str, device: str) -> _Share:
    order, folder = order_in(work, digest), Path(work)
    windows = shared_windows(work)
    files = tuple((name, hashed) for name, hashed in order["files"])
    text = TextWindows(windows, files, order["left_over"])
    plan = make_plan(source_from(order), text, CalibrationRequest(**order["request"]))
    if plan.digest != order["plan"]:
        raise different_here(order, key_differences(order["provenance"], plan.provenance))
    return _Share(plan, folder, device)


class _Share:
    """What all jobs of a run have in common, and the block that was built last."""

    def __init__(self, plan: CalibrationPlan, folder: Path, device: str) -> None:
        self._plan, self._folder, self._device = plan, folder, device
        self._reader = Reader(plan.checkpoint)
        self._blocks = {block.name: block for block in plan.blocks}
        self._built: dict[str, Any] = {}

    def run(
        self,
        name: str,
        number: int,
        windows: range,
        products: _Products | None,
    ) -> list[tuple[str, int | None, int, int]]:
        """Run windows through a block; save their states and sums.

        Args:
            name: of the block.
            number: of the files that it reads.
            windows: from the first of a batch on.
            products: to sum up too.

        Returns:
            What products are of in the first pass: name, expert, fitting and held-out tokens.
        """
        # Opened anew for each job: on a network file system that shows what others have written.
        with CalibrationFolder(self._folder, self._plan.digest, restart=False) as work:
            stream = calibration_stream(self._plan, work, self._reader, self._device, Silent())
            block, sink = self._blocks[name], None
            if products is not None:
                sink = self._record(stream, name, products.wanted)
            record = BlockRecord(sink)
            if name not in self._built:
                self._built.clear()  # at most one block is in memory
                self._built[name] = stream.builder.build(block)
            batches: list[dict[str, Sums]] = []
            track = Track(passed=record.taken, merge=batches.append)
            with record.of(block, self._built[name]), stream.torch.inference_mode():
                stream.through(track, block, self._built[name], number, windows)
            work.flush()
            first = products is None or products.wanted is None
            if first:  # it is the same in each pass
                work.save_part(name, windows.start, batches)
            if products is None or sink is None:
                return []
            columns = passed_matrices(self._inputs(name), products.wanted)
            work.save_products(products.file, sink.sums, columns, stream.torch)
            return [(*matrix, *tokens) for matrix, tokens in sink.tokens.items() if first]

    def _inputs(self, name: str) -> Mapping[str, PlannedInput]:
        assert self._plan.hessians is not None
        return self._plan.hessians.inputs[name]

    def _record(
        self, stream: ForwardStream, name: str, wanted: list[Matrix] | None
    ) -> HessianRecord:
        inputs, device = self._inputs(name), self._device
        return HessianRecord(stream.torch, device, inputs, lambda: stream.passing, wanted)


if __name__ == "__main__":
    serve(answer)
