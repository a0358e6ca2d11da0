"""`qwen35 publish --mode pull`: nothing in the folder changes before everything is there."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from fake_hub import Fault
from hub_client import CONTENT, REPO, Client, World, files_in

RESOLVE = f"/{REPO}/resolve"
SHARD = "model-00001-of-00002.safetensors"


def theirs(world: World) -> None:
    """Put a repository on the Hub that differs from the folder in all ways."""
    world.pushed()
    world.repo.put({SHARD: b"new weights", "config.json": b"{}", "deep/er/new.txt": b"new"})
    world.repo.remove(["notes.md"])
    world.hub.requests.clear()


NEW = {SHARD: b"new weights", "config.json": b"{}", "deep/er/new.txt": b"new"}


def test_fetch_shows_and_changes_nothing(world: World) -> None:
    theirs(world)
    before = files_in(world.tmp)
    done = world.publish("--mode", "fetch", "--delete")
    assert done.code == 0, done.err
    assert "3 to download / 1 to remove / 2 unchanged / 1 kept" in done.out
    row = next(line for line in done.out.splitlines() if line.startswith("notes.md"))
    assert row.endswith("to remove")
    assert files_in(world.tmp) == before
    assert world.hub.sent() == 0
    assert len([r for r in world.hub.requests if "/api/models/" in r.path]) == 2


def test_pull_downloads_and_keeps_what_is_only_here(world: World) -> None:
    theirs(world)
    done = world.publish("--mode", "pull")
    assert done.code == 0, done.err
    assert files_in(world.folder) == {**CONTENT, **NEW}
    assert world.hub.sent() == sum(map(len, NEW.values()))
    head = world.repo.head
    assert {r.path.split("/resolve/")[1][:40] for r in world.hub.asked("GET", "/resolve/")} == {
        head
    }
    assert done.out.splitlines()[-1] == f"{world.folder}: as {REPO}@{head[:12]}"
    assert sorted(p.name for p in world.tmp.iterdir()) == ["artifact", "store"]


def test_pull_with_delete_removes_but_not_what_is_never_pushed(world: World) -> None:
    """The old tool removed notes and .git, because one small file could not be read."""
    theirs(world)
    for name in (".env", ".git/HEAD", "sub/old.txt", ".gitattributes"):
        (world.folder / name).parent.mkdir(exist_ok=True)
        (world.folder / name).write_text("mine")
    assert world.publish("--mode", "pull", "--delete").code == 0
    expected = {n: c for n, c in {**CONTENT, **NEW}.items() if n != "notes.md"}
    kept = dict.fromkeys((".env", ".git/HEAD", ".gitattributes"), b"mine")
    assert files_in(world.folder) == expected | kept
    assert not (world.folder / "sub").exists()


def test_pull_makes_a_folder(world: World) -> None:
    world.pushed()
    out = world.tmp / "a" / "b"
    assert world.publish("--mode", "pull", folder=out).code == 0
    assert files_in(out) == CONTENT
    assert (out / SHARD).stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_dry_pull_makes_no_folder(world: World) -> None:
    world.pushed()
    before = sorted(world.tmp.iterdir())
    done = world.publish("--mode", "fetch", folder=world.tmp / "new")
    assert "5 to download" in done.out
    assert sorted(world.tmp.iterdir()) == before


def test_pull_of_nothing_that_exists(world: World) -> None:
    assert "no such repository" in world.refused("--mode", "pull")
    world.pushed()
    (world.tmp / "file").write_text("")
    assert "not a folder" in world.refused("--mode", "pull", folder=world.tmp / "file")


# what was changed here


def test_file_that_was_changed_here_is_not_replaced(world: World) -> None:
    theirs(world)
    (world.folder / "config.json").write_text("mine")
    before = files_in(world.folder)
    for mode in ("pull", "fetch"):
        done = world.publish("--mode", mode)
        assert done.code == 1
        stopped = [line for line in done.out.splitlines() if line.startswith("STOPPED")]
        words = "changed here since it was pulled or pushed: --overwrite replaces it"
        assert stopped == [f"STOPPED config.json: {words}"]
    assert files_in(world.folder) == before
    assert world.publish("--mode", "pull", "--overwrite").code == 0
    assert files_in(world.folder) == {**CONTENT, **NEW}


def test_pulled_folder_follows_the_repository_until_it_is_edited(world: World) -> None:
    world.pushed()
    out = world.tmp / "copy"
    assert world.publish("--mode", "pull", folder=out).code == 0
    for content in (b"[1]", b"[2]"):
        world.repo.put({"config.json": content, SHARD: content})
        assert world.publish("--mode", "pull", folder=out).code == 0
        assert (out / "config.json").read_bytes() == content
    (out / SHARD).write_bytes(b"edited")
    world.repo.put({SHARD: b"[3]"})
    assert f"STOPPED {SHARD}" in world.publish("--mode", "pull", folder=out).out
    assert (out / SHARD).read_bytes() == b"edited"


def test_file_of_unknown_origin_counts_as_changed_here(world: World) -> None:
    world.pushed()
    out = world.tmp / "other"
    out.mkdir()
    (out / "config.json").write_text("from elsewhere")
    assert "STOPPED config.json: changed here" in world.publish("--mode", "pull", folder=out).out
    assert files_in(out) == {"config.json": b"from elsewhere"}


def test_edited_file_that_left_the_repository_is_not_removed(world: World) -> None:
    theirs(world)
    (world.folder / "notes.md").write_text("edited")
    assert "STOPPED notes.md" in world.publish("--mode", "pull", "--delete").out
    assert (world.folder / "notes.md").read_text() == "edited"
    assert world.publish("--mode", "pull", "--delete", "--overwrite").code == 0
    assert not (world.folder / "notes.md").exists()


def test_manifest_vouches_for_files_that_qwen35_wrote(world: World) -> None:
    world.pushed()
    out = world.tmp / "made"
    out.mkdir()
    (out / "config.json").write_bytes(b"made")
    entry = {"size": 4, "sha256": hashlib.sha256(b"made").hexdigest()}
    manifest = {"manifest": 1, "files": {"config.json": entry}, "tensors": {}}
    (out / "qwen35.json").write_text(json.dumps(manifest))
    assert world.publish("--mode", "pull", folder=out).code == 0
    assert (out / "config.json").read_bytes() == CONTENT["config.json"]


def test_overwrite_is_for_a_pull(world: World) -> None:
    assert "--overwrite: is for a pull" in world.refused("--mode", "diff", "--overwrite")


# what arrives is wrong, or does not arrive


@pytest.mark.parametrize(
    "fault",
    [
        Fault(RESOLVE, method="GET", status=500, skip=1, times=99),
        Fault(RESOLVE, method="GET", corrupt=True, skip=1),
        Fault(RESOLVE, method="GET", drop="before", skip=1, times=99),
        Fault(RESOLVE, method="GET", cut=3, skip=1, times=99),
        Fault(RESOLVE, method="HEAD", status=404, skip=1, times=99),
    ],
    ids=["500", "right length, wrong bytes", "dropped", "cut", "404"],
)
def test_failing_download_changes_nothing_and_goes_on_later(world: World, fault: Fault) -> None:
    """The old tool left new configuration with old weights; the client drops the old file first."""
    theirs(world)
    before = files_in(world.folder)
    world.hub.faults = [Fault(**vars(fault))]
    sentence = world.refused("--mode", "pull", "--delete")
    assert REPO in sentence
    assert files_in(world.folder) == before
    world.hub.faults = []
    world.hub.requests.clear()
    assert world.publish("--mode", "pull", "--delete").code == 0
    assert {n: c for n, c in files_in(world.folder).items() if n in NEW} == NEW
    assert not world.hub.asked("GET", "/config.json")  # it had arrived
    assert sorted(p.name for p in world.tmp.iterdir()) == ["artifact", "store"]


def test_damaged_download_is_told(world: World) -> None:
    theirs(world)
    world.hub.faults = [Fault(f"*{SHARD}", method="GET", corrupt=True)]
    sentence = world.refused("--mode", "pull")
    assert f"{SHARD}: 11 bytes arrived with sha256 " in sentence
    assert "the download was damaged: run again" in sentence


def test_slow_body_is_waited_for(world: World, tmp_path: Path) -> None:
    """The client asks for the rest of a body that has not come within its timeout."""
    theirs(world)
    world.hub.faults = [Fault(RESOLVE, method="GET", slow=1.5)]
    with Client(world.hub, tmp_path / "home", HF_HUB_DOWNLOAD_TIMEOUT="1") as client:
        assert replace(world, client=client).publish("--mode", "pull", "--overwrite").code == 0
    assert files_in(world.folder) == {**CONTENT, **NEW}


def test_broken_download_of_a_large_file_goes_on_within_it(world: World) -> None:
    world.pushed()
    big = bytes(range(256)) * 50_000
    world.repo.put({"big.safetensors": big})
    world.hub.faults = [Fault("*big", method="GET", cut=12 * 2**20)]
    assert world.publish("--mode", "pull").code == 0
    assert files_in(world.folder)["big.safetensors"] == big
    ranges = [r.range for r in world.hub.asked("GET", "big.safetensors")]
    assert ranges == [None, f"bytes={10 * 2**20}-"]


def test_file_that_changes_meanwhile_is_not_overwritten(world: World) -> None:
    theirs(world)

    def edit() -> None:
        (world.folder / "config.json").write_text("edited just now")

    world.hub.faults = [Fault(f"*{SHARD}", method="GET", hook=edit)]
    assert "config.json: changed since the diff was made" in world.refused("--mode", "pull")
    assert (world.folder / SHARD).read_bytes() == CONTENT[SHARD]
    assert (world.folder / "config.json").read_text() == "edited just now"


def test_file_that_appears_meanwhile_is_not_overwritten(world: World) -> None:
    theirs(world)

    def appear() -> None:
        (world.folder / "deep" / "er").mkdir(parents=True)
        (world.folder / "deep" / "er" / "new.txt").write_text("mine")

    world.hub.faults = [Fault(f"*{SHARD}", method="GET", hook=appear)]
    assert "deep/er/new.txt: changed since" in world.refused("--mode", "pull")
    assert (world.folder / "deep" / "er" / "new.txt").read_text() == "mine"


# what stands in the way


def test_link_is_replaced_and_not_written_through(world: World) -> None:
    """The old tool wrote through it: a file outside was overwritten."""
    theirs(world)
    inner = world.folder / "config.json"
    inner.rename(world.folder / "real.json")
    inner.symlink_to("real.json")
    assert world.publish("--mode", "pull").code == 0
    assert not inner.is_symlink()
    assert inner.read_bytes() == b"{}"
    assert (world.folder / "real.json").read_bytes() == CONTENT["config.json"]


def test_link_that_leads_outside_stops_the_pull(world: World) -> None:
    theirs(world)
    victim = world.tmp / "victim.json"
    victim.write_text("victim")
    (world.folder / "config.json").unlink()
    (world.folder / "config.json").symlink_to(victim)
    done = world.publish("--mode", "pull")
    assert done.code == 1
    assert "STOPPED config.json: a symbolic link that leads outside" in done.out
    assert victim.read_text() == "victim"


def test_folder_that_is_a_link_is_not_written_through(world: World) -> None:
    theirs(world)
    outside = world.tmp / "outside"
    (outside / "er").mkdir(parents=True)
    (world.folder / "deep").symlink_to(outside)
    assert "deep: is a symbolic link" in world.refused("--mode", "pull")
    assert files_in(outside) == {}


@pytest.mark.parametrize("there", [True, False])
def test_link_in_place_of_the_folder_is_refused_before_anything(world: World, there: bool) -> None:
    """As `convert` does; a link above the folder is the user's own way to say where it is."""
    world.pushed()
    elsewhere, link = world.tmp / "elsewhere", world.tmp / "link"
    if there:
        elsewhere.mkdir()
    link.symlink_to(elsewhere)
    for mode in ("pull", "fetch"):
        assert "is a symbolic link; give the folder" in world.refused("--mode", mode, folder=link)
    assert elsewhere.exists() is there
    assert not there or files_in(elsewhere) == {}
    if there:
        assert world.publish("--mode", "pull", folder=link / "model").code == 0
        assert files_in(elsewhere / "model") == CONTENT


def test_folder_in_the_way_of_a_file(world: World) -> None:
    theirs(world)
    (world.folder / "config.json").unlink()
    (world.folder / "config.json").mkdir()
    assert "in the way of a file" in world.refused("--mode", "pull")
    (world.folder / "config.json").rmdir()
    (world.folder / "deep").write_text("a file")
    done = world.publish("--mode", "pull")
    assert (done.code, "deep is a file, and a folder here" in done.out) == (1, True)
    assert (world.folder / "deep").read_text() == "a file"


@pytest.mark.parametrize(
    "name",
    [
        "../out.txt",
        "/etc/out.txt",
        "a/../../out.txt",
        "C:out.txt",
        "a\\b.txt",
        ".git/config",
        "x/.cache/y",
        "new\nline.txt",
        "./a",
        "a//b",
    ],
)
def test_hostile_name_stops_the_pull(world: World, name: str) -> None:
    world.pushed()
    files = world.repo.files
    files[name] = files["notes.md"]
    before = files_in(world.tmp)
    done = world.publish("--mode", "pull")
    assert done.code == 1, done.out + done.err
    assert "STOPPED" in done.out
    assert files_in(world.tmp) == before
    assert world.hub.sent() == 0


def test_names_that_differ_in_case_only_stop_the_pull(world: World) -> None:
    world.pushed()
    world.repo.put({"Notes.MD": b"other"})
    done = world.publish("--mode", "pull")
    assert done.code == 1
    assert "differs from" in done.out


def test_full_disk_is_told_before_the_download(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.pushed()
    blob = world.repo.files["notes.md"]
    world.repo.files["huge.safetensors"] = type(blob)(blob.path, 10**18, "0" * 64, "", True)
    sentence = world.refused("--mode", "pull")
    assert "free on its disk" in sentence
    assert world.hub.sent() == 0


def test_something_else_called_like_the_staging_folder(world: World) -> None:
    theirs(world)
    stage = world.tmp / ".artifact.pull"
    stage.mkdir()
    (stage / "mine.txt").write_text("mine")
    assert "was not made by qwen35; move it away" in world.refused("--mode", "pull")
    assert files_in(stage) == {"mine.txt": b"mine"}


@pytest.mark.parametrize(
    "kind", ["folder", "file", "hard link", "mark", "client's folder", "pipe", "deep link"]
)
def test_planted_staging_folder_is_refused_and_nothing_behind_it_changes(
    world: World, kind: str
) -> None:
    theirs(world)
    stage, victim = world.tmp / ".artifact.pull", world.tmp / "victim"
    (stage / "deep").mkdir(parents=True)
    (victim / "huggingface").mkdir(parents=True)
    (victim / "x").write_bytes(NEW["config.json"])
    (stage / ".qwen35-partial").touch()
    target = stage / "config.json"
    if kind == "folder":
        (stage / "deep").rmdir()
        (target := stage / "deep").symlink_to(victim)
    elif kind == "deep link":
        (target := stage / "deep" / "er").symlink_to(victim)
    elif kind == "file":
        target.symlink_to(victim / "x")
    elif kind == "hard link":
        target.hardlink_to(victim / "x")
    elif kind == "mark":
        (stage / ".qwen35-partial").unlink()
        (target := stage / ".qwen35-partial").symlink_to(victim / "x")
    elif kind == "client's folder":
        (target := stage / ".cache").symlink_to(victim)
    else:
        os.mkfifo(target)
    before = files_in(world.folder), files_in(victim)
    assert f"{target}: " in world.refused("--mode", "pull", "--delete")
    assert (files_in(world.folder), files_in(victim)) == before
    assert world.hub.sent() == 0


def test_finished_download_that_becomes_a_link_is_not_placed(world: World) -> None:
    theirs(world)
    staged, victim = world.tmp / ".artifact.pull" / "config.json", world.tmp / "victim"
    victim.write_bytes(NEW["config.json"])

    def swap() -> None:
        staged.unlink()
        staged.symlink_to(victim)

    world.hub.faults = [Fault(f"*{SHARD}", method="GET", hook=swap)]
    assert f"{staged}: is a link, expected " in world.refused("--mode", "pull")
    assert files_in(world.folder) == CONTENT


def test_saved_pull_is_applied_or_stopped(world: World) -> None:
    theirs(world)
    path = world.tmp / "saved.json"
    assert world.publish("--mode", "fetch", "--delete", "--save", path).code == 0
    assert json.loads(path.read_text())["direction"] == "pull"
    head = world.repo.head
    world.repo.put({"config.json": b"[]"})
    assert "the diff was made at" in world.refused("--apply", path)
    world.repo.refs["main"] = head
    assert world.publish("--apply", path).code == 0
    expected = {n: c for n, c in {**CONTENT, **NEW}.items() if n != "notes.md"}
    assert files_in(world.folder) == expected


def test_unwritable_parent_is_a_sentence(world: World) -> None:
    world.pushed()
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    locked = world.tmp / "locked"
    locked.mkdir(0o555)
    assert "cannot be written" in world.refused("--mode", "pull", folder=locked / "new")


def test_two_pulls_at_once(world: World) -> None:
    theirs(world)
    import fcntl

    lock = Path(world.tmp / ".artifact.lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another run is writing it" in world.refused("--mode", "pull")
    assert files_in(world.folder) == CONTENT
