"""GGUF files by processes, on a cluster and in slices: the bytes of threads, whoever is killed."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoints import layout_of, write_checkpoint
from deadly import dying
from gguf_models import exact_tensors, make_variant, variant_config
from killing import Killer, Trial, killer
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.errors import OutputError, TensorError, WorkerError
from qwen35.execution.process_pool import ProcessPool
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.work_order import order_bytes, order_of, plan_from
from qwen35.writing.slices import finalize, write_slice
from qwen35.writing.write import write
from running import run, tree
from watching import Watching

TYPES = "F16,Q8_0,Q4_K_M"


def gguf_of(source: Path, types: str = TYPES) -> Plan:
    recipe = load_recipe("mix", "gguf")
    return make_plan(open_folder(source), recipe, types=tuple(types.split(",")), projector="F16")


@pytest.fixture(scope="module")
def runs() -> Iterator[Killer]:
    with killer() as process:
        yield process


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_variant(tmp_path_factory.mktemp("scale"), "dense")


@pytest.fixture(scope="module", params=["plain", "nf4", "fp8"])
def packed(request: pytest.FixtureRequest, source: Path) -> Path:
    """The source, as it is and packed: what workers read is decoded by them."""
    if request.param == "plain":
        return source
    out = source.with_name(f"{source.name}-{request.param}")
    run(source, out, request.param)
    return out


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, bytes]:
    """What one thread writes."""
    write(gguf_of(source), source.with_name("unharmed"), threads=1)
    files = tree(source.with_name("unharmed"))
    assert sum(name.endswith(".gguf") for name in files) == 4
    return files


# --- processes


def test_processes_write_what_threads_write(packed: Path, tmp_path: Path) -> None:
    plan, progress, pool = gguf_of(packed), Watching(), ProcessPool(2)
    threads = write(plan, tmp_path / "threads", threads=1)
    result = write(plan, tmp_path / "out", pool=pool, progress=progress)
    assert tree(tmp_path / "out") == tree(tmp_path / "threads")
    assert result.hashes == threads.hashes
    assert (progress.total, progress.done) == (plan.read_bytes, plan.read_bytes)
    assert not pool.pids


def test_an_order_is_plain_and_gives_the_same_plan(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "q8.toml"
    file.write_text('format = "gguf"\nbase = "mix"\n[[rules]]\nmatch = "*"\naction = "q8_0"\n')
    for recipe in ("mix", "q8-gates-plus", str(file)):
        plan = make_plan(open_folder(source), load_recipe(recipe, "gguf"), types=("Q4_K_M",))
        order = order_of(plan, 5)
        assert json.loads(order_bytes(order)) == order
        again = plan_from(json.loads(order_bytes(order)))
        assert again.digest == plan.digest
        assert dict(again.file_sizes()) == dict(plan.file_sizes())


def test_a_worker_that_dies_costs_only_its_task(
    source: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths = dying(monkeypatch, tmp_path / "deaths", 2)
    progress = Watching()
    write(gguf_of(source), tmp_path / "out", pool=ProcessPool(2), progress=progress)
    assert len(list(deaths.glob("death*"))) == 2
    assert tree(tmp_path / "out") == expected
    assert progress.done == progress.total


def test_a_worker_that_always_dies_is_an_error_and_threads_do_the_rest(
    source: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = gguf_of(source)
    deaths = dying(monkeypatch, tmp_path / "deaths", 100, plan.files[-1].steps[-1].outputs[0].name)
    with pytest.raises(WorkerError, match=r"its worker died 3 times \(signal SIGKILL\)") as caught:
        write(plan, tmp_path / "out", pool=ProcessPool(1))
    assert len(list(deaths.glob("death*"))) == 3
    assert not (tmp_path / "out").exists()
    assert "run the same command to resume" in caught.value.__notes__[0]
    rest = Watching()
    write(plan, tmp_path / "out", threads=1, progress=rest)
    assert rest.total < plan.read_bytes
    assert tree(tmp_path / "out") == expected


@pytest.mark.parametrize("workers", [False, True], ids=["threads", "workers"])
def test_a_bad_weight_is_the_same_sentence_and_leaves_nothing(
    tmp_path: Path, workers: bool
) -> None:
    config = variant_config("dense")
    tensors = exact_tensors(config, layout_of(config), 1)
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    tensors[name][3, 5] = torch.inf
    source = write_checkpoint(tmp_path / "bad", config, tensors)
    for file in make_variant(tmp_path, "dense").iterdir():
        if not (source / file.name).exists() and file.suffix != ".safetensors":
            shutil.copy(file, source)
    pool = ProcessPool(2) if workers else None
    with pytest.raises(TensorError, match=f"^{name}: holds NaN or infinity"):
        write(gguf_of(source, "Q8_0"), tmp_path / "out", threads=1, pool=pool)
    assert not (tmp_path / "out").exists()


def test_a_killed_run_of_workers_is_continued(
    runs: Killer, source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    whole, phases = Trial("workers", str(source), str(place / "out"), TYPES), []
    unharmed = runs.run(whole)
    assert (unharmed.code, unharmed.error) == (0, "")
    assert tree(place / "out") == expected
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        shutil.rmtree(place)
        place.mkdir()
        killed = runs.run(replace(whole, kill_at=int(len(unharmed.phases) * share)))
        assert killed.code == -signal.SIGKILL
        phases.append(killed.phases[-1])
        ended = runs.run(whole)
        assert (ended.code, ended.error) == (0, ""), phases
        assert tree(place / "out") == expected, phases


# --- slices


def test_slices_in_any_order_give_the_same_bytes(
    source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    plan = gguf_of(source)
    for number, order in enumerate(itertools.permutations((1, 2, 3))):
        out = tmp_path / f"out{number}"
        done = [write_slice(plan, out, i, 3, threads=1) for i in order]
        assert not out.exists()
        assert sum(part.weights for part in done) == len(plan.written)
        assert sum(part.nbytes for part in done) == sum(step.nbytes for step in plan.steps)
        _, result = finalize(out, threads=1)
        assert tree(out) == expected
        assert result.hashes.keys() == dict(plan.file_sizes()).keys()


def test_more_slices_than_tasks(source: Path, tmp_path: Path) -> None:
    plan, count = gguf_of(source, "Q8_0"), 150
    done = [write_slice(plan, tmp_path / "out", i, count) for i in range(1, count + 1)]
    assert any(not part.weights for part in done)
    finalize(tmp_path / "out")
    write(plan, tmp_path / "unharmed")
    assert tree(tmp_path / "out") == tree(tmp_path / "unharmed")


def run_slice(source: Path, out: Path, number: int, count: int) -> None:
    write_slice(gguf_of(source), out, number, count, threads=1)


def test_slices_at_the_same_time(source: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    fork, out = multiprocessing.get_context("fork"), tmp_path / "out"
    slices = [fork.Process(target=run_slice, args=(source, out, i, 4)) for i in range(1, 5)]
    for process in slices:
        process.start()
    for process in slices:
        process.join()
        assert process.exitcode == 0
    finalize(out)
    assert tree(out) == expected


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
def test_killed_slices_are_repeated_and_finalized_when_all_are_complete(
    runs: Killer, source: Path, tmp_path: Path, expected: dict[str, bytes], power: bool
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    second = Trial("slice 2/2", str(source), str(place / "out"), TYPES)
    first = replace(second, sink="slice 1/2")
    unharmed = runs.run(first)
    assert (unharmed.code, unharmed.error) == (0, "")
    for share in (0.05, 0.3, 0.6, 0.9):
        shutil.rmtree(place)
        place.mkdir()
        shadow = tmp_path / f"shadow{share}"
        shadow.mkdir()
        assert runs.run(replace(second, power=power, shadow=str(shadow))).code == 0
        kill_at = max(1, int(len(unharmed.phases) * share))
        trial = replace(first, kill_at=kill_at, power=power, shadow=str(shadow))
        assert runs.run(trial).code == -signal.SIGKILL
        with pytest.raises(OutputError, match=r"slice 1/2 (lacks \d+ of \d+ weights|was not)"):
            finalize(place / "out")
        write_slice(gguf_of(source), place / "out", 1, 2)
        finalize(place / "out")
        assert tree(place / "out") == expected


# --- the commands


def test_the_commands(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], expected: dict[str, bytes]
) -> None:
    asked = ["--types", TYPES, "--mmproj"]
    whole, shared, sliced = (str(tmp_path / name) for name in ("whole", "shared", "sliced"))
    assert main(["gguf", str(source), whole, *asked, "--threads", "1", "--quiet"]) == 0
    assert main(["gguf", str(source), shared, *asked, "--workers", "2", "--quiet"]) == 0
    for number in ("2/2", "1/2"):
        capsys.readouterr()
        assert main(["gguf", str(source), sliced, *asked, "--slice", number, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert f"{said['slice']}/2" == number
        assert not Path(sliced).exists()
    assert main(["finalize", sliced, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"]
    assert tree(Path(whole)) == tree(Path(shared)) == tree(Path(sliced))
    assert main(["verify", sliced, "--source", str(source), "--depth", "numbers"]) == 0


def test_the_limit_of_memory_is_of_the_command_too(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["gguf", str(source), str(tmp_path / "out"), "--types", "Q8_0", "--quiet"]
    assert main([*arguments, "--memory", "1MiB"]) == 2
    assert "--memory" in capsys.readouterr().err
    assert main([*arguments, "--memory", "2GiB"]) == 0


@pytest.mark.parametrize(
    "flags",
    [["--workers", "2", "--slice", "1/2"], ["--workers", "2", "--ray-address", "auto"]],
    ids=" ".join,
)
def test_flags_that_do_not_fit_are_refused(
    source: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gguf", str(source), str(tmp_path / "out"), "--types", "Q8_0", *flags]) == 2
    assert set(flags) & set(capsys.readouterr().err.replace(":", "").split())
    assert not any(tmp_path.iterdir())


def test_slices_of_another_plan_do_not_join(source: Path, tmp_path: Path) -> None:
    write_slice(gguf_of(source, "Q8_0"), tmp_path / "out", 1, 2, threads=1)
    with pytest.raises(OutputError, match="another plan"):
        write_slice(gguf_of(source, "F16"), tmp_path / "out", 2, 2, threads=1)
