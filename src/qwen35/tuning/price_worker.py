"""A worker of a pricing: runs windows of text through a block, or prices rows of its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwen35.checkpoint.source import Reader
from qwen35.engines.torch_model import flushed_denormals, torch_and_transformers
from qwen35.execution.failures import answered
from qwen35.execution.worker import order_in
from qwen35.execution.worker_process import serve
from qwen35.forward.forward_stream import Track
from qwen35.forward.shared_windows import shared_windows
from qwen35.forward.stream_folder import StreamFolder
from qwen35.planning.key_differences import key_differences
from qwen35.planning.manifest import work_key
from qwen35.planning.work_order import different_here, source_from
from qwen35.progress import Silent
from qwen35.tuning.pricing import InputShift
from qwen35.tuning.pricing_passes import PricingPasses, PricingSetting, digest_of
from qwen35.tuning.space import ChoiceSpace

__all__ = ["MODULE", "answer", "key_of"]

MODULE = "qwen35.tuning.price_worker"
"""This module, which a worker process runs."""


def answer(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job.

    Args:
        job: ``work``, the folder of states; ``order``, the SHA-256 of the order in it; ``device``,
            ``threads``; ``task``, the name of the ``block`` and the ``part`` of it, from the first
            to behind the last: of windows that go ``forward`` or ``back``, or of jobs that
            ``price`` rows; ``name`` of the file for products, or names of all ``products``.

    Returns:
        ``done``: for ``back``, the name and what rounding inputs costs; for ``price``, what rows
        cost. Or ``failure`` after an error.
    """
    return answered(_do, job)


def _do(job: Mapping[str, Any]) -> Any:
    torch, _ = torch_and_transformers("tune")
    torch.set_num_threads(job["threads"])
    share = _prepare(job["work"], job["order"], job["device"], job["threads"])
    return share.run(job)


@lru_cache(maxsize=1)
def _prepare(work: str, digest: str, device: str, threads: int) -> _PricingShare:
    from qwen35.planning.gguf_files.imatrix import read_imatrix  # late: only GGUF needs it

    order = order_in(work, digest)
    path, name = order["imatrix"] or ("", "")
    imatrix = read_imatrix(Path(path), name=name) if path else None
    checkpoint = source_from(order)
    space = ChoiceSpace(checkpoint, order["format"], tuple(order["choices"]), imatrix)
    setting = PricingSetting(**{**order["setting"], "windows": shared_windows(work)})
    names = key_differences(order["key"], key_of(space))
    planned = digest_of(setting.plan(checkpoint), space, setting, order["identity"])
    if names or planned != order["plan"]:
        raise different_here(order, names)
    own = replace(setting, device=device, threads=threads)
    return _PricingShare(order["plan"], Path(work), space, own)


def key_of(space: ChoiceSpace) -> dict[str, Any]:
    """Return what this machine must have in common with others, as plain values."""
    key = work_key(space.plan)
    key["tool version"] |= {name: version(name) for name in ("torch", "transformers")}
    plain: dict[str, Any] = json.loads(json.dumps(key))
    return plain


class _PricingShare:
    """What all jobs of a run have in common, and the block that was built last."""

    def __init__(
        self, digest: str, folder: Path, space: ChoiceSpace, setting: PricingSetting
    ) -> None:
        self._torch, _ = torch_and_transformers("tune")
        self._work, plan = (
            StreamFolder(folder, digest, restart=False),
            setting.plan(space.checkpoint),
        )
        self._passes = PricingPasses(
            self._torch, plan, space, setting, self._work, Reader(plan.checkpoint), Silent()
        )
        self._blocks = {block.name: block for block in plan.blocks}
        self._built: dict[tuple[str, str], Any] = {}

    def run(self, job: Mapping[str, Any]) -> Any:
        """Do a job."""
        task, block, part = job["task"], job["block"], range(*job["part"])
        visitor = self._passes.visitor
        try:
            if task == "price":
                self._built.clear()
                visitor.open(block, parts=job["products"])
                return [asdict(one) for one in visitor.found(block, part)]
            mode = nullcontext() if task == "back" else self._torch.inference_mode()
            with mode, flushed_denormals(self._torch):
                return self._through(job, part)
        finally:
            visitor.close()
            # Opened anew by each job: on a network file system that shows what others have written.
            self._work.close()

    def _through(self, job: Mapping[str, Any], part: range) -> tuple[str, list[InputShift]]:
        """Run windows through a block; save their states or gradients, and products."""
        task, block, stream = job["task"], self._blocks[job["block"]], self._passes.stream
        key = task, block.name
        if key not in self._built:
            self._built.clear()  # at most one block is in memory
            self._built[key] = self._passes.builder.build(block)
        shifts: list[InputShift] = []
        if task == "forward":
            stream.forward.through(Track(), block, self._built[key], job["number"], part)
        else:
            self._passes.visitor.open(block.name, job["name"])
            stream.through(block, self._built[key], part)
            shifts = self._passes.visitor.keep()
        self._work.flush()
        return job["name"], shifts


if __name__ == "__main__":
    serve(answer)
