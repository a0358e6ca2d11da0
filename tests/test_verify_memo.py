"""A check of every number that is killed goes on where it was, and says the same in the end."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gguf_models import make_variant
from qwen35.checkpoint.locations import cache_folder
from qwen35.checkpoint.open import fetch
from qwen35.execution.judging import judge
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.sinks.journal import Journal
from qwen35.verification import memo
from qwen35.verification.behaviour import BehaviourResult
from qwen35.verification.verdict import Verdict
from qwen35.writing.write import write
from running import run
from stopping import Stopping, check

pytestmark = pytest.mark.sentences

KINDS = ("nf4", "fp8", "text", "gguf")


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def artifacts(
    dense: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """Kind to artifact and source."""
    folder = tmp_path_factory.mktemp("artifacts")
    made = {kind: (run(dense, folder / kind, kind).out, dense) for kind in ("nf4", "fp8", "text")}
    source = make_variant(folder, "dense")
    recipe, types = load_recipe("mix", "gguf"), ("F16", "Q4_K_M")
    plan = make_plan(fetch(str(source)), recipe, types=types, projector="F16")
    made["gguf"] = (write(plan, folder / "gguf").out, source)
    return made


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of unfinished checks, written at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(memo, "SECONDS", 0.0)
    return tmp_path / "cache" / "qwen35"


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the weights that were really looked at."""
    names: list[str] = []

    def noted(*given: Any, **more: Any) -> Any:
        names.append(given[-1])
        return judge(*given, **more)

    monkeypatch.setattr("qwen35.verification.numbers_check.judge", noted)
    return names


def damage(artifact: Path) -> None:
    """Flip bits in the middle of each weight file."""
    for path in [*artifact.glob("*.safetensors"), *artifact.glob("*.gguf")]:
        data = bytearray(path.read_bytes())
        for position in (len(data) // 2, len(data) - 200):
            data[position] ^= 0x55
        path.write_bytes(data)


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_check_goes_on_and_says_the_same(
    kind: str,
    damaged: bool,
    artifacts: dict[str, tuple[Path, Path]],
    cache: Path,
    looked: list[str],
    tmp_path: Path,
) -> None:
    made, source = artifacts[kind]
    artifact = Path(shutil.copytree(made, tmp_path / made.name))
    if damaged:
        damage(artifact)
    whole = check(artifact, source).to_json()
    assert whole["passed"] is not damaged
    assert not any(cache.iterdir())  # nothing stays of a check that ended
    total = len(looked)
    looked.clear()

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            check(artifact, source, Stopping(total // 3, interrupt))
    seen = set(looked)
    assert total // 4 <= len(looked) < total
    looked.clear()
    assert check(artifact, source).to_json() == whole
    assert not seen & set(looked) or len(seen & set(looked)) == 1  # the one it was stopped in
    assert len(looked) < total
    assert not any(cache.iterdir())


def test_without_a_source_as_well(
    artifacts: dict[str, tuple[Path, Path]], cache: Path, looked: list[str]
) -> None:
    for kind in ("nf4", "gguf"):
        looked.clear()
        whole = check(artifacts[kind][0], None).to_json()
        total = len(looked)
        with pytest.raises(KeyboardInterrupt):
            check(artifacts[kind][0], None, Stopping(total // 2, interrupt))
        looked.clear()
        assert check(artifacts[kind][0], None).to_json() == whole
        assert 0 < len(looked) < total


KILLED = """
import os, signal, sys
from pathlib import Path
from qwen35.verification import memo
from stopping import Stopping, check
memo.SECONDS = 0.0
stop = lambda: os.kill(os.getpid(), signal.SIGKILL)
check(Path(sys.argv[1]), Path(sys.argv[2]), Stopping(int(sys.argv[3]), stop), threads=2)
"""


def test_a_killed_check_is_continued(
    artifacts: dict[str, tuple[Path, Path]], cache: Path, looked: list[str]
) -> None:
    artifact, source = artifacts["fp8"]
    whole = check(artifact, source).to_json()
    total = len(looked)
    looked.clear()
    command = [sys.executable, "-c", KILLED, str(artifact), str(source), str(total // 2)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert check(artifact, source).to_json() == whole
    assert len(looked) <= total - total // 2 + 2


@pytest.mark.parametrize(("kind", "file"), [("nf4", "model.safetensors"), ("gguf", "*F16.gguf")])
def test_what_changed_is_looked_at_again(
    kind: str,
    file: str,
    artifacts: dict[str, tuple[Path, Path]],
    cache: Path,
    looked: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, original = artifacts[kind]
    artifact = Path(shutil.copytree(made, tmp_path / kind))
    source = Path(shutil.copytree(original, tmp_path / original.name))
    check(artifact, source)
    total = len(looked)
    looked.clear()

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            check(artifact, source, Stopping(total // 2, interrupt))
        looked.clear()

    for touched in (next(artifact.glob(file)), next(source.glob("*.safetensors"))):
        interrupted()
        os.utime(touched, ns=(1, 1))
        check(artifact, source)
        assert len(looked) == total
        looked.clear()
    interrupted()
    moved = Path(shutil.copytree(artifact, tmp_path / "moved"))
    check(moved, source)  # the same files elsewhere
    assert len(looked) == total
    interrupted()
    check(artifact, None)  # compared with nothing: other work
    assert len(looked) == total
    looked.clear()
    monkeypatch.setattr(memo, "manifest_versions", lambda: {"qwen35": "another"})
    check(artifact, source)
    assert len(looked) == total


@pytest.mark.parametrize("home", [None, "", "relative", "/absolute"])
def test_the_cache_is_where_the_specification_says(
    home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", home)
    expected = Path("/absolute") if home == "/absolute" else tmp_path / ".cache"
    assert cache_folder() == expected / "qwen35"


def test_a_short_check_writes_nothing(
    artifacts: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert check(*artifacts["text"]).passed
    assert not (tmp_path / "cache").exists()


def test_a_check_that_cannot_keep_anything_says_so_and_passes(
    artifacts: dict[str, tuple[Path, Path]], cache: Path
) -> None:
    cache.parent.write_text("in the way")
    verdict = check(*artifacts["nf4"])
    assert verdict.passed
    assert len(verdict.notes) == 1
    said, _, path = verdict.notes[0].partition(f"{cache}/verify-")
    assert said == "a check that is killed starts over: cannot write "
    assert path.endswith(f" ({os.strerror(errno.ENOTDIR)})")


@pytest.mark.parametrize("kind", ["text", "gguf"])
def test_notes_of_the_check_and_of_the_model_are_both_told(
    kind: str,
    artifacts: dict[str, tuple[Path, Path]],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache.parent.write_text("in the way")
    for asking in ("asking_engines._in_transformers", "gguf_subject.in_llama"):
        monkeypatch.setattr(
            f"qwen35.verification.{asking}", lambda *_: BehaviourResult(notes=("asked",))
        )
    verdict = check(artifacts[kind][0], None, depth="behaviour")
    assert [note.partition(":")[0] for note in verdict.notes] == [
        "a check that is killed starts over",
        "asked",
    ]


def test_files_of_one_check_have_hashes_of_their_own(cache: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_text(path.name)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    with suppress(KeyboardInterrupt), memo.MemoFile({"of": "both"}) as first:
        assert [first.sha256(path) for path in paths] == hashes
        raise KeyboardInterrupt
    for path in paths:
        path.write_text("not read again")
    with memo.MemoFile({"of": "both"}) as second:
        assert [second.sha256(path) for path in paths] == hashes


def test_checks_of_different_things_note_in_different_files(cache: Path) -> None:
    with memo.MemoFile({"of": "one"}) as one, memo.MemoFile({"of": "another"}) as another:
        one.add("piece", 1)
        another.add("piece", 2)
        assert len(list(cache.iterdir())) == 2
        assert one.notes == another.notes == []


def test_the_same_check_twice_at_once(artifacts: dict[str, tuple[Path, Path]], cache: Path) -> None:
    inner: list[Verdict] = []
    outer = check(*artifacts["nf4"], Stopping(3, lambda: inner.append(check(*artifacts["nf4"]))))
    assert outer.passed
    assert outer.notes == ()
    assert inner[0].passed
    assert "another run is writing it" in inner[0].notes[0]


def test_a_note_that_someone_removed_is_not_missed(cache: Path) -> None:
    with memo.MemoFile({}) as noted:
        noted.add("piece", 1)
        for path in cache.iterdir():
            path.unlink()
    assert noted.notes == []


def test_what_is_noted_goes_to_the_disk_now_and_then_and_at_the_end(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Journal.record
    flushed: list[list[str]] = []

    def recorded(journal: Journal, results: Mapping[str, Any]) -> None:
        flushed.append(list(results))
        record(journal, results)

    monkeypatch.setattr(Journal, "record", recorded)
    with suppress(KeyboardInterrupt), memo.MemoFile({}) as noted:
        monkeypatch.setattr(memo, "SECONDS", 1e9)
        for name in ("first", "second", "third"):
            noted.add(name, name)
        raise KeyboardInterrupt
    assert flushed == [["first"], ["second", "third"]]
    with memo.MemoFile({}) as again:
        assert [again.get(name) for name in ("first", "third")] == ["first", "third"]
    assert len(flushed) == 2


def test_a_disk_that_fills_up_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Journal, "record", full)
    with memo.MemoFile({}) as noted:
        noted.add("piece", 1)
        noted.add("another", 2)
    assert noted.notes[0].endswith(f"({os.strerror(errno.ENOSPC)})")


def test_leftovers_that_cannot_be_removed_stay(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EPERM, "not yours", path)

    cache.mkdir(parents=True)
    (cache / "verify-old").touch()
    os.utime(cache / "verify-old", (1e9, 1e9))
    monkeypatch.setattr(Path, "unlink", refuse)
    with memo.MemoFile({}) as noted:
        assert noted.get("piece") is None


def test_leftovers_of_long_ago_are_removed(
    artifacts: dict[str, tuple[Path, Path]], cache: Path
) -> None:
    cache.mkdir(parents=True)
    old, young = cache / "verify-old", cache / "verify-young"
    for path in (old, young):
        path.touch()
    os.utime(old, (1e9, 1e9))
    check(*artifacts["text"])
    assert [path.name for path in cache.iterdir()] == ["verify-young"]
