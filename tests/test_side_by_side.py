"""Batches that threads compute side by side: the same bytes, errors at once, memory kept to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from calibrating import source
from checkpoints import ASSET
from hub_client import files_in
from qwen35.calibration.calibration_plan import CalibrationPlan, CalibrationRequest
from qwen35.calibration.calibration_plan import make_plan as plan_calibration
from qwen35.calibration.calibration_run import calibrate
from qwen35.calibration.text_windows import read_text
from qwen35.checkpoint.open import fetch
from qwen35.checkpoint.source import open_folder
from qwen35.engines.torch_model import flushed_denormals
from qwen35.evaluation.evaluation_job import EvaluationRequest, prepare
from qwen35.evaluation.streamed_models import streamed_models
from qwen35.forward.batch_size import PassSizes
from qwen35.forward.builder import Builder
from qwen35.forward.head import Head
from qwen35.forward.side_by_side import MOST, side_by_side
from qwen35.progress import Silent
from qwen35.tuning.prices import Prices
from qwen35.tuning.pricing_passes import PricingSetting
from qwen35.tuning.pricing_run import measure_prices
from qwen35.tuning.space import ChoiceSpace

TEXT = ASSET.parent.parent / "LICENSE"


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() in (1, 2)  # what the last run asked for, not a share of it
    torch.set_num_threads(before)


# --- the calls


def test_results_come_in_order_from_threads_with_one_thread_each() -> None:
    both, taken = threading.Barrier(2, timeout=60), list[int]()

    def call(item: int) -> int:
        both.wait()  # fails unless two calls run at a time
        assert torch.get_num_threads() == 1
        assert torch.is_inference_mode_enabled()
        return item

    with torch.inference_mode():
        side_by_side(torch, call, range(6), 2, taken.append)
    assert taken == list(range(6))
    assert torch.get_num_threads() == 2


def test_denormals_are_what_they_are_in_the_thread_that_asks() -> None:
    found: list[bool] = []

    def call(_: int) -> bool:
        return bool(torch.full((64,), 1e-30).mul(1e-10).any())

    side_by_side(torch, call, range(4), 2, found.append)
    assert found == [True] * 4
    with flushed_denormals(torch):
        side_by_side(torch, call, range(4), 2, found.append)
    assert found[4:] == [False] * 4


def test_an_error_ends_the_calls() -> None:
    called: list[int] = []

    def call(item: int) -> None:
        called.append(item)
        if item == 1:
            raise ValueError(item)

    with pytest.raises(ValueError, match="1"):
        side_by_side(torch, call, range(1000), 2)
    assert len(called) < 1000
    assert torch.get_num_threads() == 2


def test_one_call_keeps_all_threads() -> None:
    found: list[int] = []
    side_by_side(torch, lambda _: torch.get_num_threads(), [0], 2, found.append)
    assert found == [2]


# --- how many


def test_memory_bounds_how_many_batches_are_computed_at_a_time() -> None:
    sizes = PassSizes(layer=100, window=10, batch=2)
    assert sizes.nbytes == 120
    assert sizes.side_by_side(3, 100, None).nbytes == 160
    assert sizes.side_by_side(3, 100, 159).nbytes == 140
    assert sizes.side_by_side(3, 100, 120).nbytes == 120
    assert sizes.side_by_side(3, 100, 160, least=3).at_once == 2
    assert sizes.side_by_side(3, 3, None).at_once == 2
    assert sizes.side_by_side(99, 100, None).at_once == MOST
    assert PassSizes(100, 10, 2, wide=4).side_by_side(3, 100, None).at_once == 1


# --- the same bytes


def _calibration(folder: Path, threads: int) -> CalibrationPlan:
    checkpoint = open_folder(folder)
    windows = read_text(checkpoint, [TEXT], context=16, windows=40)
    return plan_calibration(checkpoint, windows, CalibrationRequest(threads=threads))


def test_a_calibration_has_the_same_bytes(tmp_path: Path) -> None:
    """Experts, the MTP layer and the cache are summed up by whichever thread computes them."""
    folder = source(tmp_path, moe=True, tied=False)
    one, two = (_calibration(folder, threads) for threads in (1, 2))
    assert (one.sizes.at_once, two.sizes.at_once) == (1, 2)
    assert two.peak_bytes == one.peak_bytes + one.batch_bytes
    assert two.batch * 4 < len(two.text.windows)
    found = [
        files_in(calibrate(plan, tmp_path / str(plan.request.threads), threads=threads).result.out)
        for plan, threads in ((one, 1), (two, 2))
    ]
    assert found[0] == found[1]


def test_logits_are_the_same_bytes(tmp_path: Path) -> None:
    logits = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        job = prepare(
            EvaluationRequest(
                str(ASSET), (), TEXT, context=64, chunks=6, streamed=True, threads=threads
            )
        )
        assert job.stream is not None
        assert job.stream.sizes.at_once == threads
        with streamed_models(job.stream, [job.base], job.chunks, "cpu", None, Silent()) as models:
            made = (models(job.base).logits(job.chunks, index).copy() for index in range(6))
            logits.append(np.stack(list(made)))
    assert (logits[0] == logits[1]).all()
    assert logits[0].std() > 1


class _OneThread(Head):
    """A head that is computed by one thread."""

    def __init__(self, builder: Builder) -> None:
        torch.set_num_threads(1)
        super().__init__(builder)


class _Threads(Silent):
    """Sets the number of threads again after each block."""

    def __init__(self, count: int) -> None:
        self._count = count

    def advance(self, amount: int, item: str) -> None:
        torch.set_num_threads(self._count)


def test_prices_of_layers_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: sums over windows are in their order, and so are roundings of inputs.

    But for the head, whose products torch shares out among its own threads.
    """
    monkeypatch.setattr("qwen35.forward.backward_stream.Head", _OneThread)
    folder = source(tmp_path, moe=True, layers=2)
    windows = np.random.default_rng(1).integers(0, 400, (6, 24)).astype(np.int32)
    found: list[Prices] = []
    for threads in (1, 2):
        space = ChoiceSpace(fetch(str(folder)), "gguf", ("q4_K", "q8_0", "f16"))
        setting = PricingSetting(windows, "cpu", threads, 1, None, restart=False)
        assert setting.plan(space.checkpoint).sizes.at_once == threads
        path = tmp_path / f"{threads}.json"
        found.append(measure_prices(space, setting, "it", path, _Threads(threads)))
    assert found[0] == found[1]
