"""Disks that fill up, files that cannot be read or change, clocks that jump: sentences, no harm."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gguf_models import make_variant
from killing import Killer, Trial, killer
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.errors import InputError, OutputError, TensorError
from qwen35.planning.gguf_files.imatrix import ImatrixEntry
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write
from running import plan_of, tree

Run = Callable[[Path, Path], object]


@pytest.fixture(scope="module")
def runs() -> Iterator[Killer]:
    with killer() as process:
        yield process


@pytest.fixture(scope="module")
def gguf_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_variant(tmp_path_factory.mktemp("gguf"), "dense")


def to_nf4(source: Path, out: Path, **options: Any) -> object:
    return write(plan_of(source), out, **{"threads": 2, **options})


def to_gguf(source: Path, out: Path, **options: Any) -> object:
    plan = make_plan(open_folder(source), load_recipe("mix", "gguf"), types=("F16", "Q8_0"))
    return write(plan, out, **{"threads": 2, **options})


SINKS = pytest.mark.parametrize("sink", [to_nf4, to_gguf])


# --- where it is written to


def writes(phases: Sequence[str]) -> list[int]:
    """Return the numbers of the calls that need room on the disk."""
    calls = ("pwrite", "write", "fsync", "fdatasync", "posix_fallocate", "mkdir", "open", "rename")
    return [i for i, phase in enumerate(phases, 1) if phase.startswith(calls)]


@pytest.mark.parametrize(
    ("asked", "number", "words"),
    [
        pytest.param(asked, number, words, marks=pytest.mark.heavy if again else ())
        for asked, number, words, again in (
            ("nf4", errno.ENOSPC, "No space left on device", False),
            ("nf4", errno.EIO, "Input/output error", False),
            ("nf4", errno.EACCES, "Permission denied", True),
            ("F16,Q8_0", errno.ENOSPC, "No space left on device", True),
            ("F16,Q8_0", errno.EIO, "Input/output error", True),
            ("F16,Q8_0", errno.EACCES, "Permission denied", False),
        )
    ],
)
def test_a_write_that_fails_is_a_sentence_and_the_next_run_ends_with_the_same_bytes(
    runs: Killer,
    dense: Path,
    gguf_source: Path,
    tmp_path: Path,
    asked: str,
    number: int,
    words: str,
) -> None:
    source = gguf_source if "," in asked else dense
    place = tmp_path / "place"
    place.mkdir()
    whole = Trial("threads", str(source), str(place / "out"), asked, threads=1, seconds=1e9)
    unharmed = runs.run(whole)
    expected = tree(place / "out")
    points = writes(unharmed.phases)
    chosen = random.Random(number).sample(points[4:-6], 4)
    for point in (*points[:4], *chosen, *points[-6:]):
        shutil.rmtree(place)
        place.mkdir()
        failed = runs.run(replace(whole, kill_at=point, fault=number))
        if failed.code:  # what fails when all is in place harms nothing
            assert failed.error.startswith("OutputError: "), failed.error
            assert words in failed.error
        if (place / "out").exists():
            assert tree(place / "out") == expected
        again = runs.run(whole)
        assert again.code == 0 or "exists already" in again.error, unharmed.phases[point - 1]
        assert tree(place / "out") == expected
        assert {path.name for path in place.iterdir()} <= {"out", ".out.lock"}


def test_a_disk_that_is_full_keeps_what_is_finished(
    dense: Path, runs: Killer, tmp_path: Path
) -> None:
    whole = Trial("threads", str(dense), str(tmp_path / "out"), "nf4")
    unharmed = runs.run(whole)
    shutil.rmtree(tmp_path / "out")
    middle = writes(unharmed.phases)[len(unharmed.phases) // 2]
    runs.run(replace(whole, kill_at=middle, fault=errno.ENOSPC))
    assert (tmp_path / ".out.partial" / "files").is_dir()
    continued = runs.run(whole)
    assert len(continued.phases) < len(unharmed.phases) * 3 // 4


# --- where it is read from


def harm(monkeypatch: pytest.MonkeyPatch, at: int, action: Callable[[int], None]) -> None:
    """Have the `at`-th read of tensors do something to the file first."""
    real = os.preadv
    count = iter(range(1, 10**9))

    def read(descriptor: int, *rest: Any) -> int:
        if next(count) == at:
            action(descriptor)
        return real(descriptor, *rest)

    monkeypatch.setattr(os, "preadv", read)


def reads(sink: Run, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the number of reads that a run makes."""
    made: list[int] = []
    real = os.preadv

    def read(descriptor: int, *rest: Any) -> int:
        made.append(descriptor)
        return real(descriptor, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", read)
        sink(source, out)
    shutil.rmtree(out)
    return len(made)


@SINKS
def test_a_read_that_fails_names_the_tensor_and_the_next_run_continues(
    sink: Run, gguf_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    sink(gguf_source, tmp_path / "unharmed")
    total = reads(sink, gguf_source, out, monkeypatch)

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    for at in (1, total // 2, total):
        with monkeypatch.context() as patch:
            harm(patch, at, fail)
            with pytest.raises(TensorError, match=r"weight|bias|A_log") as caught:
                sink(gguf_source, out)
        assert "cannot read model.safetensors" in str(caught.value)
        assert not out.exists()
        sink(gguf_source, out)
        assert tree(out) == tree(tmp_path / "unharmed")
        shutil.rmtree(out)
    assert [path.name for path in tmp_path.iterdir()] == ["unharmed"]


def cut(descriptor: int) -> None:
    os.truncate(f"/proc/self/fd/{descriptor}", 5000)


def change(descriptor: int) -> None:
    with Path(f"/proc/self/fd/{descriptor}").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")


def grow(descriptor: int) -> None:
    with Path(f"/proc/self/fd/{descriptor}").open("ab") as file:
        file.write(b"more")


@SINKS
@pytest.mark.parametrize("action", [cut, change, grow])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_source_that_changes_while_it_is_read_names_the_tensor_and_leaves_nothing(
    sink: Run,
    action: Callable[[int], None],
    share: float,
    gguf_source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = tmp_path / "source"
    shutil.copytree(gguf_source, source)
    total = reads(sink, source, tmp_path / "out", monkeypatch)
    harm(monkeypatch, max(1, int(total * share)), action)
    with pytest.raises(TensorError, match="changed since its header was read") as caught:
        sink(source, tmp_path / "out")
    assert re.match(r"(model|mtp)\.[\w.]+: model.safetensors-00001", str(caught.value))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_that_is_replaced_after_it_was_planned_is_refused(
    dense: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    plan = plan_of(source)
    (shard,) = source.glob("*.safetensors")
    beside = tmp_path / "new"
    shutil.copyfile(shard, beside)
    beside.rename(shard)
    with pytest.raises(TensorError, match="changed since its header was read"):
        write(plan, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@SINKS
def test_a_source_without_permission_is_a_sentence(
    sink: Run, gguf_source: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(gguf_source, source)
    for path in source.glob("*.safetensors"):
        path.chmod(0)
    with pytest.raises(InputError, match="Permission denied"):
        sink(source, tmp_path / "out")


def test_a_source_that_loses_its_permission_is_a_sentence(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(dense)
    real = os.open

    def refuse(path: Any, *rest: Any, **more: Any) -> int:
        if str(path).startswith(str(dense)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match=r"safetensors: cannot be read \(Permission denied"):
        write(plan, tmp_path / "out")
    monkeypatch.undo()
    assert not any(tmp_path.iterdir())


def test_an_importance_matrix_that_disappears_is_a_sentence(tmp_path: Path) -> None:
    import numpy as np

    entry = ImatrixEntry(tmp_path / "gone.dat", 0, 4, np.ones(1, np.float32))
    with pytest.raises(InputError, match=r"gone\.dat: cannot be read \(No such file"):
        entry.slice(0, 4)


# --- memory and clocks


@pytest.mark.parametrize("verb", ["convert", "gguf"])
def test_out_of_memory_is_a_sentence(
    verb: str,
    gguf_source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("qwen35.checkpoint.source.Reader.read_into", refuse)
    more = ["--types", "F16"] if verb == "gguf" else []
    assert main([verb, str(gguf_source), str(tmp_path / "out"), "--quiet", *more]) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("error: memory: not enough; use fewer --threads")
    assert not (tmp_path / "out").exists()


@SINKS
def test_clocks_that_jump_do_no_harm(
    sink: Run, gguf_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink(gguf_source, tmp_path / "unharmed")
    source = tmp_path / "copy" / gguf_source.name
    shutil.copytree(gguf_source, source)
    for number, path in enumerate(source.iterdir()):  # from the future, and from before 1970
        os.utime(path, ns=((-1) ** number * 10**18 * 4, (-1) ** number * 10**18 * 4))
    chance = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: chance.uniform(-1e9, 1e10))
    monkeypatch.setattr(time, "time_ns", lambda: chance.randrange(10**19))
    with monkeypatch.context() as patch:
        harm(patch, 20, interrupt)
        with pytest.raises(KeyboardInterrupt):
            sink(source, tmp_path / "out")
    for path in (tmp_path / ".out.partial").rglob("*"):
        os.utime(path, (0, 0))
    sink(source, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "unharmed")


def interrupt(_: int) -> None:
    raise KeyboardInterrupt


def test_a_lock_without_its_process_is_no_hindrance(dense: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.lock").write_bytes(b"")
    write(plan_of(dense), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_is_taken_meanwhile_keeps_the_work(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def take(*_: object) -> bytes:
        out.mkdir()
        (out / "precious").write_text("mine")
        return b"{}"

    with monkeypatch.context() as patch:
        patch.setattr("qwen35.writing.write.manifest_bytes", take)
        with pytest.raises(OutputError, match="exists already"):
            write(plan_of(dense), out)
    assert (out / "precious").read_text() == "mine"
    assert (tmp_path / ".out.partial").exists()
