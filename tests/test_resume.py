"""A killed run is continued by the next one, and what comes out is what an unharmed run writes."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gguf_models import make_variant
from killing import Killer, Trial, killer
from qwen35.checkpoint.source import open_folder
from qwen35.errors import OutputError
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.sinks.files import TensorFile
from qwen35.writing.write import write
from running import limit_shards, plan_of, tree

KILLS = {False: 16, True: 6}
"""Runs that are killed at least once, by the signal or by the power; twice as many are heavy."""


@pytest.fixture(scope="module")
def runs() -> Iterator[Killer]:
    with killer() as process:
        yield process


@pytest.fixture(scope="module")
def gguf_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_variant(tmp_path_factory.mktemp("gguf"), "dense")


def filling(phase: str) -> bool:
    """Whether a phase is one in which tensor files are written, flushed or noted."""
    call, _, path = phase.partition(" ")
    busy = call in ("pwrite", "posix_fallocate", "fsync", "fdatasync", "write")
    return busy and path.endswith((".safetensors", ".gguf", "/journal", "/files"))


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize("asked", ["nf4", "F16,Q8_0,Q4_K_M"])
def test_runs_killed_at_random_points_end_with_the_same_bytes(
    runs: Killer,
    dense: Path,
    gguf_source: Path,
    tmp_path: Path,
    asked: str,
    power: bool,
    times: int,
) -> None:
    kills = times * KILLS[power]
    source = gguf_source if "," in asked else dense
    place = tmp_path / "place"
    whole = Trial("threads", str(source), str(place / "out"), asked)
    place.mkdir()
    unharmed = runs.run(whole)
    assert (unharmed.code, unharmed.error) == (0, "")
    expected = tree(place / "out")
    chance = random.Random(f"{asked} {power}")
    phases = []
    for number in range(kills):
        shutil.rmtree(place)
        place.mkdir()
        shadow = tmp_path / f"shadow{number}"
        shadow.mkdir()
        kill_at = chance.randrange(1, len(unharmed.phases) + 1)
        trial = replace(whole, kill_at=kill_at, power=power, shadow=str(shadow))
        again = replace(trial, kill_at=chance.randrange(1, len(unharmed.phases)))
        for attempt in (trial, again):
            killed = runs.run(attempt)
            assert killed.code in (0, -9), killed.error
            if killed.code == -9:
                phases.append(killed.phases[-1])
            if (place / "out").exists():
                assert tree(place / "out") == expected
                break
        if not (place / "out").exists():
            ended = runs.run(whole)
            assert (ended.code, ended.error) == (0, ""), phases[-1]
        else:  # complete; what was left beside it goes with the next command, though refused
            ended = runs.run(whole)
            assert "exists already" in ended.error
        assert tree(place / "out") == expected
        left = {path.name for path in place.iterdir()} - {"out"}
        assert left <= {".out.lock"}
        shutil.rmtree(shadow)
    logging.getLogger(__name__).info("killed in: %s", Counter(phases))
    assert len(phases) >= kills
    assert sum(map(filling, phases)) >= kills * 2 // 3


@pytest.mark.parametrize("asked", ["nf4", "F16,Q8_0"])
def test_a_continued_run_does_not_write_again_what_is_finished(
    runs: Killer, dense: Path, gguf_source: Path, tmp_path: Path, asked: str
) -> None:
    source = gguf_source if "," in asked else dense
    whole = Trial("threads", str(source), str(tmp_path / "out"), asked, threads=1)
    unharmed = runs.run(whole)
    shutil.rmtree(tmp_path / "out")
    pwrites = [i for i, phase in enumerate(unharmed.phases, 1) if phase.startswith("pwrite")]
    killed = runs.run(replace(whole, kill_at=pwrites[len(pwrites) * 3 // 4]))
    assert killed.code == -9
    continued = runs.run(whole)
    assert continued.code == 0
    again = sum(phase.startswith("pwrite") for phase in continued.phases)
    assert 0 < again < len(pwrites) / 2


class Interrupted:
    """Progress that interrupts the run after so many steps."""

    def __init__(self, steps: int = 10**9) -> None:
        self.steps = steps
        self.title = ""
        self.total = self.done = 0

    def begin(self, title: str, nbytes: int) -> None:
        self.title, self.total = title, nbytes
        if self.steps < 0:
            raise KeyboardInterrupt

    def advance(self, nbytes: int, item: str) -> None:
        self.done += nbytes
        self.steps -= 1
        if self.steps < 0:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass


def interrupted(plan: Plan, out: Path, steps: int = 12) -> Interrupted:
    progress = Interrupted(steps)
    with pytest.raises(KeyboardInterrupt):
        write(plan, out, threads=1, progress=progress)
    return progress


def test_an_interrupted_run_is_continued_and_progress_is_of_the_rest(
    dense: Path, tmp_path: Path
) -> None:
    plan = plan_of(dense)
    first = interrupted(plan, tmp_path / "out")
    assert first.title == "writing out"
    rest = Interrupted()
    result = write(plan, tmp_path / "out", threads=1, progress=rest)
    assert rest.title == "continuing out"
    assert rest.done == rest.total
    assert first.done <= plan.read_bytes - rest.total <= first.done + 10**6
    assert result.hashes == write(plan, tmp_path / "unharmed", threads=1).hashes


def test_another_plan_refuses_to_continue_and_says_how_to_start_over(
    dense: Path, tmp_path: Path
) -> None:
    interrupted(plan_of(dense), tmp_path / "out")
    words = (
        r"\.out\.partial: holds an unfinished run with another plan; run the original command "
        "again to resume, or remove this to start over"
    )
    for _ in range(2):
        with pytest.raises(OutputError, match=words):
            write(plan_of(dense, "text"), tmp_path / "out")
    shutil.rmtree(tmp_path / ".out.partial")
    write(plan_of(dense, "text"), tmp_path / "out")


TOUCHED = r"unfinished run with another source \(config\.json has another time\); run the original"


def test_a_changed_source_refuses_to_continue(dense: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    interrupted(plan_of(source), tmp_path / "out")
    os.utime(source / "config.json")
    with pytest.raises(OutputError, match=TOUCHED):
        write(plan_of(source), tmp_path / "out")


def test_another_commit_refuses_to_continue(dense: Path, tmp_path: Path) -> None:
    plan = plan_of(dense)
    first = replace(plan, checkpoint=replace(plan.checkpoint, repo="a/b", revision="0" * 40))
    second = replace(plan, checkpoint=replace(plan.checkpoint, repo="a/b", revision="1" * 40))
    interrupted(first, tmp_path / "out")
    with pytest.raises(OutputError, match="unfinished run with another source;"):
        write(second, tmp_path / "out")
    assert write(first, tmp_path / "out").hashes


def test_another_version_of_the_tool_refuses_to_continue(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(plan_of(dense), tmp_path / "out")
    monkeypatch.setattr("qwen35.planning.manifest.__version__", "99")
    with pytest.raises(OutputError, match=r"unfinished run with another qwen35 \(.*, here 99\);"):
        write(plan_of(dense), tmp_path / "out")


def test_a_run_in_which_nothing_was_finished_is_no_hindrance(
    runs: Killer, dense: Path, tmp_path: Path
) -> None:
    interrupted(plan_of(dense), tmp_path / "out", steps=-1)
    assert not any(tmp_path.iterdir())
    runs.run(Trial("threads", str(dense), str(tmp_path / "out"), "nf4", kill_at=20))
    assert (tmp_path / ".out.partial" / "journal").exists()
    write(plan_of(dense, "text"), tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("harm", [b"", b"[]", b"\0" * 4096, b"moved", None])
def test_a_journal_that_is_lost_is_told_and_the_run_starts_over(
    dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: bytes | None
) -> None:
    interrupted(plan_of(dense), tmp_path / "out")
    journal = tmp_path / ".out.partial" / "journal"
    if harm is None:
        journal.unlink()
    else:
        journal.write_bytes(harm)
    progress = Interrupted()
    write(plan_of(dense), tmp_path / "out", threads=1, progress=progress)
    assert progress.title == "writing out"
    (note,) = (r.getMessage() for r in caplog.records if "starting over" in r.getMessage())
    lost = f"{journal.parent}: no journal tells what is finished: starting over"
    assert note == (f"{journal}: is damaged: starting over" if harm else lost)


def test_where_nothing_may_stay_nothing_is_said_to_be_kept(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        write(plan_of(dense), tmp_path / "out", keep=False, threads=1, progress=Interrupted(12))
    assert not hasattr(caught.value, "__notes__")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("how", [shutil.rmtree, lambda folder: folder.rename(f"{folder}-moved")])
def test_a_folder_above_that_goes_away_is_a_sentence_and_nothing_is_said_to_be_kept(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Callable[[Path], None]
) -> None:
    real, place = TensorFile.finish, tmp_path / "place"

    def finish(file: TensorFile) -> str:
        how(place)
        return real(file)

    monkeypatch.setattr(TensorFile, "finish", finish)
    words = r"cannot be written \(No such file or directory\); its folder does not exist, or was"
    with pytest.raises(OutputError, match=words) as caught:
        write(plan_of(dense), place / "out", threads=1)
    assert not hasattr(caught.value, "__notes__")
    assert not place.exists()


HARMS = {
    "a bit": "was changed; written again: ",
    "the end": "bytes instead of ",
    "more": "bytes instead of ",
    "all of it": "is missing; it is written again",
}
"""What happens to a finished file, and what is told."""


def in_shards(plan: Plan, out: Path) -> list[Path]:
    """Interrupt a run when two of its shards are finished, and return them."""
    interrupted(plan, out, steps=sum(len(file.steps) for file in plan.files[:2]) + 2)
    return sorted((out.with_name(".out.partial") / "files").glob("*.safetensors"))


@pytest.mark.parametrize("harm", HARMS)
def test_a_finished_file_that_was_damaged_since_is_written_again(
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    harm: str,
) -> None:
    limit_shards(monkeypatch, 1_500_000)
    plan = plan_of(dense)
    expected = write(plan, tmp_path / "unharmed", threads=1).hashes
    first, *_ = in_shards(plan, tmp_path / "out")
    if harm == "a bit":
        data = bytearray(first.read_bytes())
        data[-1] ^= 1
        first.write_bytes(data)
    elif harm == "the end":
        os.truncate(first, first.stat().st_size - 1)
    elif harm == "more":
        os.truncate(first, first.stat().st_size + 100)
    else:
        first.unlink()
    interrupted(plan, tmp_path / "out", steps=2)  # and once more, while it is made again
    assert f"{first}: " in caplog.text
    assert HARMS[harm] in caplog.text
    assert write(plan, tmp_path / "out", threads=1).hashes == expected


def test_a_torn_journal_costs_only_what_it_does_not_tell(dense: Path, tmp_path: Path) -> None:
    plan = plan_of(dense)
    interrupted(plan, tmp_path / "out")
    journal = tmp_path / ".out.partial" / "journal"
    os.truncate(journal, journal.stat().st_size - 3)
    result = write(plan, tmp_path / "out", threads=1)
    assert result.hashes == write(plan, tmp_path / "unharmed", threads=1).hashes


def test_gguf_files_of_another_plan_are_not_continued(gguf_source: Path, tmp_path: Path) -> None:
    def plan(types: str) -> Plan:
        return make_plan(open_folder(gguf_source), load_recipe("mix", "gguf"), types=(types,))

    with pytest.raises(KeyboardInterrupt):
        write(plan("Q8_0"), tmp_path / "out", threads=1, progress=Interrupted(5))
    with pytest.raises(OutputError, match="another plan"):
        write(plan("F16"), tmp_path / "out")
    write(plan("Q8_0"), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "qwen35.json").read_text())
    assert len(manifest["files"]) == 1
