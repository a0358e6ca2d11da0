"""Workers that share the windows of a calibration: the bytes of one process, whoever dies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from calibrating import source
from deadly import dying
from here import Here
from hub_client import files_in
from qwen35.calibration.calibration_plan import CalibrationPlan, CalibrationRequest, make_plan
from qwen35.calibration.calibration_run import calibrate
from qwen35.calibration.share_worker import MODULE
from qwen35.calibration.states import work_folder
from qwen35.calibration.text_windows import read_text
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.errors import InputError, WorkerError
from qwen35.execution.process_pool import ProcessPool
from qwen35.progress import Silent
from watching import Watching


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("".join(f"the rain in a Model, {n} times; " for n in range(24)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("source"), moe=True, tied=False)


def plan_for(folder: Path, text: Path, **asked: Any) -> CalibrationPlan:
    """Plan many small windows, so that there are several batches."""
    checkpoint = open_folder(folder)
    windows = read_text(checkpoint, [text], context=16)
    return make_plan(checkpoint, windows, CalibrationRequest(**asked))


@pytest.fixture(scope="module")
def plan(folder: Path, prose: Path) -> CalibrationPlan:
    plan = plan_for(folder, prose)
    assert len(plan.text.windows) > 8 * plan.batch
    assert not plan.sizes.wide
    return plan


@pytest.fixture(scope="module")
def expected(plan: CalibrationPlan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of one process."""
    return files_in(calibrate(plan, tmp_path_factory.mktemp("one") / "out", threads=1).result.out)


@pytest.mark.parametrize(("count", "deaths"), [(1, ()), (2, ()), (7, (0, 4))])
def test_any_number_of_workers_gives_the_same_bytes(
    count: int,
    deaths: tuple[int, ...],
    plan: CalibrationPlan,
    expected: dict[str, bytes],
    tmp_path: Path,
) -> None:
    pool, progress = Here(count, deaths), Watching()
    result = calibrate(plan, tmp_path / "out", threads=1, pool=pool, progress=progress)
    assert files_in(result.result.out) == expected
    assert progress.done == progress.total == plan.read_bytes
    jobs = [(job["block"], *job["windows"]) for job in pool.done]
    assert len(jobs) == len(set(jobs)) + len(deaths) * len(plan.blocks)
    assert len(set(jobs)) >= len(plan.blocks) * min(count, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_process_gives_the_same_bytes(
    plan: CalibrationPlan, expected: dict[str, bytes], tmp_path: Path
) -> None:
    pool = ProcessPool(1, module=MODULE, threads=1)
    assert files_in(calibrate(plan, tmp_path / "out", threads=1, pool=pool).result.out) == expected


@pytest.mark.heavy
def test_processes_give_the_same_bytes_when_one_is_killed(
    plan: CalibrationPlan,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deaths = dying(monkeypatch, tmp_path / "deaths", 1)
    pool = ProcessPool(2, module="deadly_shares", threads=1)
    result = calibrate(plan, tmp_path / "out", threads=1, pool=pool)
    assert len(list(deaths.glob("death*"))) == 1
    assert files_in(result.result.out) == expected
    assert not pool.pids


def test_a_worker_that_always_dies_is_an_error_and_the_finished_blocks_are_kept(
    plan: CalibrationPlan, expected: dict[str, bytes], tmp_path: Path
) -> None:
    class Dies(Here):
        def begin(self, number: int, request: Mapping[str, Any]) -> None:
            super().begin(number, request)
            if request["block"] == "layers.2":
                self._deaths = (*self._deaths, number)

    with pytest.raises(WorkerError, match=r"^layers.2, chunks \d+ to \d+: its worker died 3"):
        calibrate(plan, tmp_path / "out", threads=1, pool=Dies(2))
    assert work_folder(tmp_path / "out").exists()
    again = calibrate(plan, tmp_path / "out", threads=1, pool=Here(5))
    assert again.resumed == 2
    assert files_in(again.result.out) == expected


def test_one_process_goes_on_where_workers_were_interrupted(
    plan: CalibrationPlan, expected: dict[str, bytes], tmp_path: Path
) -> None:
    class Interrupts(Silent):
        def advance(self, nbytes: int, item: str) -> None:
            if item == "layers.1":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(plan, tmp_path / "out", threads=1, pool=Here(3), progress=Interrupts())
    again = calibrate(plan, tmp_path / "out", threads=1)
    assert again.resumed == 2
    assert files_in(again.result.out) == expected


def test_experts_read_one_by_one_are_shared_out_too(
    folder: Path, prose: Path, tmp_path: Path
) -> None:
    """Each worker has its part of the memory; how many there are does not matter to a plan."""
    free = plan_for(folder, prose)
    plan = plan_for(folder, prose, memory=2 * (free.layer_bytes - 1), workers=2)
    assert plan.sizes.wide > 0
    assert plan.sizes.wide % plan.batch == 0
    assert plan.peak_bytes <= 2 * free.layer_bytes
    one = calibrate(plan, tmp_path / "one", threads=1)
    pool = Here(2)
    two = calibrate(plan, tmp_path / "two", threads=1, pool=pool)
    assert files_in(two.result.out) == files_in(one.result.out)
    assert len(pool.done) > len(plan.blocks)


def test_another_source_on_a_worker_is_refused(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source(tmp_path)
    plan = plan_for(folder, prose)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has a different source, expected what the run started"):
        calibrate(plan, tmp_path / "out", threads=1, pool=Here(1))
    plan = plan_for(folder, prose)
    assert plan.digest
    monkeypatch.setattr("qwen35.calibration.calibration_plan.__version__", "99")
    with pytest.raises(InputError, match="has a different qwen35"):
        calibrate(plan, tmp_path / "out", threads=1, pool=Here(1), overwrite=True)


def test_inputs_that_are_not_finite_are_named(prose: Path, tmp_path: Path) -> None:
    from checkpoints import write_checkpoint
    from gguf_models import sidecars
    from running import load_all

    folder = source(tmp_path)
    tensors = load_all(folder)
    tensors["model.language_model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    config = json.loads((folder / "config.json").read_text())
    bad = write_checkpoint(tmp_path / "bad", config, tensors, sidecars=sidecars())
    with pytest.raises(InputError, match=r"^layers\.1\.mlp\.down_proj: its input holds NaN"):
        calibrate(plan_for(bad, prose), tmp_path / "out", threads=1, pool=Here(2))


def test_what_excludes_each_other_is_refused(
    folder: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["calibrate", str(folder), "--text", str(prose), "--output", str(tmp_path / "out")]
    assert main([*asked, "--workers", "2", "--ray-address", "auto"]) == 2
    assert "--workers and --ray-address: exclude each other" in capsys.readouterr().err
    assert main([*asked, "--ray-address", "auto", "--memory", "4GB"]) == 2
    assert "--memory: applies to this machine only" in capsys.readouterr().err
    assert main([*asked, "--workers", "999", "--dry-run"]) == 2
    assert "expected at most" in capsys.readouterr().err
    assert main([*asked, "--workers", "2", "--dry-run"]) == 0
    assert "by each worker" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())
