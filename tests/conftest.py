"""What every test shares: no network, one thread, small random checkpoints made once."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from checkpoints import make_checkpoint
from evaluating import make_formats
from fake_hub import FakeHub, serving
from fp8_reports import DEVIATIONS, MODES, make_source, packed
from gguf_models import make_variant
from hessian_folders import write_hessians
from hub_client import Client, World
from pipeline_runs import STEM
from qwen35.cli.main import main
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.serving import hidden_keys
from running import run
from sentences import check, said
from verifying import PIECE

# scripts that run in environments of their own
collect_ignore_glob = ["oracles/*"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
for _name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):  # pytest-xdist sets the first in its workers
    os.environ.pop(_name, None)
# the commands that tests start are hundreds: only the first of them compiles what they import
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

gc.set_threshold(100_000)  # seldom, as commands do: plans have as many objects, and no garbage

# a busy machine is no failure: no example has a deadline, and drawing one may take long
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def _flush(descriptor: int) -> None:
    """Do not wait for the disk, of which no test in this process could tell.

    A conversion would wait for it a dozen times. What is flushed when is held against power
    failures in the processes of `killing.py`; commands in processes of their own flush, too.
    """
    os.fstat(descriptor)  # it must be open


os.fsync = os.fdatasync = _flush  # type: ignore[assignment]


def pytest_collection_finish() -> None:
    """Leave alone what is imported and collected by now: no garbage will be among it."""
    gc.freeze()


def pytest_runtest_setup() -> None:
    """Compute with one thread, however many the test before asked for."""
    torch.set_num_threads(1)


def pytest_sessionfinish() -> None:
    """Let libraries free at exit what is theirs: some complain about what is left."""
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Compare what a test with the mark `sentences` provokes with the golden sentences."""
    random = getattr(pyfuncitem.obj, "is_hypothesis_test", False)
    if random or pyfuncitem.get_closest_marker("sentences") is None:
        return (yield)
    factory: pytest.TempPathFactory = pyfuncitem.config._tmp_path_factory  # type: ignore[attr-defined]
    with said(factory.getbasetemp()) as seen:
        result = yield
    check(seen)
    return result


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense vision-language checkpoint with a tied head and an MTP layer."""
    return make_checkpoint(tmp_path_factory.mktemp("dense") / "source")


@pytest.fixture(scope="session")
def dense_hessians(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hessians of made-up inputs for the dense checkpoint; only to be read."""
    return write_hessians(dense, tmp_path_factory.mktemp("dense") / "statistics")


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture-of-experts checkpoint with fused experts and its own head."""
    return make_checkpoint(tmp_path_factory.mktemp("moe") / "source", moe=True, tied=False)


@pytest.fixture(scope="session")
def moe_per_expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture-of-experts checkpoint with every expert by itself."""
    return make_checkpoint(
        tmp_path_factory.mktemp("moe") / "source", moe=True, tied=False, per_expert=True
    )


@pytest.fixture(scope="session")
def formats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint in every format, and text to measure on (`evaluating.py`)."""
    return make_formats(tmp_path_factory.mktemp("formats"))


@pytest.fixture(scope="session")
def hub_and_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeHub, Client]]:
    """A Hub with write support, and a process that runs commands against it."""
    home = tmp_path_factory.mktemp("client")
    with serving(FakeHub({})) as hub, Client(hub, home) as client:
        yield hub, client


@pytest.fixture
def world(hub_and_client: tuple[FakeHub, Client], tmp_path: Path) -> World:
    """The Hub, empty and well-behaved, and a small artifact to publish on it."""
    hub, client = hub_and_client
    return World.fresh(hub, client, tmp_path)


@pytest.fixture(scope="session")
def nf4_artifact(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense checkpoint in NF4; only to be read."""
    return run(dense, tmp_path_factory.mktemp("packed") / "nf4").out


@pytest.fixture
def broken_nf4(nf4_artifact: Path, tmp_path: Path) -> Path:
    """A copy of `nf4_artifact`, to be broken."""
    return Path(shutil.copytree(nf4_artifact, tmp_path / "broken"))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read in several pieces, as those of true size are."""
    monkeypatch.setattr("qwen35.codecs.pieces.PIECE", PIECE)


@pytest.fixture(scope="session")
def fp8_sources(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Checkpoints whose linear layers have a standard deviation, by that."""
    folder = tmp_path_factory.mktemp("sources")
    return {d: make_source(folder / str(d), d) for d in DEVIATIONS}


@pytest.fixture(scope="session")
def fp8_tails(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose linear layers have heavy tails."""
    return make_source(tmp_path_factory.mktemp("tails") / "in", 0.02, tails=True)


@pytest.fixture(scope="session")
def fp8_outputs(
    fp8_sources: dict[float, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[float, str], Path]:
    """FP8 artifacts of `fp8_sources`, by deviation and mode; only to be read."""
    folder = tmp_path_factory.mktemp("outputs")
    return {
        (d, mode): packed(source, folder / f"{d}-{mode}", ScaleChoice(mode, grid_size=10))  # type: ignore[arg-type]
        for d, source in fp8_sources.items()
        for mode in MODES
    }


@pytest.fixture(scope="session")
def fp8_artifact(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense checkpoint in FP8; only to be read."""
    return run(dense, tmp_path_factory.mktemp("packed") / "fp8", "fp8").out


@pytest.fixture(scope="session")
def fp8_moe_artifact(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mixture of experts in FP8; only to be read."""
    return run(moe, tmp_path_factory.mktemp("packed") / "moe", "fp8").out


@pytest.fixture(scope="session")
def run_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source of runs, with sidecars; only to be read."""
    return make_variant(tmp_path_factory.mktemp("source"), "dense")


@pytest.fixture
def run_source(run_original: Path, tmp_path: Path) -> Path:
    """A copy of `run_original` that a test may change."""
    return Path(shutil.copytree(run_original, tmp_path / "source" / STEM))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered between commands is remembered for one test only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def no_known_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of servers that other tests have read do not blank what this one shows."""
    monkeypatch.setattr(hidden_keys, "_keys", set())


@pytest.fixture(scope="session")
def first_run(run_original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of paths A and B wrote that went well; only to be read."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        out = folder / "out"
        arguments = ["--path", "A", "--path", "B", "--types", "Q8_0", str(run_original), str(out)]
        assert main(["run", *arguments, "--depth", "numbers", "--quiet"]) == 0
    return out


@pytest.fixture
def run_out(first_run: Path, tmp_path: Path) -> Path:
    """A copy of `first_run`, which a test may change."""
    return Path(shutil.copytree(first_run, tmp_path / "out"))
