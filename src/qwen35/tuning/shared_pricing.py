"""Pricing by workers: windows of text are shared out, then rows of weights.

Workers leave what products read and their gradients in the work folder, as one process does; others
price rows of weights from all of it, so that each candidate is encoded once. A price is a number
whose sum has one order, whoever found its parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from qwen35.errors import InputError
from qwen35.execution.dispatch import WorkerJob, WorkerPool, dispatch
from qwen35.forward.blocks import HEAD, Block
from qwen35.forward.shared_windows import share_out, shares
from qwen35.planning.work_order import SHARED, source_order
from qwen35.sinks.staging import os_errors
from qwen35.tuning.price_worker import key_of
from qwen35.tuning.pricing import EMBEDDINGS, FoundPrices, InputShift
from qwen35.tuning.pricing_passes import PricingPasses, PricingSetting

if TYPE_CHECKING:
    from qwen35.planning.gguf_files.imatrix import Imatrix

__all__ = ["run_shared_pricing", "write_order"]


def write_order(
    passes: PricingPasses, setting: PricingSetting, identity: str, digest: str
) -> dict[str, Any]:
    """Write what workers need into the work folder; return what all jobs have in common.

    Raises:
        InputError: the source has no local weights.
    """
    space = passes.space
    order = {
        **source_order(passes.plan.checkpoint),
        "format": space.format,
        "choices": space.choices,
        "imatrix": _file_of(space.imatrix) if space.imatrix else None,
        "setting": {**asdict(setting), "windows": None},
        "identity": identity,
        "plan": digest,
        "key": key_of(space),
    }
    return share_out(passes.work.folder, order, setting.windows)


def _file_of(imatrix: Imatrix) -> list[str]:
    """Return the path and the name of an importance matrix."""
    if imatrix.path is None:
        raise InputError(imatrix.name, "was not read from a file", hint=SHARED)
    return [str(imatrix.path.absolute()), imatrix.name]


def run_shared_pricing(passes: PricingPasses, order: dict[str, Any], pool: WorkerPool) -> None:
    """Have workers run every unfinished block, forward and back.

    Args:
        passes: of this process, which looks up embeddings and adds up prices.
        order: what all jobs have in common.
        pool: the workers.

    Raises:
        WorkerError: the workers of a job died at every attempt.
        Qwen35Error: as in one process.
    """
    stream, sizes = passes.stream, passes.plan.sizes
    shared = _SharedBlocks(passes, order, pool)
    with stream.forward.torch.inference_mode():
        left = stream.forward.begin()
    for block in left:
        shared.windows(block, "forward", sizes.wide or sizes.batch)
        stream.forward.finish(block)
    for block in stream.begin():
        told = shared.windows(block, "back", passes.plan.group if block.name == HEAD else 1)
        shifts = [shift for _, part in told for shift in part]
        shared.price(block.name, [name for name, _ in told], shifts)
        stream.finish(block)
        shared.forget(block.name)
    if stream.embeddings_left:
        name = f"{EMBEDDINGS}{_PRODUCTS}"
        passes.visitor.open(EMBEDDINGS, name)
        stream.embeddings()
        passes.visitor.keep()
        shared.price(EMBEDDINGS, [name], [])
        stream.finish_embeddings()
        shared.forget(EMBEDDINGS)


_PRODUCTS = ".products"


class _SharedBlocks:
    """The work on one block after the other."""

    def __init__(self, passes: PricingPasses, order: dict[str, Any], pool: WorkerPool) -> None:
        self._passes, self._order, self._pool = passes, order, pool

    def windows(self, block: Block, task: str, unit: int) -> list[tuple[str, list[InputShift]]]:
        """Have all windows pass a block; return what each share left, in their order.

        Args:
            block: the block.
            task: ``forward`` or ``back``.
            unit: windows that stay together.
        """
        parts = list(shares(self._passes.plan.windows, self._pool.slots, unit))
        requests = [
            {
                "task": task,
                "block": block.name,
                "number": self._passes.stream.forward.current,
                "part": [part.start, part.stop],
                # Another name for each run: one that was interrupted may still write.
                "name": f"{block.name}.{uuid4().hex}{_PRODUCTS}",
            }
            for part in parts
        ]
        names = [f"{block.name}, chunks {one.start + 1} to {one.stop}" for one in parts]
        return [(name, _shifts(told)) for name, told in self._done(names, requests)]

    def price(self, block: str, products: list[str], shifts: list[InputShift]) -> None:
        """Have the rows of a block's weights priced from the products in files."""
        visitor = self._passes.visitor
        nbytes = visitor.jobs(block)
        parts = list(shares(len(nbytes), self._pool.slots))
        requests = [
            {
                "task": "price",
                "block": block,
                "part": [part.start, part.stop],
                "products": products,
            }
            for part in parts
        ]
        names = [f"{block}, part {n} of {len(parts)}" for n in range(1, len(parts) + 1)]
        told = self._done(names, requests)
        for part in parts:
            self._passes.progress.advance(sum(nbytes[part.start : part.stop]), block)
        visitor.open(block, parts=products)
        visitor.tell(shifts, [FoundPrices(**one) for found in told for one in found])

    def forget(self, block: str) -> None:
        """Remove the products of a block, and those that an interrupted run left."""
        with os_errors(self._passes.work.folder):
            for path in self._passes.work.folder.glob(f"{block}.*"):
                if _PRODUCTS in path.name:
                    path.unlink()

    def _done(self, names: list[str], requests: list[dict[str, Any]]) -> list[Any]:
        """Return the answers in the order of the requests, whoever was first."""
        answers: dict[int, Any] = {}

        def jobs() -> Iterator[WorkerJob]:
            for number, (name, request) in enumerate(zip(names, requests, strict=True)):

                def done(answer: Any, number: int = number) -> list[WorkerJob]:
                    answers[number] = answer
                    return []

                yield WorkerJob(name, {**self._order, **request}, done)

        dispatch(self._pool, jobs())
        return [answers[number] for number in range(len(requests))]


def _shifts(rows: list[list[Any]]) -> list[InputShift]:
    return [(unit, number, square) for unit, number, square in rows]
