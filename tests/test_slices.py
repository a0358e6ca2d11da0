"""Slices of a conversion, in any order and at once, killed or not: finalized, the same bytes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import platform
import shutil
import signal
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import random_tensors, tiny_config, write_checkpoint
from killing import Killer, Trial, killer
from qwen35.cli.main import main
from qwen35.errors import InputError, OutputError, TensorError
from qwen35.sinks.slice_folder import joined
from qwen35.writing.slices import finalize, write_slice
from qwen35.writing.write import write
from running import limit_shards, plan_of, tree

SHARD = 800_000


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_shards(monkeypatch, SHARD)


@pytest.fixture(scope="module")
def runs() -> Iterator[Killer]:
    with killer() as process:
        yield process


@pytest.fixture(scope="module")
def expected(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one run writes."""
    with pytest.MonkeyPatch.context() as patch:
        limit_shards(patch, SHARD)
        out = tmp_path_factory.mktemp("expected") / "out"
        write(plan_of(dense), out, threads=1)
    return tree(out)


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_slices_in_any_order_give_the_same_bytes(
    dense: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    plan = plan_of(dense)
    for number, order in enumerate(itertools.permutations((1, 2, 3))):
        out = tmp_path / f"out{number}"
        done = [write_slice(plan, out, i, 3, threads=1) for i in order]
        assert not out.exists()
        assert sum(part.weights for part in done) == sum(len(f.steps) for f in plan.files)
        assert sum(part.nbytes for part in done) == sum(step.nbytes for step in plan.steps)
        _, result = finalize(out, threads=1)
        assert tree(out) == expected
        assert result.hashes.keys() == dict(plan.file_sizes()).keys()
    assert left(tmp_path) == {f"out{i}" for i in range(6)}


def test_more_slices_than_tasks(
    moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, count = plan_of(moe, "text-fp8"), 300
    done = [write_slice(plan, tmp_path / "out", i, count) for i in range(1, count + 1)]
    assert any(not part.weights for part in done)
    assert main(["finalize", str(tmp_path / "out")]) == 0
    assert (
        "note: FP8 weights were not checked by the slices: qwen35 verify" in capsys.readouterr().err
    )
    write(plan, tmp_path / "unharmed")
    assert tree(tmp_path / "out") == tree(tmp_path / "unharmed")


def run_slice(source: Path, out: Path, number: int, count: int) -> None:
    from qwen35.planning.safetensors_files import safetensors_options

    safetensors_options.MAX_SHARD_BYTES = SHARD
    write_slice(plan_of(source), out, number, count, threads=1)


def test_slices_at_the_same_time(dense: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    fork = multiprocessing.get_context("fork")
    for attempt in range(3):  # they create folder and files by whoever comes first
        out = tmp_path / f"out{attempt}"
        slices = [fork.Process(target=run_slice, args=(dense, out, i, 4)) for i in range(1, 5)]
        for process in slices:
            process.start()
        for process in slices:
            process.join()
            assert process.exitcode == 0
        finalize(out)
        assert tree(out) == expected


def test_killed_slices_are_repeated_and_finalized_when_all_are_complete(
    runs: Killer, dense: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    second = Trial("slice 2/2", str(dense), str(place / "out"), "nf4", shard=SHARD)
    first = replace(second, sink="slice 1/2")
    unharmed = runs.run(first)
    assert (unharmed.code, unharmed.error) == (0, "")
    total = len(unharmed.phases)
    for power in (False, True):
        for share in (0.05, 0.3, 0.6, 0.9):
            shutil.rmtree(place)
            place.mkdir()
            shadow = tmp_path / f"shadow{power}{share}"
            shadow.mkdir()
            both: dict[str, Any] = {"power": power, "shadow": str(shadow)}
            assert runs.run(replace(second, **both)).code == 0
            trial = replace(first, kill_at=max(1, int(total * share)), **both)
            assert runs.run(trial).code == -signal.SIGKILL
            with pytest.raises(OutputError, match=r"slice 1/2 (lacks \d+ of \d+ weights|was not)"):
                finalize(place / "out")
            write_slice(plan_of(dense), place / "out", 1, 2)
            finalize(place / "out")
            assert tree(place / "out") == expected
            assert left(place) == {"out"}


def test_killed_finalizing_is_repeated(
    runs: Killer, dense: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    place = tmp_path / "place"
    prepared = tmp_path / "prepared"
    for i in (1, 2):
        write_slice(plan_of(dense), prepared / "out", i, 2)
    trial = Trial("finalize", "", str(place / "out"), "", shard=SHARD)
    shutil.copytree(prepared, place)
    phases = runs.run(trial).phases
    for kill_at in range(1, len(phases) + 1, max(1, len(phases) // 16)):
        shutil.rmtree(place)
        shutil.copytree(prepared, place)
        again = Trial("finalize", "", str(place / "out"), "", kill_at=kill_at, shard=SHARD)
        assert runs.run(again).code in (0, -signal.SIGKILL)
        if not (place / "out").exists():
            finalize(place / "out")
        assert tree(place / "out") == expected, phases[kill_at - 1]


def test_missing_slices_are_named_and_finalizing_again_is_refused(
    dense: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="out: has no slices; write them with"):
        finalize(out)
    plan = plan_of(dense)
    write_slice(plan, out, 2, 4)
    words = "slice 1/4 was not run; slice 3/4 was not run; slice 4/4 was not run; run these"
    with pytest.raises(OutputError, match=words):
        finalize(out)
    for i in (1, 3, 4):
        write_slice(plan, out, i, 4)
    assert write_slice(plan, out, 3, 4).weights > 0  # again, harmless
    finalize(out)
    assert tree(out) == expected
    with pytest.raises(OutputError, match=r"out: already exists"):
        finalize(out)
    assert tree(out) == expected


def test_an_interrupted_slice_continues(dense: Path, tmp_path: Path) -> None:
    class Interrupted:
        title = ""
        total = done = 0

        def begin(self, title: str, nbytes: int) -> None:
            self.title, self.total = title, nbytes

        def advance(self, nbytes: int, item: str) -> None:
            self.done += nbytes
            if self.done > self.total * self.limit:
                raise KeyboardInterrupt

        def end(self) -> None:
            pass

        def __init__(self, limit: float) -> None:
            self.limit = limit

    plan = plan_of(dense)
    first, rest = Interrupted(0.5), Interrupted(1)
    with pytest.raises(KeyboardInterrupt):
        write_slice(plan, tmp_path / "out", 1, 2, threads=1, progress=first)
    assert first.title == "writing slice 1/2 of out"
    write_slice(plan, tmp_path / "out", 1, 2, threads=1, progress=rest)
    assert rest.title == "continuing slice 1/2 of out"
    assert 0 < rest.total == rest.done < first.total


# --- what does not belong together


def test_slices_and_other_runs_keep_out_of_each_others_way(dense: Path, tmp_path: Path) -> None:
    plan, out = plan_of(dense), tmp_path / "out"
    write_slice(plan, out, 1, 2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match=r"holds an unfinished run in slices; run the remaining"):
        write(plan, out)
    with pytest.raises(
        OutputError, match=r"slices of a run with another number of slices; give all"
    ):
        write_slice(plan, out, 1, 3)
    with pytest.raises(OutputError, match=r"a run with another plan; give"):
        write_slice(plan_of(dense, "text"), out, 2, 2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    write_slice(plan, out, 2, 2)
    finalize(out)


def test_slices_of_another_recipe_or_of_a_touched_source_say_just_that(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = shutil.copytree(dense, tmp_path / "source"), str(tmp_path / "out")

    def refusal(recipe: str) -> str:
        command = ["convert", str(source), out, "--recipe", recipe, "--slice", "1/1", "--quiet"]
        assert main(command) == 2
        return capsys.readouterr().err

    write_slice(plan_of(source, "fp8"), tmp_path / "out", 1, 1, check=True)
    assert "holds slices of a run with another plan; give all slices" in refusal("nf4")
    os.utime(source / "config.json")
    expected = "a run with another source (config.json has another time); give all slices"
    assert expected in refusal("fp8")


def test_a_source_that_was_moved_before_finalizing_is_named(dense: Path, tmp_path: Path) -> None:
    source = shutil.copytree(dense, tmp_path / "source")
    write_slice(plan_of(source), tmp_path / "out", 1, 1)
    source.rename(tmp_path / "moved")
    with pytest.raises(InputError) as caught:
        finalize(tmp_path / "out")
    assert str(caught.value) == (
        f"{source}: not there on {platform.node()}, expected the source of the slices; "
        "finalize reads its headers and small files: bring it back to where it was"
    )


def test_a_place_that_is_no_folder_is_a_sentence(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="Not a directory"):
        write_slice(plan_of(dense), tmp_path / "file" / "below" / "out", 1, 1)
    write_slice(plan_of(dense), tmp_path / "new" / "below" / "out", 1, 1)
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "precious").write_text("mine")
    with pytest.raises(OutputError, match="was not made by qwen35"):
        write_slice(plan_of(dense), tmp_path / "out", 1, 1)


def test_a_slice_does_not_join_a_run_without_slices(dense: Path, tmp_path: Path) -> None:
    class Once:
        def begin(self, title: str, nbytes: int) -> None:
            pass

        def advance(self, nbytes: int, item: str) -> None:
            raise KeyboardInterrupt

        def end(self) -> None:
            pass

    plan, out = plan_of(dense), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write(plan, out, threads=1, progress=Once())
    with pytest.raises(OutputError, match="holds a run without slices"):
        write_slice(plan, out, 1, 2)
    write(plan, out)


def test_the_same_slice_twice_at_once_is_refused(dense: Path, tmp_path: Path) -> None:
    from qwen35.planning.tasks import task_bytes
    from qwen35.planning.work_order import order_of

    plan, out = plan_of(dense), tmp_path / "out"
    order = order_of(plan, task_bytes(plan, 2), check=False, slices=2, overwrite=False)
    with joined(out, 1, order):
        with pytest.raises(OutputError, match="slice-1-of-2: another run is writing it"):
            write_slice(plan, out, 1, 2)
        write_slice(plan, out, 2, 2)
        with pytest.raises(OutputError, match="slice-1-of-2: another run is writing it"):
            finalize(out)
    write_slice(plan, out, 1, 2)
    finalize(out)


def test_a_file_that_is_gone_is_not_made_anew_with_holes(dense: Path, tmp_path: Path) -> None:
    plan, out = plan_of(dense), tmp_path / "out"
    write_slice(plan, out, 1, 2)
    victim = sorted((tmp_path / ".out.partial" / "files").iterdir())[0]
    victim.unlink()
    write_slice(plan, out, 2, 2)
    with pytest.raises(OutputError, match=r"is missing; remove .*\.out\.partial"):
        finalize(out)


def test_a_bad_weight_fails_its_slice_alone_and_keeps_the_others(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    tensors["model.language_model.layers.0.mlp.up_proj.weight"][0, 0] = torch.inf
    source = write_checkpoint(tmp_path / "source", config, tensors)
    plan, out = plan_of(source), tmp_path / "out"
    said = []
    for i in range(1, 5):
        try:
            write_slice(plan, out, i, 4)
        except TensorError as error:
            said.append(str(error))
    assert len(said) == 1
    assert "holds NaN or infinity" in said[0]
    with pytest.raises(OutputError, match=r"slice \d/4 lacks"):
        finalize(out)


def test_slices_replace_an_output_only_when_asked(
    dense: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    plan, out = plan_of(dense), tmp_path / "out"
    write(plan_of(dense, "text"), out)
    with pytest.raises(OutputError, match="exists already"):
        write_slice(plan, out, 1, 1)
    write_slice(plan, out, 1, 1, overwrite=True)
    assert tree(out) != expected
    finalize(out)
    assert tree(out) == expected


def test_the_commands(
    dense: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = str(tmp_path / "out")
    for part in ("2/2", "1/2"):
        assert main(["convert", str(dense), out, "--slice", part, "--quiet"]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"slice {part}: ")
        assert f"qwen35 finalize {out}" in shown
        if part == "2/2":
            assert main(["finalize", out]) == 2
            assert "error: " in (said := capsys.readouterr().err)
            assert "slice 1/2 was not run" in said
    assert main(["finalize", out, "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == out
    assert tree(tmp_path / "out") == expected


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", ""])
def test_a_slice_that_makes_no_sense_is_refused(
    dense: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(dense), str(tmp_path / "out"), f"--slice={text}"]) == 2
    refusal = f"--slice: {text!r}, expected i/N, with i from 1 to N"
    assert refusal in capsys.readouterr().err


def test_files_of_slices_have_the_mode_that_umask_gives(dense: Path, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_slice(plan_of(dense), tmp_path / "out", 1, 1)
        finalize(tmp_path / "out")
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


# --- what lies in the work folder is anybody's


def work_of(dense: Path, out: Path) -> Path:
    write_slice(plan_of(dense), out, 1, 1, threads=1)
    return out.with_name(f".{out.name}.partial")


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": []},
        {"inputs": {"evil": "x"}},
        {"inputs": {"activations": 3}},
        {"root": 3},
        {"repo": []},
        {"task_bytes": "1"},
        {"task_bytes": 0},
        {"slices": 0},
        {"slices": "2"},
        {"overwrite": "yes"},
    ],
    ids=str,
)
def test_a_damaged_order_is_a_sentence(
    dense: Path, tmp_path: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    work = work_of(dense, tmp_path / "out")
    order = json.loads((work / "order").read_text())
    (work / "order").write_text(json.dumps({**order, **change}))
    assert main(["finalize", str(tmp_path / "out"), "--quiet"]) == 2
    assert f"holds a damaged order ({next(iter(change))})" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "entry", [5, {"errors": {"x": 1}}, {"findings": 3}, [], "text", None], ids=str
)
def test_what_is_no_result_of_a_check_counts_as_not_checked(
    dense: Path, tmp_path: Path, entry: object
) -> None:
    source = write_checkpoint(tmp_path / "in", config := tiny_config(), random_tensors(config))
    out = str(tmp_path / "out")
    arguments = ["convert", str(source), out, "--recipe", "fp8", "--slice", "1/1", "--quiet"]
    assert main(arguments) == 0
    journal = tmp_path / ".out.partial" / "slice-1-of-1"
    name = next(s.outputs[0].name for s in plan_of(source, "fp8").steps if s.op == "fp8")
    text = json.dumps({f"compared {name}": entry}).encode()
    with journal.open("ab") as file:
        file.write(b"%08x %s\n" % (zlib.crc32(text), text))
    assert main(["finalize", out, "--quiet"]) == 0
    assert main(["verify", out, "--source", str(source), "--quiet"]) == 0


@pytest.mark.parametrize("text", [b"5", b"[]", b'"a"', b"null"])
def test_a_line_of_a_journal_that_is_no_object_ends_it(
    dense: Path, tmp_path: Path, text: bytes, expected: dict[str, bytes]
) -> None:
    work = work_of(dense, tmp_path / "out")
    with (work / "slice-1-of-1").open("ab") as file:
        file.write(b"%08x %s\n" % (zlib.crc32(text), text))
    finalize(tmp_path / "out")
    assert tree(tmp_path / "out") == expected


def test_a_folder_among_the_files_is_cleared(
    dense: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    work = work_of(dense, tmp_path / "out")
    (work / "files" / "strange" / "more").mkdir(parents=True)
    finalize(tmp_path / "out")
    assert tree(tmp_path / "out") == expected


def test_a_link_in_the_place_of_the_files_is_refused(dense: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "model.safetensors").write_bytes(b"mine")
    work = work_of(dense, tmp_path / "out")
    shutil.rmtree(work / "files")
    (work / "files").symlink_to(victim)
    with pytest.raises(OutputError, match="is a link, expected a folder of ours; remove it"):
        write_slice(plan_of(dense), tmp_path / "out", 1, 1)
    assert tree(victim) == {"model.safetensors": b"mine"}


def test_slices_over_a_run_without_say_so(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = work_of(dense, tmp_path / "out")
    order = json.loads((work / "order").read_text())
    del order["slices"]
    (work / "order").write_text(json.dumps(order))
    for command in (["convert", str(dense), str(tmp_path / "out"), "--slice", "1/2"],):
        assert main([*command, "--quiet"]) == 2
        assert "holds a run without slices" in capsys.readouterr().err


def test_samples_are_not_for_slices(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(dense), str(tmp_path / "out"), "--recipe", "fp8"]
    assert main([*arguments, "--slice", "1/2", "--verify-samples", "3"]) == 2
    assert "--verify-samples: slices check everything they write" in capsys.readouterr().err
    assert left(tmp_path) == set()
