"""Conversions on a Ray cluster of several nodes: the same bytes, whatever is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import deadly
import deadly_prices
import deadly_shares
import qwen35
from checkpoints import ASSET, random_tensors, tiny_config, write_checkpoint
from gguf_models import make_variant
from qwen35.cli.main import main
from qwen35.errors import TensorError, UsageError, WorkerError
from qwen35.execution.ray_workers import RayWorkers
from qwen35.writing.write import write
from running import limit_shards, plan_of, tree
from watching import Watching

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("default")

SHARD = 800_000
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes with a processor each; their workers see `deadly`, and a folder for it."""
    from ray.cluster_utils import Cluster

    package = str(Path(qwen35.__file__).parent.parent)
    own = [package, str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, own))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv("QWEN35_DEADLY", str(tmp_path_factory.mktemp("deadly")))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_DISABLE_MEMORY_MONITOR", "1")
        made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        try:
            made.add_node(**NODE)
            ray.init(address=made.address, log_to_driver=False)
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


@pytest.fixture
def folder(cluster: Any) -> Path:
    """The folder that says when workers die; empty."""
    found = Path(os.environ["QWEN35_DEADLY"])
    for path in found.iterdir():
        path.unlink()
    (found / "kill").write_text("0")
    return found


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_shards(monkeypatch, SHARD)


@pytest.fixture
def expected(dense: Path, tmp_path: Path) -> dict[str, bytes]:
    write(plan_of(dense), tmp_path / "unharmed", threads=1)
    return tree(tmp_path / "unharmed")


def test_a_cluster_writes_what_threads_write(
    folder: Path,
    dense: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qwen35.execution.ray_workers.answer", deadly.slow)
    progress = Watching()
    pool = RayWorkers("auto")
    assert pool.slots == 2
    write(plan_of(dense), tmp_path / "out", pool=pool, progress=progress)
    assert tree(tmp_path / "out") == expected
    assert progress.done == progress.total == plan_of(dense).read_bytes
    log = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    assert len({node for node, *_ in log}) == 2
    jobs = [json.dumps(rest) for _, *rest in log]
    assert len(set(jobs)) == len(jobs)  # none was done twice


def test_a_node_runs_nothing_from_the_folder_of_the_driver(cluster: Any, tmp_path: Path) -> None:
    source = Path(shutil.copytree(ASSET, tmp_path / "source"))
    for name in ("numbers", "random", "json", "struct", "qwen35", "numpy", "safetensors"):
        for folder in (source, tmp_path):
            (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\n")
    code = "import sys; from qwen35.cli.main import main; sys.exit(main())"
    arguments = ["convert", ".", "../out", "--recipe", "text", "--ray-address", cluster.address]
    subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments, "--quiet"], cwd=source, check=True
    )
    assert (tmp_path / "out" / "qwen35.json").exists()
    assert not (tmp_path / "RAN").exists()


def test_a_worker_that_dies_costs_only_its_task(
    folder: Path,
    dense: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qwen35.execution.ray_workers.answer", deadly.deadly)
    (folder / "kill").write_text("2")
    progress = Watching()
    write(plan_of(dense), tmp_path / "out", pool=RayWorkers("auto"), progress=progress)
    assert len(list(folder.glob("death*"))) == 2
    assert tree(tmp_path / "out") == expected
    assert progress.done == progress.total


def test_a_worker_that_always_dies_is_an_error_and_the_rest_is_kept(
    folder: Path,
    dense: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_of(dense)
    monkeypatch.setattr("qwen35.execution.ray_workers.answer", deadly.deadly)
    (folder / "kill").write_text("9")
    (folder / "tensor").write_text(plan.files[-1].steps[-1].outputs[0].name)
    with pytest.raises(
        WorkerError, match=r"its worker died 3 times \(WorkerCrashedError"
    ) as caught:
        write(plan, tmp_path / "out", pool=RayWorkers("auto"))
    assert len(list(folder.glob("death*"))) == 3
    assert "run the same command to resume" in caught.value.__notes__[0]
    monkeypatch.undo()
    limit_shards(monkeypatch, SHARD)
    rest = Watching()
    write(plan, tmp_path / "out", pool=RayWorkers("auto"), progress=rest)
    assert rest.total < plan.read_bytes / 2
    assert tree(tmp_path / "out") == expected


def test_a_node_that_dies_costs_only_its_tasks(
    cluster: Any,
    folder: Path,
    dense: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qwen35.execution.ray_workers.answer", deadly.slow)
    node = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    removed: list[str] = []

    def kill(_: int) -> None:
        log = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
        if not removed and any(where == node.node_id for where, *_ in log):
            removed.append(node.node_id)
            cluster.remove_node(node, allow_graceful=False)

    progress = Watching(kill)
    write(plan_of(dense), tmp_path / "out", pool=RayWorkers("auto"), progress=progress)
    assert removed
    assert tree(tmp_path / "out") == expected
    assert progress.done == progress.total


def test_a_bad_weight_is_the_same_sentence(cluster: Any, tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = torch.nan
    source = write_checkpoint(tmp_path / "source", config, tensors)
    with pytest.raises(TensorError, match=f"^{name}: holds NaN or infinity"):
        write(plan_of(source), tmp_path / "out", pool=RayWorkers("auto"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_cluster_without_the_gpu_that_is_asked_for_is_refused_at_once(
    cluster: Any, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--ray-address", cluster.address, "--device", "cuda", "--quiet"]
    assert main(["convert", str(dense), str(tmp_path / "out"), *flags]) == 2
    said = capsys.readouterr().err
    assert re.search(r"none of the \d nodes of the cluster has a GPU; add one, or leave", said)
    assert not any(tmp_path.iterdir())
    with pytest.raises(UsageError, match="no node has more than 1 processors; fewer --threads"):
        RayWorkers("auto", threads=64)
    with pytest.raises(UsageError, match="--device cuda:1: on Ray, expected cpu or cuda"):
        RayWorkers("auto", device="cuda:1")


def test_a_node_without_qwen35_is_a_sentence(
    cluster: Any, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen35.execution.ray_workers.answer", deadly.absent)
    with pytest.raises(UsageError, match="a node of the cluster cannot import qwen35; install"):
        write(plan_of(dense), tmp_path / "out", pool=RayWorkers("auto"))
    assert not any(tmp_path.iterdir())


def test_each_job_has_a_gpu_to_itself_where_there_are_some(
    cluster: Any,
    folder: Path,
    dense: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qwen35.execution.ray_workers.answer", deadly.slow)
    resources = {**NODE, "num_cpus": 2, "num_gpus": 2}
    node = cluster.add_node(**resources)
    cluster.wait_for_nodes()
    try:
        pool = RayWorkers("auto", device="cuda", threads=1)
        assert pool.slots == 2
        write(plan_of(dense), tmp_path / "out", pool=pool)
    finally:
        cluster.remove_node(node)
    assert tree(tmp_path / "out") == expected
    log = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    assert {where for where, *_ in log} == {node.node_id}
    assert {gpu for _, gpu, *_ in log} == {"0", "1"}


def test_connecting_leaves_the_handler_of_sigterm_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own ends the process without tidying; `qwen35.cli.signals` sets one."""

    def connect(**_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    fake = SimpleNamespace(
        is_initialized=lambda: False,
        init=connect,
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 1}}],
        remote=lambda **_: lambda function: function,
        shutdown=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    before = signal.getsignal(signal.SIGTERM)
    with RayWorkers("auto"):
        assert signal.getsignal(signal.SIGTERM) == before


def test_the_command_on_a_cluster(
    cluster: Any, dense: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    flags = ["--ray-address", cluster.address, "--threads", "1", "--quiet"]
    assert main(["convert", str(dense), str(out), *flags]) == 0
    assert tree(out) == expected
    shutil.rmtree(out)


@pytest.fixture(scope="module")
def gguf_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_variant(tmp_path_factory.mktemp("gguf"), "dense")


@pytest.mark.parametrize("deaths", ["0", "2"])
def test_gguf_files_on_a_cluster(
    cluster: Any,
    folder: Path,
    gguf_source: Path,
    tmp_path: Path,
    deaths: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qwen35.execution.ray_workers.answer", deadly.deadly)
    (folder / "kill").write_text(deaths)
    asked = ["--types", "F16,Q4_K_M", "--mmproj", "--quiet", "--threads", "1"]
    alone, shared = str(tmp_path / "alone"), str(tmp_path / "shared")
    assert main(["gguf", str(gguf_source), alone, *asked]) == 0
    assert main(["gguf", str(gguf_source), shared, *asked, "--ray-address", cluster.address]) == 0
    assert len(list(folder.glob("death*"))) == int(deaths)
    assert tree(tmp_path / "shared") == tree(tmp_path / "alone")


@pytest.mark.heavy
def test_windows_of_a_calibration_on_a_cluster(
    cluster: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker dies; the statistics are those of one process."""
    (folder / "kill").write_text("1")
    monkeypatch.setattr("qwen35.calibration.share_worker.answer", deadly_shares.deadly)
    asked = ["calibrate", str(ASSET), "--text", str(ASSET / "eval.txt"), "--context", "64"]
    asked += ["--chunks", "24", "--threads", "1", "--quiet", "--device", "cpu"]
    assert main([*asked, "--output", str(tmp_path / "alone")]) == 0
    shared = [*asked, "--output", str(tmp_path / "shared"), "--ray-address", cluster.address]
    assert main(shared) == 0
    assert len(list(folder.glob("death*"))) == 1
    assert tree(tmp_path / "shared") == tree(tmp_path / "alone")


@pytest.mark.heavy
def test_prices_on_a_cluster(
    cluster: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker dies; measurements and recipe are those of one process."""
    (folder / "kill").write_text("1")
    monkeypatch.setattr("qwen35.tuning.price_worker.answer", deadly_prices.deadly)
    asked = ["tune", str(ASSET), "--format", "gguf", "--text", str(ASSET / "eval.txt"), "--quiet"]
    asked += ["--size", "5.3MB", "--types", "q4_0,q8_0", "--chunks", "3", "--context", "64"]
    asked += ["--threads", "1", "--device", "cpu", "--output"]
    for name in ("alone", "shared"):
        (tmp_path / name).mkdir()
    assert main([*asked, str(tmp_path / "alone" / "r.toml")]) == 0
    shared = [*asked, str(tmp_path / "shared" / "r.toml"), "--ray-address", cluster.address]
    assert main(shared) == 0
    assert len(list(folder.glob("death*"))) == 1
    assert tree(tmp_path / "shared") == tree(tmp_path / "alone")


def test_no_ray_and_no_cluster_are_sentences(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(address: str) -> str:
        arguments = ["convert", str(dense), str(tmp_path / "out"), "--ray-address", address]
        assert main([*arguments, "--quiet"]) == 2
        return capsys.readouterr().err

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        assert (
            "--ray-address: Ray is not installed; in your clone of qwen35: pip install '.[ray]'"
            in said("auto")
        )
    with monkeypatch.context() as patch:
        patch.setattr(ray, "is_initialized", lambda: False)

        def refuse(**_: object) -> None:
            raise ConnectionError("Could not find any running Ray instance.\nPlease specify")

        patch.setattr(ray, "init", refuse)
        words = "no Ray cluster answers (Could not find any running Ray instance.); start one with"
        assert words in said("auto")
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))  # and nobody listens
            address = f"127.0.0.1:{closed.getsockname()[1]}"
            assert f"--ray-address {address}: no Ray cluster answers (" in said(address)
