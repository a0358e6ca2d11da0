"""Work folders are ours or refused, and what was finished in them is checked before it is used."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf_models import make_variant
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.errors import OutputError
from qwen35.execution.process_pool import ProcessPool
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.sinks.checksums import PieceSums
from qwen35.sinks.journal import Journal
from qwen35.sinks.staging import locked, staging
from qwen35.tensors import TensorSpec
from qwen35.writing.slices import finalize, write_slice
from qwen35.writing.write import write
from running import limit_shards, plan_of, tree
from watching import Watching

SHARD = 800_000


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_shards(monkeypatch, SHARD)


@pytest.fixture(scope="module")
def unfinished(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a run that was interrupted when two files were finished."""
    out = tmp_path_factory.mktemp("unfinished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        limit_shards(patch, SHARD)
        plan = plan_of(dense)
        interrupted(plan, out, sum(len(file.steps) for file in plan.files[:2]) + 2)
    return out.with_name(".out.partial")


@pytest.fixture(scope="module")
def in_slices(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of slices, of which all are done."""
    out = tmp_path_factory.mktemp("slices") / "out"
    with pytest.MonkeyPatch.context() as patch:
        limit_shards(patch, SHARD)
        for number in (1, 2):
            write_slice(plan_of(dense), out, number, 2, threads=1)
    return out.with_name(".out.partial")


@pytest.fixture(scope="module")
def expected(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("unharmed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        limit_shards(patch, SHARD)
        write(plan_of(dense), out, threads=1)
    return tree(out)


def interrupted(plan: Plan, out: Path, steps: int, **options: Any) -> None:
    def stop(done: int) -> None:
        if done == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(plan, out, threads=1, progress=Watching(stop), **options)


def look(folder: Path) -> dict[str, Any]:
    """Return all that lies below a folder, links unfollowed."""
    return {
        str(path.relative_to(folder)): (
            str(path.readlink())
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else path.lstat().st_mode
        )
        for path in folder.rglob("*")
    }


# --- refused


def link_files(work: Path, victim: Path) -> str:
    shutil.rmtree(work / "files")
    (work / "files").symlink_to(victim)
    return "files: is a link, expected a folder of ours; remove it"


def link_a_finished_file(work: Path, victim: Path) -> str:
    first = min((work / "files").glob("*.safetensors"))
    first.rename(victim / "copy")
    first.symlink_to(victim / "copy")
    return f"{first.name}: is a link, expected a file of ours; remove it"


def link_hard(work: Path, victim: Path) -> str:
    first = min((work / "files").glob("*.safetensors"))
    os.link(first, victim / "copy")
    return f"{first.name}: has a second name elsewhere (a hard link), expected a file of ours"


def pipe_a_file(work: Path, victim: Path) -> str:
    first = min((work / "files").glob("*.safetensors"))
    first.unlink()
    os.mkfifo(first)
    return f"{first.name}: is a named pipe, expected a file of ours"


def link_what_is_not_known(work: Path, victim: Path) -> str:
    (work / "files" / "strange").symlink_to(victim / "precious.txt")
    return "strange: is a link, expected a file of ours"


def journal_of(work: Path) -> Path:
    return next(p for name in ("journal", "slice-1-of-2") if (p := work / name).exists())


def link_the_journal(work: Path, victim: Path) -> str:
    journal = journal_of(work)
    journal.rename(victim / "journal")
    journal.symlink_to(victim / "journal")
    return f"{journal.name}: is a link, expected a file of ours"


def pipe_the_journal(work: Path, victim: Path) -> str:
    journal = journal_of(work)
    journal.unlink()
    os.mkfifo(journal)
    return f"{journal.name}: is a named pipe, expected a file of ours"


def put_a_folder_for_the_journal(work: Path, victim: Path) -> str:
    journal = journal_of(work)
    journal.unlink()
    journal.mkdir()
    return f"{journal.name}: is a folder, expected a file of ours"


def link_the_order(work: Path, victim: Path) -> str:
    (work / "order").unlink(missing_ok=True)
    (work / "order").symlink_to(victim / "precious.txt")
    return "order: is a link, expected a file of ours"


def link_the_mark(work: Path, victim: Path) -> str:
    (work / ".qwen35-partial").unlink()
    (work / ".qwen35-partial").symlink_to(victim / "new")
    return ".qwen35-partial: is a link, expected a file of ours"


def link_an_output_moved_aside(work: Path, victim: Path) -> str:
    (work / "old").symlink_to(victim)
    return "old: is a link, expected a folder of ours"


def take_the_mark(work: Path, victim: Path) -> str:
    (work / ".qwen35-partial").unlink()
    return ".out.partial: is in the way and was not made by qwen35; move it away"


def link_the_folder(work: Path, victim: Path) -> str:
    work.rename(victim / "work")
    work.symlink_to(victim / "work")
    return ".out.partial: is in the way and was not made by qwen35; move it away"


HARMS = (
    link_files,
    link_a_finished_file,
    link_hard,
    pipe_a_file,
    link_what_is_not_known,
    link_the_journal,
    pipe_the_journal,
    put_a_folder_for_the_journal,
    link_the_order,
    link_the_mark,
    link_an_output_moved_aside,
    take_the_mark,
    link_the_folder,
)

COMMANDS = {
    "convert": ["convert", "SOURCE", "OUT", "--recipe", "nf4", "--threads", "1"],
    "workers": ["convert", "SOURCE", "OUT", "--recipe", "nf4", "--workers", "1"],
    "slice": ["convert", "SOURCE", "OUT", "--recipe", "nf4", "--slice", "1/2"],
    "finalize": ["finalize", "OUT"],
}


@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_what_is_not_ours_is_refused_and_nothing_is_touched(
    unfinished: Path,
    in_slices: Path,
    dense: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    harm: Callable[[Path, Path], str],
) -> None:
    origin = in_slices if verb in ("slice", "finalize") else unfinished
    work = Path(shutil.copytree(origin, tmp_path / ".out.partial"))
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious.txt").write_text("mine")
    words = harm(work, victim)
    before = look(tmp_path)
    places = {"SOURCE": str(dense), "OUT": str(tmp_path / "out")}
    command = [places.get(word, word) for word in COMMANDS[verb]]
    assert main([*command, "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert look(tmp_path) == before


def test_of_another_user(
    unfinished: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Path(shutil.copytree(unfinished, tmp_path / ".out.partial"))
    before, own = look(work), os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with monkeypatch.context() as patch:
        patch.setattr("qwen35.sinks.work_folder.owner_of_new_files", lambda _: own + 1)
        with pytest.raises(OutputError, match=r"\.out\.partial: belongs to another user; remove"):
            write(plan_of(dense), tmp_path / "out", threads=1)
        assert look(work) == before
    # a file server that maps this user to another: what we create there is theirs too
    write(plan_of(dense), tmp_path / "out", threads=1)


@pytest.mark.parametrize("kind", ["link", "pipe", "text"])
def test_what_lies_at_the_lock_is_not_removed(tmp_path: Path, kind: str) -> None:
    lock = tmp_path / ".out.lock"
    if kind == "link":
        lock.symlink_to(tmp_path / "victim")
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.write_text("mine")
    before = look(tmp_path)
    with pytest.raises(OutputError, match=r"\.out\.lock: is "), locked(tmp_path / "out"):
        pytest.fail("locked")
    assert look(tmp_path) == before


def test_a_folder_that_is_swapped_while_we_write_is_not_followed(
    dense: Path, tmp_path: Path
) -> None:
    victim, work = tmp_path / "victim", tmp_path / ".out.partial"
    victim.mkdir()

    def swap(done: int) -> None:
        if done == 3:
            (work / "files").rename(work / "moved")
            (work / "files").symlink_to(victim)

    with pytest.raises(OutputError, match="files: is a link, expected a folder of ours"):
        write(plan_of(dense), tmp_path / "out", threads=1, progress=Watching(swap))
    assert look(victim) == {}
    assert not (tmp_path / "out").exists()


def test_a_file_that_becomes_a_link_before_the_end_is_not_accepted(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="a: is a link"), staging(tmp_path / "out") as folder:
        (folder / "a").symlink_to("/etc/passwd")
    assert not (tmp_path / "out").exists()


# --- checked


def pieces(work: Path) -> dict[str, str]:
    """Return the journal entries of pieces."""
    with Journal(journal_of(work), key_of(work)) as journal:
        return {name: value for name, value in journal.items() if "/" in name and value}


def key_of(work: Path) -> dict[str, Any]:
    first = journal_of(work).read_bytes().split(b"\n")[0]
    key: dict[str, Any] = json.loads(first.partition(b" ")[2])
    return key


def ranges(plan: Plan, file: str, tensor: str) -> list[tuple[int, int]]:
    (planned,) = (f for f in plan.files if f.name == file)
    (target,) = (
        target
        for step in planned.steps
        for target in step.targets
        if file in target.files and target.outputs[0].name == tensor
    )
    return [(planned.offsets[out.name], out.nbytes) for out in target.outputs]


@pytest.mark.parametrize("sink", ["threads", "slices", "workers"])
def test_the_journal_holds_the_checksum_of_each_piece(
    unfinished: Path,
    in_slices: Path,
    dense: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    sink: str,
) -> None:
    if sink == "workers":
        work = tmp_path / ".out.partial"
        interrupted(plan_of(dense), tmp_path / "out", 40, pool=ProcessPool(1))
    else:
        origin = unfinished if sink == "threads" else in_slices
        work = Path(shutil.copytree(origin, tmp_path / ".out.partial"))
    found, plan = pieces(work), plan_of(dense)
    assert len(found) > 20
    for name, value in found.items():
        file, _, tensor = name.partition("/")
        parts = ranges(plan, file, tensor)
        contents = [expected[file][begin : begin + size] for begin, size in parts]
        assert value == checksum(contents), name


def checksum(contents: Sequence[bytes]) -> str:
    """Return the checksum of a piece by its definition."""
    padded = b"".join(content + bytes(-len(content) % 8) for content in contents)
    words = [int.from_bytes(padded[i : i + 8], "little") for i in range(0, len(padded), 8)]
    sums = sum(words), sum(word >> 32 for word in words), sum(k * w for k, w in enumerate(words))
    return "".join(f"{value % 2**64:016x}" for value in sums)


@given(st.data())
def test_a_checksum_does_not_depend_on_the_order_of_writing(data: st.DataObject) -> None:
    size = st.integers(0, 40) | st.integers(8180, 16400)
    sizes = data.draw(st.lists(size, min_size=1, max_size=3))
    tensors = tuple(TensorSpec(str(i), "U8", (size,)) for i, size in enumerate(sizes))
    contents = [Random(data.draw(st.integers())).randbytes(size) for size in sizes]
    parts = []
    for tensor, content in zip(tensors, contents, strict=True):
        cuts = sorted(data.draw(st.sets(st.integers(0, len(content)), max_size=4)))
        bounds = [0, *cuts, len(content)]
        parts += [(tensor.name, a, content[a:b]) for a, b in pairwise(bounds)]
    sums = PieceSums()
    for name, offset, content in data.draw(st.permutations(parts)):
        sums.add(tensors, ("f",), name, offset, memoryview(content))
    assert sums.take(tensors, ("f",)) == checksum(contents)


@pytest.mark.parametrize("sink", ["threads", "workers", "slice", "finalize"])
@pytest.mark.parametrize("whole", [False, True], ids=["unfinished", "finished"])
def test_a_damaged_piece_is_made_again_alone_and_said(
    unfinished: Path,
    in_slices: Path,
    dense: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
    sink: str,
    whole: bool,
) -> None:
    origin = in_slices if sink in ("slice", "finalize") else unfinished
    work = Path(shutil.copytree(origin, tmp_path / ".out.partial"))
    plan, out = plan_of(dense), tmp_path / "out"
    done = pieces(work)
    counts = {f.name: sum(n.startswith(f"{f.name}/") for n in done) for f in plan.files}
    full = {f.name for f in plan.files if counts[f.name] == len(f.steps)}
    name = next(n for n in done if (n.partition("/")[0] in full) == whole or sink == "slice")
    file, _, tensor = name.partition("/")
    begin, size = max(ranges(plan, file, tensor), key=lambda part: part[1])
    with (work / "files" / file).open("r+b") as stream:
        stream.seek(begin + size // 2)
        byte = stream.read(1)
        stream.seek(begin + size // 2)
        stream.write(bytes([byte[0] ^ 1]))
    rest, healthy = Watching(), sum(1 for step in plan.written for _ in step.files) - len(done)
    with caplog.at_level(logging.WARNING, "qwen35"):
        if sink == "slice":
            write_slice(plan, out, 1, 2, threads=1, progress=rest)
            healthy = 0
        elif sink == "finalize":
            finalize(out, threads=1, progress=rest)
            healthy = 0
        else:
            pool = ProcessPool(1) if sink == "workers" else None
            write(plan, out, threads=1, progress=rest, pool=pool)
    (said,) = caplog.messages
    assert f"{file}: was changed; written again: {tensor}" in said
    assert len(rest.steps) == healthy + 1
    if sink == "slice":
        finalize(out, threads=1)
    assert tree(out) == expected


@pytest.mark.parametrize("where", ["head", "padding"])
def test_a_file_damaged_outside_of_its_tensors_is_made_again(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    source = make_variant(tmp_path / "source", "dense")
    plan = make_plan(open_folder(source), load_recipe("mix", "gguf"), types=("Q8_0", "F16"))
    whole = write(plan, tmp_path / "unharmed", threads=1).hashes
    first = plan.files[0]
    interrupted(plan, tmp_path / "out", len(plan.written))  # all is written, one file is hashed
    covered = sorted(
        r
        for s in first.steps
        for t in s.targets
        if first.name in t.files
        for r in [(first.offsets[o.name], o.nbytes) for o in t.outputs]
    )
    gap = next((b + n for (b, n), (c, _) in pairwise(covered) if b + n < c), None)
    if where == "padding" and gap is None:
        pytest.skip("no padding in this file")
    with (tmp_path / ".out.partial" / "files" / first.name).open("r+b") as stream:
        stream.seek(9 if where == "head" else gap or 0)
        stream.write(b"\x55")
    assert write(plan, tmp_path / "out", threads=1).hashes == whole
    if where == "padding":
        assert "was changed outside of its tensors" in caplog.text


# --- journals and orders of any JSON

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just(10**400)
    | st.just("\ud800\x00"),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=3,
)
MANY = settings(max_examples=25, suppress_health_check=list(HealthCheck), deadline=None)


@MANY
@given(st.data())
def test_an_order_of_any_json_is_a_sentence(in_slices: Path, data: st.DataObject) -> None:
    place = in_slices.parent / "orders"
    shutil.rmtree(place, ignore_errors=True)
    work = place / ".out.partial"
    shutil.copytree(in_slices, work, copy_function=os.link)
    for path in (*work.glob("*"), *work.glob("files/*")):
        if path.is_file():  # no second names: those are refused
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
    order = json.loads((work / "order").read_text())
    inner = order
    key = data.draw(
        st.sampled_from(
            [
                *order,
                "key.plan",
                "key.source",
                "key.tool version",
                "recipe.rules",
                "recipe.name",
                "",
            ]
        )
    )
    *path, last = key.split(".")
    for name in path:
        inner = inner[name]
    value = data.draw(JSON)
    if key:
        inner[last] = value
    else:
        order = value
    (work / "order").write_text(json.dumps(order))
    assert main(["finalize", str(place / "out"), "--quiet", "--json"]) in (0, 2)


@MANY
@given(st.dictionaries(st.text(max_size=3), JSON, max_size=3) | JSON, st.booleans())
def test_a_journal_of_any_json_is_continued_or_a_sentence(
    unfinished: Path, dense: Path, value: Any, named: bool
) -> None:
    place = unfinished.parent / "journals"
    shutil.rmtree(place, ignore_errors=True)
    work = Path(shutil.copytree(unfinished, place / ".out.partial"))
    if named:
        value = dict.fromkeys([*pieces(work), "model.safetensors", "strange"][-5:], value)
    text = json.dumps(value).encode()
    with (work / "journal").open("ab") as file:
        file.write(b"%08x %s\n" % (zlib.crc32(text), text))
    assert main(["convert", str(dense), str(place / "out"), "--quiet", "--threads", "1"]) == 0


@pytest.mark.parametrize("text", [b"[" * 100_000, b"{", b"NaN{", b'"\xff"', b"1" * 5000])
def test_a_line_that_is_no_json_ends_a_journal(
    unfinished: Path, dense: Path, tmp_path: Path, text: bytes, expected: dict[str, bytes]
) -> None:
    work = Path(shutil.copytree(unfinished, tmp_path / ".out.partial"))
    with (work / "journal").open("ab") as file:
        file.write(b"%08x %s\n" % (zlib.crc32(text), text))
    write(plan_of(dense), tmp_path / "out", threads=1)
    assert tree(tmp_path / "out") == expected


def test_a_journal_is_not_read_whole_if_it_is_none(
    unfinished: Path, dense: Path, tmp_path: Path
) -> None:
    work = Path(shutil.copytree(unfinished, tmp_path / ".out.partial"))
    os.truncate(work / "journal", 2**40)
    with pytest.raises(OutputError, match="expected a journal of at most 1073741824"):
        write(plan_of(dense), tmp_path / "out", threads=1)


@pytest.mark.parametrize("name", ["hidden-0.bin", "state.json", "state.json.new", "", "a.npz"])
def test_a_calibration_follows_no_link_either(tmp_path: Path, name: str) -> None:
    from qwen35.calibration.states import CalibrationFolder

    work, victim = tmp_path / ".out.calibrating", tmp_path / "victim"
    victim.write_text('{"plan": "digest", "done": ["a"]}')
    if name:
        CalibrationFolder(work, "digest", restart=False).close()
        (work / name).unlink(missing_ok=True)
    (work / name).symlink_to(victim)
    before = look(tmp_path)
    for restart in (False, True):
        with pytest.raises(OutputError, match="is a link, expected a f"):
            CalibrationFolder(work, "other", restart=restart)
    assert look(tmp_path) == before
