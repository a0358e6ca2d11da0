"""Processes that share a conversion: the bytes of threads, whoever dies, and the same words."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qwen35
from checkpoints import random_tensors, tiny_config, write_checkpoint
from deadly import dying
from killing import Trial, killer
from patience import PATIENCE
from qwen35.cli.main import main
from qwen35.codecs import devices
from qwen35.errors import InputError, OutputError, TensorError, UsageError, WorkerError
from qwen35.execution import worker
from qwen35.execution.failures import WorkerBugError, failure_json, raise_failure
from qwen35.execution.process_pool import ProcessPool
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.work_order import order_bytes, order_of, plan_from
from qwen35.writing.write import write
from running import limit_shards, plan_of, tree
from watching import Watching

SHARD = 800_000


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_shards(monkeypatch, SHARD)


@pytest.fixture
def expected(dense: Path, tmp_path: Path) -> dict[str, bytes]:
    """What a run of threads writes."""
    write(plan_of(dense), tmp_path / "unharmed", threads=1)
    files = tree(tmp_path / "unharmed")
    assert len(files) > 5
    return files


@pytest.fixture
def deadly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make workers die at so many jobs; returns the folder in which each death leaves a file."""

    return lambda count, tensor="": dying(monkeypatch, tmp_path / "deaths", count, tensor)


def test_processes_write_what_threads_write_and_progress_is_the_same(
    dense: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    plan = plan_of(dense)
    progress = Watching()
    pool = ProcessPool(2)
    result = write(plan, tmp_path / "out", pool=pool, progress=progress)
    assert tree(tmp_path / "out") == expected
    assert result.hashes.keys() == dict(plan.file_sizes()).keys()
    assert (progress.title, progress.total) == ("writing out", plan.read_bytes)
    assert progress.done == plan.read_bytes
    assert not pool.pids
    assert {path.name for path in tmp_path.iterdir()} == {"out", "unharmed"}


@pytest.mark.parametrize("recipe", ["fp8", "text-fp8"])
def test_fp8_with_its_calibration_and_statistics(moe: Path, tmp_path: Path, recipe: str) -> None:
    from qwen35.checkpoint.source import open_folder
    from qwen35.codecs.fp8.layout import ScaleChoice
    from qwen35.planning.activations import load_activations

    name = "model.language_model.layers.0.mlp.shared_expert.down_proj.weight"
    statistics = tmp_path / "statistics.json"
    statistics.write_text(json.dumps({name: {"input_channel_max": [1.0, 9.0] * 64}}))
    plan = make_plan(
        open_folder(moe),
        load_recipe(recipe),
        scale_choice=ScaleChoice("mse", grid_size=8),
        activations=load_activations(statistics),
    )
    threads = write(plan, tmp_path / "threads", threads=1)
    processes = write(plan, tmp_path / "out", pool=ProcessPool(2))
    assert processes.hashes == threads.hashes
    assert tree(tmp_path / "out") == tree(tmp_path / "threads")
    statistics.write_text(json.dumps({name: {"input_channel_max": [1.0, 8.0] * 64}}))
    with pytest.raises(InputError, match="not the statistics that the manifest names"):
        write(plan, tmp_path / "other", pool=ProcessPool(1))


def test_a_worker_that_dies_costs_only_its_task(
    dense: Path, tmp_path: Path, expected: dict[str, bytes], deadly: Callable[[int], Path]
) -> None:
    deaths = deadly(2)
    progress = Watching()
    write(plan_of(dense), tmp_path / "out", pool=ProcessPool(2), progress=progress)
    assert len(list(deaths.glob("death*"))) == 2
    assert tree(tmp_path / "out") == expected
    assert progress.done == progress.total  # nothing was counted twice


def test_a_worker_that_always_dies_is_an_error_that_names_the_tensor_and_keeps_the_rest(
    dense: Path, tmp_path: Path, expected: dict[str, bytes], deadly: Callable[..., Path]
) -> None:
    plan = plan_of(dense)
    tensor = plan.files[-1].steps[-1].outputs[0].name
    deaths = deadly(100, tensor)
    with pytest.raises(WorkerError, match=r"its worker died 3 times \(signal SIGKILL\)") as caught:
        write(plan, tmp_path / "out", pool=ProcessPool(1))
    assert len(list(deaths.glob("death*"))) == 3
    named = str(caught.value).partition(": ")[0].partition(" and ")[0]
    assert named in {step.weight.name for step in plan.files[-1].steps}
    assert not (tmp_path / "out").exists()
    assert "run the same command to resume" in caught.value.__notes__[0]
    (deaths / "kill").write_text("0")
    rest = Watching()
    write(plan, tmp_path / "out", pool=ProcessPool(1), progress=rest)
    assert rest.title == "continuing out"
    assert rest.done == rest.total < plan.read_bytes / 4
    assert tree(tmp_path / "out") == expected


def test_idle_workers_that_are_killed_are_replaced(
    dense: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    pool = ProcessPool(2)
    killed: list[int] = []

    def kill(steps: int) -> None:
        if steps == 5:
            killed.extend(pool.pids)
            for pid in pool.pids:
                os.kill(pid, signal.SIGKILL)

    write(plan_of(dense), tmp_path / "out", pool=pool, progress=Watching(kill))
    assert len(killed) == 2
    assert tree(tmp_path / "out") == expected


@pytest.mark.parametrize("first", ["threads", "processes"])
def test_threads_and_processes_continue_each_others_runs(
    dense: Path, tmp_path: Path, expected: dict[str, bytes], first: str
) -> None:
    def interrupt(steps: int) -> None:
        if steps > 20:
            raise KeyboardInterrupt

    plan = plan_of(dense)
    pools = (None, ProcessPool(1)) if first == "threads" else (ProcessPool(1), None)
    with pytest.raises(KeyboardInterrupt):
        write(plan, tmp_path / "out", threads=1, pool=pools[0], progress=Watching(interrupt))
    rest = Watching()
    write(plan, tmp_path / "out", threads=1, pool=pools[1], progress=rest)
    assert 0 < rest.total < plan.read_bytes
    assert rest.done == rest.total
    assert tree(tmp_path / "out") == expected


# --- what goes wrong in a worker


def test_a_folder_above_that_goes_away_is_a_sentence(dense: Path, tmp_path: Path) -> None:
    def move(steps: int) -> None:
        if steps == 1:
            (tmp_path / "place").rename(tmp_path / "moved")

    words = r"No such file or directory\); its folder does not exist, or was moved"
    with pytest.raises(OutputError, match=words) as caught:
        write(plan_of(dense), tmp_path / "place/out", pool=ProcessPool(1), progress=Watching(move))
    assert not hasattr(caught.value, "__notes__")


def test_a_bad_weight_is_the_same_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = torch.nan
    source = write_checkpoint(tmp_path / "source", config, tensors)
    said = []
    for pool in (None, ProcessPool(2)):
        with pytest.raises(TensorError) as caught:
            write(plan_of(source), tmp_path / "out", pool=pool)
        said.append(str(caught.value))
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert said[0] == said[1]
    assert said[0].startswith(f"{name}: holds NaN or infinity")


def test_failures_come_out_as_they_went_in() -> None:
    def again(error: BaseException) -> BaseException:
        plain = json.loads(json.dumps(failure_json(error)))
        with pytest.raises(type(error) if not isinstance(error, KeyError) else WorkerBugError) as e:
            raise_failure(plain)
        return e.value

    error = OutputError("a", "b", expected="c", hint="d")
    error.__cause__ = OSError(28, "No space left on device", "/x")
    found = again(error)
    assert str(found) == str(error)
    assert isinstance(found.__cause__, OSError)
    assert found.__cause__.errno == 28
    disk = again(OSError(28, "No space left on device", "/x"))
    assert isinstance(disk, OSError)
    assert (disk.errno, disk.filename) == (28, "/x")
    assert isinstance(again(MemoryError()), MemoryError)
    try:
        os.environ["A BUG"]
    except KeyError as bug:
        said = str(again(bug))
    assert "Traceback" in said
    assert __file__ in said
    assert "KeyError: 'A BUG'" in said


def job_of(plan: Plan, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Return a job on a work folder with the order of `plan`, some of it changed."""
    import hashlib

    work = tmp_path / "work"
    work.mkdir()
    order = order_bytes({**order_of(plan, 10**6), **changes})
    (work / "order").write_bytes(order)
    digest = hashlib.sha256(order).hexdigest()
    common = {"work": str(work), "order": digest, "device": "cpu", "threads": 1}
    return {**common, "steps": [0]}


def said_by(job: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        raise_failure(worker.answer(job)["failure"])
    return str(caught.value)


def test_a_worker_with_another_plan_refuses(dense: Path, tmp_path: Path) -> None:
    plan = plan_of(dense)
    key = {**order_of(plan, 10**6)["key"], "plan": "0" * 64}
    said = said_by(job_of(plan, tmp_path, key=key))
    assert "has a different plan, expected what the run started with" in said


def test_a_worker_with_another_version_says_which(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(plan_of(dense), tmp_path)
    monkeypatch.setattr("qwen35.planning.manifest.__version__", "99")
    assert f"a different qwen35 ({qwen35.__version__}, here 99)" in said_by(job)


def test_a_worker_with_another_source_refuses(dense: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    job = job_of(plan_of(source), tmp_path)
    os.utime(source / "config.json")
    assert "has a different source" in said_by(job)


def test_a_worker_that_does_not_see_the_folders_says_so(dense: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    job = job_of(plan_of(source), tmp_path)
    there = said_by({**job, "work": str(tmp_path / "nowhere")})
    assert "nowhere: not seen on" in there
    assert "a file system that all of them see" in there
    assert "another folder on" in said_by({**job, "order": "0" * 64})
    hashing = {key: value for key, value in job.items() if key != "steps"}
    assert "not seen on" in said_by({**hashing, "hash": "x", "work": str(tmp_path / "nowhere")})
    shutil.rmtree(source)
    assert "source: not there on" in said_by(job)


def test_an_order_is_plain_and_gives_the_same_plan(moe: Path) -> None:
    plan = plan_of(moe, "text-fp8", keep=("mlp.shared_expert.down_proj",))
    order = json.loads(order_bytes(order_of(plan, 5)))
    again = plan_from(order)
    assert again.digest == plan.digest
    assert [f.name for f in again.files] == [f.name for f in plan.files]
    kept = make_plan(plan.checkpoint, load_recipe("text"), keep_prefix=True)
    assert plan_from(order_of(kept, 5)).digest == kept.digest


def test_a_killed_run_of_workers_is_continued(
    dense: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    place = tmp_path / "place"
    whole = Trial("workers", str(dense), str(place / "out"), "nf4")
    phases = []
    with killer() as runs:
        place.mkdir()
        unharmed = runs.run(whole)
        assert (unharmed.code, unharmed.error) == (0, "")
        assert tree(place / "out") == expected
        for share in (0.1, 0.3, 0.45, 0.6, 0.75, 0.9):
            shutil.rmtree(place)
            place.mkdir()
            killed = runs.run(replace(whole, kill_at=int(len(unharmed.phases) * share)))
            assert killed.code == -signal.SIGKILL
            phases.append(killed.phases[-1])
            ended = runs.run(whole)
            assert (ended.code, ended.error) == (0, ""), phases
            assert tree(place / "out") == expected, phases
    assert sum("journal" in phase for phase in phases) >= 2, phases


def test_workers_end_with_the_run_that_began_them(dense: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from running import plan_of\n"
        "from qwen35.writing.write import write\n"
        "from qwen35.execution.process_pool import ProcessPool\n"
        "pool = ProcessPool(2)\n"
        "class Dies:\n"
        "    def begin(self, *_): pass\n"
        "    def end(self): pass\n"
        "    def advance(self, *_):\n"
        "        print(*pool.pids, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "write(plan_of(Path(sys.argv[1])), Path(sys.argv[2]), pool=pool, progress=Dies())\n"
    )
    package = str(Path(qwen35.__file__).parent.parent)
    path = os.pathsep.join([package, str(Path(__file__).parent)])
    ended = subprocess.run(
        [sys.executable, "-c", script, str(dense), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert ended.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in ended.stdout.split()]
    assert pids
    for _ in range(20 * PATIENCE):
        if not any(is_running(pid) for pid in pids):
            break
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# --- the command, and GPUs


def test_the_command_with_workers(
    dense: Path, tmp_path: Path, expected: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["convert", str(dense), out, "--workers", "2", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == out
    assert tree(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workers", "2", "--slice", "1/2"], "--workers and --slice: exclude each other"),
        (["--ray-address", "auto", "--memory", "1GB"], "--memory: applies to this machine only"),
        (["--workers", "2", "--memory", "300MB"], "--memory 300.00 MB: too little, expected"),
        (["--workers", "2", "--device", "cuda:99"], "does not see such a GPU"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main(["convert", str(dense), str(tmp_path / "out"), "--quiet", *flags]) == 2
    assert words in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three GPUs, as far as torch says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)


@pytest.mark.usefixtures("gpus")
def test_cuda_means_all_gpus_that_are_visible() -> None:
    pytest.importorskip("triton")
    assert len(devices.kernels_for("cuda")) == 3
    assert devices.gpu_numbers("cuda") == (0, 1, 2)
    assert len(devices.kernels_for("cuda:2,cuda:0")) == 2
    assert devices.gpu_numbers("cuda:2,cuda:0") == (2, 0)
    assert devices.gpu_numbers("auto") == ()
    with pytest.raises(UsageError, match="does not see such a GPU"):
        devices.gpu_numbers("cuda:3")


@pytest.mark.usefixtures("gpus")
def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    begun: list[dict[str, str]] = []

    class Begun:
        def __init__(self, command: list[str], *, env: dict[str, str], **_: object) -> None:
            begun.append(env)
            raise KeyboardInterrupt

    def visible(device: str) -> list[str]:
        begun.clear()
        with ProcessPool(4, device=device) as pool:
            for number in range(4):
                with pytest.raises(KeyboardInterrupt):
                    pool.begin(number, {})
        return [env.get("CUDA_VISIBLE_DEVICES", "") for env in begun]

    monkeypatch.setattr("subprocess.Popen", Begun)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible("cuda") == ["0", "1", "2", "0"]
    assert visible("cuda:2,cuda:1") == ["2", "1", "2", "1"]
    assert visible("cpu") == [""] * 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-abc,7")
    assert visible("cuda") == ["5", "GPU-abc", "7", "5"]


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_a_gpu_that_is_full_is_a_sentence(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    pytest.importorskip("triton")

    def refuse(*_: object) -> bool:
        raise error

    monkeypatch.setattr("qwen35.codecs.nf4.torch.TorchEncoder.__call__", refuse)
    words = r"--device cuda:1: the GPU has too little free memory; use fewer --threads or another"
    with pytest.raises(WorkerError, match=words):
        write(plan_of(dense), tmp_path / "out", device="cuda:1")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("gpus")
def test_other_failures_of_a_gpu_stay_bugs(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")

    def fail(*_: object) -> bool:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr("qwen35.codecs.nf4.torch.TorchEncoder.__call__", fail)
    with pytest.raises(RuntimeError, match="device-side assert"):
        write(plan_of(dense), tmp_path / "out", device="cuda")
