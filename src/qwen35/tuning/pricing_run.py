"""Run the passes that price a model's weights, from where an interrupted run stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qwen35.checkpoint.source import Reader
from qwen35.engines.torch_model import flushed_denormals, torch_and_transformers
from qwen35.execution.dispatch import WorkerPool
from qwen35.forward.stream_folder import StreamFolder
from qwen35.progress import Progress
from qwen35.sinks.staging import check_space, locked, os_errors
from qwen35.tuning.prices import Prices
from qwen35.tuning.pricing_passes import PricingPasses, PricingSetting, digest_of
from qwen35.tuning.shared_pricing import run_shared_pricing, write_order
from qwen35.tuning.space import ChoiceSpace

__all__ = ["discard_work", "measure_prices"]


def measure_prices(
    space: ChoiceSpace,
    setting: PricingSetting,
    identity: str,
    path: Path,
    progress: Progress,
    pool: WorkerPool | None = None,
) -> Prices:
    """Price every choice of every unit.

    Args:
        space: the choices.
        setting: how they are measured.
        identity: of the model and the text; only the same run is resumed.
        path: of the measurements, beside which work is kept.
        progress: receives bytes.
        pool: workers that do it instead of this process.

    Raises:
        WorkerError: the workers of a job died at every attempt.
        InputError: a weight cannot be read.
        OutputError: the disk is full, or another run is at work.
        UsageError: a library is missing, or `setting.memory` is too little.
    """
    torch, _ = torch_and_transformers("tune")
    plan = setting.plan(space.checkpoint)
    digest = digest_of(plan, space, setting, identity)
    folder = _folder(path)
    torch.set_num_threads(setting.threads)
    with os_errors(folder), locked(folder):
        work = StreamFolder(folder, digest, restart=setting.restart)
        if not work.done:
            check_space(folder.parent, plan.disk)
        with work, Reader(plan.checkpoint) as reader:
            own = replace(setting, device="cpu") if pool else setting
            passes = PricingPasses(torch, plan, space, own, work, reader, progress)
            progress.begin(
                f"pricing {space.checkpoint.name}", plan.read_bytes + passes.visitor.nbytes()
            )
            try:
                progress.advance(passes.visitor.nbytes(work.done), "already priced")
                if pool is None:
                    with flushed_denormals(torch):
                        passes.stream.run()
                else:
                    order = write_order(passes, setting, identity, digest)
                    run_shared_pricing(passes, order, pool)
            finally:
                passes.visitor.close()
                progress.end()
            return passes.prices()


def discard_work(path: Path) -> None:
    """Discard what an interrupted run left, once there are measurements.

    Raises:
        OutputError: what is there was not made by qwen35, or another run is at work.
    """
    folder = _folder(path)
    if not folder.exists():
        return
    with os_errors(folder), locked(folder):
        work = StreamFolder(folder, "", restart=True)
        work.close()
        work.remove()


def _folder(path: Path) -> Path:
    absolute = path.absolute()
    return absolute.with_name(f".{absolute.name}.pricing")
