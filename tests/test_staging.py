"""An output folder appears whole or not at all, and harms nothing that was there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qwen35
from qwen35.checkpoint.header import file_layout
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.errors import OutputError
from qwen35.sinks.files import TensorFile, hash_file, write_file
from qwen35.sinks.staging import check_output, check_space, os_errors, staging
from qwen35.tensors import TensorSpec


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Return every path below `folder` and the content of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A folder that an earlier run wrote."""
    out = tmp_path / "out"
    out.mkdir()
    listed = {"model.safetensors": {"size": 3, "sha256": hashlib.sha256(b"old").hexdigest()}}
    manifest = {"manifest": 1, "files": listed, "tensors": {}}
    (out / MANIFEST_NAME).write_text(json.dumps(manifest))
    (out / "model.safetensors").write_text("old")
    return out


# --- check_output


def test_nothing_there_is_fine(tmp_path: Path) -> None:
    check_output(tmp_path / "new", source=tmp_path / "source", overwrite=False)
    check_output(tmp_path / "a" / "b" / "c", source=None, overwrite=True)
    assert snapshot(tmp_path) == {}


def test_empty_folder_is_fine(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check_output(tmp_path / "out", source=None, overwrite=False)


def test_existing_output_is_refused(ours: Path) -> None:
    with pytest.raises(OutputError, match="out: exists already; give --overwrite to replace it"):
        check_output(ours, source=None, overwrite=False)


def test_output_of_ours_may_be_overwritten(ours: Path) -> None:
    (ours / "model.sig").write_text("a signature over all files")
    (ours / ".cache" / "huggingface").mkdir(parents=True)
    (ours / ".cache" / "huggingface" / "CACHEDIR.TAG").write_text("of the Hub's client")
    check_output(ours, source=None, overwrite=True)


def test_files_of_others_in_an_output_are_named_and_never_deleted(ours: Path) -> None:
    (ours / "deep").mkdir()
    (ours / "deep" / "thesis.tex").write_text("years of work")
    (ours / "notes.md").write_text("mine")
    (ours / "link").symlink_to("nowhere")
    words = "out: holds files that qwen35 did not write: deep/thesis.tex, link, notes.md; move them"
    with pytest.raises(OutputError, match=words):
        check_output(ours, source=None, overwrite=True)
    for i in range(4):
        (ours / f"z{i}").touch()
    with pytest.raises(OutputError, match="notes.md, z0, z1 and 2 more;"):
        check_output(ours, source=None, overwrite=True)


def test_file_of_others_that_appears_meanwhile_is_not_deleted(ours: Path) -> None:
    with pytest.raises(OutputError, match="notes.md"), staging(ours, overwrite=True):
        (ours / "notes.md").write_text("mine")
    assert (ours / "notes.md").read_text() == "mine"
    assert (ours / "model.safetensors").read_text() == "old"


def test_document_counts_as_ours_until_someone_edits_it(ours: Path) -> None:
    manifest = json.loads((ours / MANIFEST_NAME).read_text())
    manifest["added"] = {"README.md": {"size": 4, "sha256": hashlib.sha256(b"card").hexdigest()}}
    (ours / MANIFEST_NAME).write_text(json.dumps(manifest))
    (ours / "README.md").write_text("card")
    check_output(ours, source=None, overwrite=True)
    (ours / "README.md").write_text("cart")
    with pytest.raises(OutputError, match=r"did not write: README\.md"):
        check_output(ours, source=None, overwrite=True)


@pytest.mark.parametrize(
    "manifest",
    ["", "[]", "{}", '{"manifest": 1, "files": {}, "tensors": {}, "added": [1]}'],
)
def test_output_with_a_broken_manifest_is_kept(ours: Path, manifest: str) -> None:
    (ours / MANIFEST_NAME).write_text(manifest)
    with pytest.raises(OutputError, match="nothing tells which files are ours"):
        check_output(ours, source=None, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_that_is_not_ours_is_never_overwritten(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"dear")
    words = r"exists already and holds no qwen35\.json, so it was not written by qwen35"
    with pytest.raises(OutputError, match=words) as caught:
        check_output(tmp_path, source=None, overwrite=overwrite)
    assert "--overwrite" not in str(caught.value)


def test_folder_named_like_the_manifest_does_not_make_it_ours(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).mkdir()
    with pytest.raises(OutputError, match=r"holds no qwen35\.json"):
        check_output(tmp_path, source=None, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_file_in_the_way_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(OutputError, match="out: exists and is not a folder"):
        check_output(tmp_path / "out", source=None, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_symbolic_link_in_the_way_is_refused(ours: Path, overwrite: bool) -> None:
    link = ours.parent / "link"
    link.symlink_to(ours)
    with pytest.raises(OutputError, match="link: .*symbolic link"):
        check_output(link, source=None, overwrite=overwrite)
    dangling = ours.parent / "dangling"
    dangling.symlink_to("nowhere")
    with pytest.raises(OutputError, match="dangling: "):
        check_output(dangling, source=None, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_output_that_is_the_input_is_refused(ours: Path, overwrite: bool) -> None:
    with pytest.raises(OutputError, match="output and input are the same folder"):
        check_output(ours, source=ours, overwrite=overwrite)
    (ours.parent / "link").symlink_to(ours)
    with pytest.raises(OutputError, match="output and input are the same folder"):
        check_output(ours / ".." / "link", source=ours, overwrite=overwrite)


def test_output_inside_the_input_is_refused(ours: Path) -> None:
    with pytest.raises(OutputError, match="new: overlaps the input .*; choose another folder"):
        check_output(ours / "deep" / "new", source=ours, overwrite=False)


def test_input_inside_the_output_is_refused(ours: Path) -> None:
    with pytest.raises(OutputError, match="overlaps the input"):
        check_output(ours, source=ours / "source", overwrite=True)


@pytest.mark.parametrize("inside", ["", "imatrix.gguf", "deep/stats.json"])
def test_an_output_is_not_around_a_file_that_is_read(ours: Path, inside: str) -> None:
    """Nor does it replace the folder of one: that of `calibrate` is an output, too."""
    file = ours / inside
    with pytest.raises(OutputError, match="holds the input .*; choose another folder"):
        check_output(ours, source=None, overwrite=True, files=[file])
    (ours.parent / "link").symlink_to(ours)
    with pytest.raises(OutputError, match="holds the input"):
        check_output(ours, source=None, overwrite=True, files=[ours.parent / "link" / inside])
    check_output(ours.parent / "new", source=None, overwrite=True, files=[file])


def test_folder_whose_name_only_begins_alike_does_not_overlap(ours: Path) -> None:
    check_output(ours.parent / "out2", source=ours, overwrite=False)


def test_name_that_is_too_long_is_a_sentence(tmp_path: Path) -> None:
    out = tmp_path / ("x" * 300)

    def write() -> None:
        check_output(out, source=None, overwrite=False)
        with staging(out):
            raise AssertionError("there is no such folder")

    with pytest.raises(OutputError, match="cannot be written .File name too long"):
        write()
    assert snapshot(tmp_path) == {}


# --- check_space


class Usage(NamedTuple):
    """What `shutil.disk_usage` returns."""

    total: int
    used: int
    free: int


def test_space_is_checked_with_some_to_spare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def usage(folder: Path) -> Usage:
        asked.append(folder)
        return Usage(0, 0, 3_000_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    spare = 16 * 2**20
    check_space(tmp_path / "not" / "there", 3_000_000_000 - spare)
    with pytest.raises(OutputError, match=r"3\.00 GB free on its disk, expected at least 9\.02 GB"):
        check_space(tmp_path, 9_000_000_000)
    with pytest.raises(OutputError):
        check_space(tmp_path, 3_000_000_001 - spare)
    assert asked == [tmp_path] * 3


# --- staging


def test_output_appears_whole_and_alone(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with staging(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
        assert folder.parent.parent == out.parent
    assert snapshot(tmp_path) == {
        "deep": None,
        "deep/er": None,
        "deep/er/out": None,
        "deep/er/out/a": b"1",
    }


def test_relative_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with staging(Path("out")) as folder:
        (folder / "a").write_text("1")
    assert snapshot(tmp_path) == {"out": None, "out/a": b"1"}


def test_empty_folder_in_the_way_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staging(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert snapshot(tmp_path) == {"out": None, "out/a": b"1"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OutputError, SystemExit])
def test_failure_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with staging(tmp_path / "a" / "b" / "out") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "x").write_text("1")
            raise error("x", "y") if error is OutputError else error("x")

    with pytest.raises(error):
        fail()
    assert snapshot(tmp_path) == {}


def test_failure_leaves_parents_that_were_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(RuntimeError), staging(tmp_path / "a" / "b" / "out"):
        raise RuntimeError
    assert snapshot(tmp_path) == {"a": None}


def test_failure_leaves_what_others_put_beside_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staging(tmp_path / "a" / "out"):  # noqa: PT012
        (tmp_path / "a" / "note").write_text("mine")
        raise RuntimeError
    assert snapshot(tmp_path) == {"a": None, "a/note": b"mine"}


def test_failure_while_overwriting_leaves_the_old_output(ours: Path) -> None:
    before = snapshot(ours.parent)
    with pytest.raises(RuntimeError), staging(ours, overwrite=True) as folder:  # noqa: PT012
        (folder / "model.safetensors").write_text("new")
        raise RuntimeError
    assert snapshot(ours.parent) == before


def test_overwriting_replaces_and_leaves_no_trace(ours: Path) -> None:
    with staging(ours, overwrite=True) as folder:
        (folder / "b").write_text("new")
        assert (ours / "model.safetensors").read_text() == "old"
    assert snapshot(ours.parent) == {"out": None, "out/b": b"new"}


def leftovers(out: Path, *names: str) -> Path:
    """Make the work folder that a killed run left, with files in the folders `names`."""
    work = out.with_name(f".{out.name}.partial")
    for name in names:
        (work / name).mkdir(parents=True)
        (work / name / "model.safetensors").write_text("left")
    (work / ".qwen35-partial").write_text("")
    return work


def test_leftovers_of_a_killed_run_are_removed(ours: Path) -> None:
    work = leftovers(ours, "files", "files/sub")
    ours.with_name(".out.lock").write_text("")
    with staging(ours, overwrite=True) as folder:
        assert folder == work / "files"
        assert [*folder.iterdir()] == []
        assert (ours / "model.safetensors").read_text() == "old"
        (folder / "b").write_text("new")
    assert snapshot(ours.parent) == {"out": None, "out/b": b"new"}


@pytest.mark.parametrize("name", ["mine.txt", "notes/mine.txt", "journal.bak"])
def test_what_others_put_among_the_leftovers_is_not_deleted(ours: Path, name: str) -> None:
    mine = leftovers(ours, "files") / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    before = snapshot(ours.parent)
    words = f"{name.partition('/')[0]}: was not made by qwen35; move it away"
    with pytest.raises(OutputError, match=words), staging(ours, overwrite=True):
        raise AssertionError("it would be removed at the end")
    assert snapshot(ours.parent) == before


def test_what_others_put_into_the_work_folder_meanwhile_is_not_deleted(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"mine\.txt: was not made by qwen35"),
        staging(tmp_path / "out") as folder,
    ):
        (folder.parent / "mine.txt").write_text("mine")
    assert (tmp_path / ".out.partial" / "mine.txt").read_text() == "mine"


def test_run_killed_after_the_renames_does_not_stop_the_next(ours: Path) -> None:
    leftovers(ours, "old")
    with staging(ours, overwrite=True) as folder:
        (folder / "b").write_text("new")
    assert snapshot(ours.parent) == {"out": None, "out/b": b"new"}


def test_run_killed_after_the_renames_is_cleaned_up_though_the_next_is_refused(ours: Path) -> None:
    before = snapshot(ours.parent)
    leftovers(ours, "old")
    with pytest.raises(OutputError, match="exists already"):
        check_output(ours, source=None, overwrite=False)
    assert snapshot(ours.parent) == before


def test_unfinished_run_is_not_cleaned_up_by_a_check(ours: Path) -> None:
    leftovers(ours, "files")
    before = snapshot(ours.parent)
    check_output(ours, source=None, overwrite=True)
    assert snapshot(ours.parent) == before


def test_run_killed_between_the_renames_is_undone_by_the_next(ours: Path) -> None:
    work = leftovers(ours, "files")
    before = snapshot(ours)
    ours.rename(work / "old")
    with (
        pytest.raises(OutputError, match="exists already; give --overwrite"),
        staging(ours),
    ):
        raise AssertionError("it would replace the output that was put back")
    assert snapshot(ours) == before
    assert not work.exists()


def test_run_killed_while_it_cleaned_up_does_not_stop_the_next(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    with staging(tmp_path / "out") as folder:
        (folder / "b").write_text("new")
    assert snapshot(tmp_path) == {"out": None, "out/b": b"new"}


def test_folder_of_somebody_else_is_never_removed(tmp_path: Path) -> None:
    name = ".out.partial"
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").write_text("kept")
    with (
        pytest.raises(OutputError, match="in the way and was not made by qwen35"),
        staging(tmp_path / "out") as folder,
    ):
        (folder / "a").write_text("1")
    assert snapshot(tmp_path) == {name: None, f"{name}/precious": b"kept"}


def test_staging_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".qwen35-partial").write_text("")
    (tmp_path / ".out.partial").symlink_to(tmp_path / "other")
    with pytest.raises(OutputError, match="in the way"), staging(tmp_path / "out"):
        raise AssertionError("it is not ours")
    assert (tmp_path / "other" / ".qwen35-partial").exists()


@pytest.mark.parametrize("overwrite", [True, False])
def test_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "out"
    with (  # noqa: PT012
        pytest.raises(OutputError, match="exists already|not written by qwen35"),
        staging(out, overwrite=overwrite) as folder,
    ):
        (folder / "a").write_text("1")
        out.mkdir()
        (out / "precious").write_text("kept")
    assert snapshot(tmp_path) == {"out": None, "out/precious": b"kept"}


def test_second_run_is_locked_out_until_the_output_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    refused = []
    rename = os.rename

    def renaming(source: Path, target: Path, **folders: int) -> None:
        with pytest.raises(OutputError, match="another run is writing it"), staging(out):
            raise AssertionError("two runs at once")
        refused.append(target)
        rename(source, target, **folders)

    monkeypatch.setattr(os, "rename", renaming)
    with staging(out) as folder:
        (folder / "a").write_text("1")
    assert refused == [out]
    assert snapshot(tmp_path) == {"out": None, "out/a": b"1"}


def test_failed_rename_brings_the_old_output_back(
    ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(ours.parent)
    rename = os.rename

    def failing(source: Path, target: Path, **folders: int) -> None:
        if Path(source).name == "files":
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(target))
        rename(source, target, **folders)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OutputError, match="cross-device"), staging(ours, overwrite=True):
        pass
    assert snapshot(ours.parent) == before


def test_second_run_is_locked_out_and_harms_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staging(out) as folder:
        (folder / "a").write_text("1")
        with pytest.raises(OutputError, match="another run is writing it; wait"), staging(out):
            raise AssertionError("two runs at once")
        assert (folder / "a").read_text() == "1"
    assert snapshot(tmp_path) == {"out": None, "out/a": b"1"}


def test_run_in_another_process_is_locked_out_until_it_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom qwen35.sinks.staging import staging\n"
        "with staging(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('x')\n    print('in', flush=True)\n    time.sleep(3600)\n"
    )
    out = tmp_path / "out"
    source = str(Path(qwen35.__file__).parent.parent)
    with subprocess.Popen(
        [sys.executable, "-c", script, str(out)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": source},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        with pytest.raises(OutputError, match="another run is writing it"), staging(out):
            raise AssertionError("two runs at once")
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / ".out.partial" / "files" / "half").exists()
    with staging(out) as folder:
        (folder / "a").write_text("1")
    assert snapshot(tmp_path) == {"out": None, "out/a": b"1"}


def test_parent_that_is_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "a" / "b"):
        words = r"file: exists and is not a folder|file/a: cannot be written \(Not a directory"
        with pytest.raises(OutputError, match=words), staging(out):
            raise AssertionError("there is no such folder")
    assert snapshot(tmp_path) == {"file": b"kept"}


def test_file_in_place_of_the_staging_folder_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").write_bytes(b"kept")
    words = r"\.out\.partial: is in the way and was not made by qwen35"
    with pytest.raises(OutputError, match=words), staging(tmp_path / "out"):
        raise AssertionError("there is no such folder")
    assert snapshot(tmp_path) == {".out.partial": b"kept"}


def test_name_that_is_too_long_with_its_suffix_leaves_no_parents(tmp_path: Path) -> None:
    out = tmp_path / "a" / ("x" * 250)
    with pytest.raises(OutputError, match="File name too long"), staging(out):
        raise AssertionError("there is no such folder")
    assert snapshot(tmp_path) == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_parent_is_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"), staging(tmp_path / "out"):
            raise AssertionError("it cannot be written")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EFBIG]
)
def test_what_the_disk_says_becomes_a_sentence(tmp_path: Path, number: int) -> None:
    with pytest.raises(OutputError) as caught, staging(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    said, _, hint = str(caught.value).partition("; ")
    assert said == f"{tmp_path / 'out'}: cannot be written ({os.strerror(number)})"
    assert bool(hint) == (number not in (errno.EIO, errno.EFBIG))
    assert snapshot(tmp_path) == {}


def test_other_errors_of_the_system_stay_bugs(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"), os_errors(tmp_path):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def test_output_has_the_permissions_of_other_folders(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with staging(tmp_path / "out") as folder:
        write_file(folder / "a", b"1")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert (tmp_path / "out" / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


# --- files


def tensor_file(folder: Path) -> tuple[TensorFile, bytes, dict[str, int]]:
    """Start a file of two tensors."""
    head, offsets = file_layout([TensorSpec("a", "U8", (5,)), TensorSpec("b", "BF16", (4,))])
    return TensorFile(folder / "f", head, offsets, len(head) + 13), head, offsets


def test_tensor_file_takes_pieces_in_any_order(tmp_path: Path) -> None:
    file, head, _ = tensor_file(tmp_path)
    file.write("a", 3, memoryview(b"45"))
    file.write("b", 0, memoryview(b"bbbbbbbb"))
    file.write("a", 0, memoryview(b"123"))
    digest = file.finish()
    expected = head + b"bbbbbbbb" + b"12345"
    assert (tmp_path / "f").read_bytes() == expected
    assert digest == hashlib.sha256(expected).hexdigest()


@given(st.permutations(range(8)))
def test_a_file_that_is_hashed_on_the_way_has_the_hash_of_its_bytes(
    tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("hashed")
    pending = [(10, 50), (56, 96)]  # between a head and gaps, which are zeros
    file = TensorFile(folder / "f", b"0123456789", {"a": 10, "b": 56}, 100, pending=pending)
    for number in order:
        name, offset = "ab"[number // 4], number % 4 * 10
        file.write(name, offset, memoryview(bytes([number + 1]) * 10))
    digest = file.finish()
    file.close()
    content = (folder / "f").read_bytes()
    assert content[10:50] == b"".join(bytes([n + 1]) * 10 for n in range(4))
    assert digest == hashlib.sha256(content).hexdigest()


def test_tensor_file_reserves_its_whole_size_at_once(tmp_path: Path) -> None:
    file, head, _ = tensor_file(tmp_path)
    assert (tmp_path / "f").stat().st_size == len(head) + 13
    file.close()
    file.close()


def test_tensor_file_never_writes_over_another(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"kept")
    with pytest.raises(FileExistsError):
        tensor_file(tmp_path)
    assert (tmp_path / "f").read_bytes() == b"kept"


def refuse(number: int) -> Callable[..., Any]:
    """Return a system call that fails."""

    def call(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


def test_full_disk_while_writing_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError) as caught, staging(tmp_path / "out") as folder:  # noqa: PT012
        file, _, _ = tensor_file(folder)
        monkeypatch.setattr(os, "pwrite", refuse(errno.ENOSPC))
        file.write("a", 0, memoryview(b"12345"))
    monkeypatch.undo()
    assert str(caught.value).endswith(
        "out: cannot be written (No space left on device); make room and run again"
    )
    assert snapshot(tmp_path) == {}


def test_full_disk_while_reserving_is_a_sentence_and_closes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len([*Path("/proc/self/fd").iterdir()])
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
    with pytest.raises(OutputError, match="No space left"), staging(tmp_path / "out") as folder:
        tensor_file(folder)
    assert snapshot(tmp_path) == {}
    assert len([*Path("/proc/self/fd").iterdir()]) == before


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_disk_that_cannot_reserve_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", refuse(number))
    file, head, _ = tensor_file(tmp_path)
    file.write("b", 0, memoryview(b"bbbbbbbb"))
    file.finish()
    assert (tmp_path / "f").read_bytes() == head + b"bbbbbbbb" + bytes(5)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:3], at))
    file, head, _ = tensor_file(tmp_path)
    file.write("b", 0, memoryview(b"abcdefgh"))
    file.write("a", 0, memoryview(b"12345"))
    file.finish()
    assert (tmp_path / "f").read_bytes() == head + b"abcdefgh12345"


@given(st.binary(max_size=3000), st.integers(0, 2))
def test_hash_is_of_the_file_as_it_lies(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, megabytes: int
) -> None:
    path = tmp_path_factory.mktemp("hash") / "f"
    content += bytes(megabytes * 2**20)
    assert write_file(path, content) == hash_file(path) == hashlib.sha256(content).hexdigest()


def test_written_file_is_never_over_another(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"kept")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "b", b"new")
    assert (tmp_path / "b").read_bytes() == b"kept"


def test_staging_is_quick(tmp_path: Path) -> None:
    began = time.process_time()
    with staging(tmp_path / "out"):
        pass
    assert time.process_time() - began < 2
