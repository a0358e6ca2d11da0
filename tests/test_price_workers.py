"""Workers that share the pricing of a model: the prices of one process, whoever dies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibrating import source
from checkpoints import ASSET
from deadly import dying
from here import Here
from hub_client import files_in
from qwen35.checkpoint.open import fetch
from qwen35.cli.main import main
from qwen35.errors import InputError, WorkerError
from qwen35.execution.process_pool import ProcessPool
from qwen35.tuning.price_worker import MODULE, answer
from qwen35.tuning.prices import Prices
from qwen35.tuning.pricing_passes import PricingSetting
from qwen35.tuning.pricing_run import discard_work, measure_prices
from qwen35.tuning.space import ChoiceSpace
from watching import Watching

WINDOWS = np.random.default_rng(1).integers(0, 400, (7, 33)).astype(np.int32)
SETTING = PricingSetting(WINDOWS, "cpu", 1, 1, None, restart=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("source"), moe=True, layers=2)


@pytest.fixture(scope="module")
def space(folder: Path) -> ChoiceSpace:
    return ChoiceSpace(fetch(str(folder)), "gguf", ("q4_0", "q8_0", "f16"))


def priced(
    space: ChoiceSpace, path: Path, pool: Here | ProcessPool | None, setting: PricingSetting
) -> Prices:
    return measure_prices(space, setting, "it", path, Watching(), pool)


@pytest.fixture(scope="module")
def expected(space: ChoiceSpace, tmp_path_factory: pytest.TempPathFactory) -> Prices:
    return priced(space, tmp_path_factory.mktemp("one") / "m.json", None, SETTING)


@pytest.mark.parametrize(("count", "deaths"), [(1, ()), (3, (0, 5, 9))])
def test_any_number_of_workers_finds_the_same_prices(
    count: int, deaths: tuple[int, ...], space: ChoiceSpace, expected: Prices, tmp_path: Path
) -> None:
    """To the bit, with experts; each job is done once, but for those whose worker died."""
    pool = Here(count, deaths, answer)
    assert priced(space, tmp_path / "m.json", pool, SETTING) == expected
    assert expected.experts
    jobs = [(job["task"], job["block"], *job["part"]) for job in pool.done]
    assert (len(jobs) > len(set(jobs))) == bool(deaths)  # numbers begin anew with each block
    assert {task for task, *_ in jobs} == {"forward", "back", "price"}
    assert len([job for job in jobs if job[:2] == ("back", "layers.1")]) >= min(count, 7)
    assert not list(tmp_path.rglob("*.products*"))
    discard_work(tmp_path / "m.json")
    assert not list(tmp_path.iterdir())


def test_one_process_goes_on_where_workers_always_died(
    space: ChoiceSpace, expected: Prices, tmp_path: Path
) -> None:
    class Dies(Here):
        def begin(self, number: int, request: dict[str, object]) -> None:  # type: ignore[override]
            super().begin(number, request)
            if (request["task"], request["block"]) == ("price", "layers.0"):
                self._deaths = (*self._deaths, number)

    with pytest.raises(WorkerError, match=r"^layers.0, part \d+ of \d+: its worker died 3"):
        priced(space, tmp_path / "m.json", Dies(2, (), answer), SETTING)
    assert (tmp_path / ".m.json.pricing" / "layers.1.prices").exists()
    assert priced(space, tmp_path / "m.json", None, SETTING) == expected


def test_another_source_on_a_worker_is_refused(tmp_path: Path) -> None:
    folder = source(tmp_path, layers=2)
    space = ChoiceSpace(fetch(str(folder)), "fp8", ("fp8", "plain"))
    assert len(space.plan.written)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has a different (plan|source)"):
        priced(space, tmp_path / "m.json", Here(1, (), answer), SETTING)


@pytest.mark.heavy
def test_processes_find_the_same_prices_when_one_is_killed(
    space: ChoiceSpace, expected: Prices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths = dying(monkeypatch, tmp_path / "deaths", 1)
    with ProcessPool(2, module="deadly_prices", threads=1) as pool:
        assert priced(space, tmp_path / "m.json", pool, SETTING) == expected
    assert len(list(deaths.glob("death*"))) == 1
    two = replace(SETTING, shares=2)
    with ProcessPool(2, module=MODULE, threads=1) as pool:
        assert priced(space, tmp_path / "n.json", pool, two) == expected


@pytest.mark.heavy
def test_the_command_with_workers_that_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measurements and recipe are those of one process, byte for byte."""
    asked = ["tune", str(ASSET), "--format", "gguf", "--text", str(ASSET / "eval.txt"), "--quiet"]
    asked += ["--size", "5.3MB", "--types", "q4_0,q8_0", "--chunks", "3", "--context", "64"]
    asked += ["--threads", "1", "--device", "cpu", "--output"]
    for name in ("alone", "shared"):
        (tmp_path / name).mkdir()
    assert main([*asked, str(tmp_path / "alone" / "r.toml")]) == 0
    died = dying(monkeypatch, tmp_path / "deaths", 2)
    monkeypatch.setattr("qwen35.tuning.price_worker.MODULE", "deadly_prices")
    assert main([*asked, str(tmp_path / "shared" / "r.toml"), "--workers", "2"]) == 0
    assert len(list(died.glob("death*"))) == 2
    assert files_in(tmp_path / "shared") == files_in(tmp_path / "alone")
    assert sorted(files_in(tmp_path / "alone")) == ["r.json", "r.toml"]


def test_what_excludes_each_other_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("a text")
    asked = ["tune", str(folder), "--format", "gguf", "--size", "4bpw"]
    asked += ["--text", str(tmp_path / "text.txt")]
    assert main([*asked, "--workers", "2", "--ray-address", "auto"]) == 2
    assert "--workers and --ray-address: exclude each other" in capsys.readouterr().err
    assert main([*asked, "--workers", "999", "--dry-run"]) == 2
    assert "expected at most" in capsys.readouterr().err
