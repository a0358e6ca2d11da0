"""`qwen35 publish` where the Hub misbehaves."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from fake_hub import Fault
from hub_client import CONTENT, REPO, Client, World, files_in
from hub_store import Repo
from patience import PATIENCE

API = f"/api/models/{REPO}"
COMMIT_PATH = f"{API}/commit"
SHARDS = [name for name in CONTENT if name.endswith(".safetensors")]


@pytest.mark.parametrize("status", [400, 403, 500, 503])
@pytest.mark.parametrize("path", [API, f"{API}/tree"])
def test_failing_listing_aborts_everything(world: World, path: str, status: int) -> None:
    """The old tool took a listing that failed for an empty one."""
    world.pushed()
    head = world.repo.head
    (world.folder / "config.json").write_text("{}")
    for mode in (("check",), ("diff", "--delete"), ("pull", "--delete")):
        world.hub.faults = [Fault(path, status=status, times=99)]
        before = files_in(world.folder)
        assert f"the Hub answered {status}" in world.refused("--mode", *mode)
        assert files_in(world.folder) == before
    assert world.repo.head == head


def test_second_page_that_fails_aborts_everything(world: World) -> None:
    world.pushed()
    world.hub.page = 2
    world.hub.faults = [Fault(f"{API}/tree", status=404, skip=1)]
    assert "the Hub answered 404" in world.refused("--mode", "diff", "--delete")
    assert world.remote() == CONTENT


def test_listing_of_many_pages(world: World) -> None:
    world.pushed()
    world.hub.page = 2
    done = world.publish("--mode", "check")
    assert "0 to upload / 0 to delete / 5 unchanged" in done.out
    assert len(world.hub.asked("GET", "/tree/")) == 4


def test_a_503_that_passes_is_overcome(world: World) -> None:
    world.hub.faults = [Fault(f"{API}/preupload", status=503), Fault("/_lfs/", status=503)]
    world.pushed()
    assert world.remote() == CONTENT


def test_colleague_who_commits_meanwhile_is_not_overwritten(world: World) -> None:
    world.pushed()
    (world.folder / "config.json").write_text("{}")

    def race() -> None:
        world.repo.put({"config.json": b"theirs"})

    world.hub.faults = [Fault(COMMIT_PATH, hook=race)]
    sentence = world.refused("--mode", "diff")
    assert "someone else changed it meanwhile; nothing of yours was committed" in sentence
    assert world.repo.read("config.json") == b"theirs"


def test_two_pushers_at_once_lose_nothing(world: World, tmp_path: Path) -> None:
    world.pushed()
    (world.folder / "config.json").write_text("mine")
    other = tmp_path / "other"
    other.mkdir()
    for name, content in CONTENT.items():
        (other / name).parent.mkdir(exist_ok=True)
        (other / name).write_bytes(content)
    (other / "notes.md").write_text("theirs")
    with Client(world.hub, tmp_path / "second") as second:
        second.start("publish", other, REPO, "--mode", "diff")
        first = world.publish("--mode", "diff")
        done = second.finish()
    assert {first.code, done.code} <= {0, 2}
    assert 0 in (first.code, done.code)
    if first.code == done.code == 0:  # one after the other: the second put the first one's back
        assert len(world.repo.titles) == 4
        return
    won = first if first.code == 0 else done
    assert "verified" in won.out
    expected = {"config.json": b"mine"} if won is first else {"notes.md": b"theirs"}
    assert world.remote() == {**CONTENT, **expected}


def test_repository_made_by_someone_else_meanwhile(world: World) -> None:
    def race() -> None:
        world.hub.repos[REPO] = Repo.create(world.tmp / "theirs")

    world.hub.faults = [Fault("/api/repos/create", hook=race)]
    assert "someone else has just created it; run again" in world.refused()
    assert world.remote() == {}


def test_answer_lost_after_the_commit_is_found_out(world: World) -> None:
    world.hub.faults = [Fault(COMMIT_PATH, drop="after")]
    done = world.publish()
    assert done.code == 0, done.err
    assert "holds all of it, verified" in done.out
    assert world.repo.titles == ["initial commit", "Upload model"]


@pytest.mark.parametrize("status", [500, 502, 504])
def test_error_after_the_commit_is_found_out(world: World, status: int) -> None:
    world.pushed()
    (world.folder / "config.json").write_text("{}")

    def made() -> None:
        world.repo.put({"config.json": b"{}"}, "applied, and then the gateway gave up")

    world.hub.faults = [Fault(COMMIT_PATH, status=status, hook=made)]
    done = world.publish("--mode", "diff")
    assert done.code == 0, done.err
    assert len(world.repo.titles) == 3


@pytest.mark.parametrize("how", [{"drop": "before"}, {"status": 503}])
def test_commit_that_was_not_made_is_told_and_can_be_repeated(
    world: World, how: dict[str, Any]
) -> None:
    world.pushed()
    head = world.repo.head
    (world.folder / SHARDS[0]).write_bytes(b"new weights")
    world.hub.faults = [Fault(COMMIT_PATH, **how)]
    sentence = world.refused("--mode", "diff")
    assert "the commit was not made" in sentence
    assert "nothing changed there" in sentence
    assert world.repo.head == head
    assert len(world.hub.asked("PUT", "/_lfs/")) == 1
    world.pushed("--mode", "diff")
    assert world.hub.asked("PUT", "/_lfs/") == []
    assert world.repo.read(SHARDS[0]) == b"new weights"


def test_lost_answer_and_then_a_colleague(world: World) -> None:
    world.pushed()
    (world.folder / "config.json").write_text("{}")

    def race() -> None:
        world.repo.put({"config.json": b"theirs"})

    world.hub.faults = [Fault(COMMIT_PATH, drop="before", hook=race)]
    assert "someone else changed it meanwhile" in world.refused("--mode", "diff")


def test_lost_answer_and_a_hub_that_is_gone_is_told_as_unknown(world: World) -> None:
    world.pushed()
    (world.folder / "config.json").write_text("{}")
    gone = Fault(API, status=403, skip=3, times=99, method="GET")
    world.hub.faults = [Fault(COMMIT_PATH, drop="after"), gone]
    sentence = world.refused("--mode", "diff")
    assert "the answer to the commit was lost" in sentence
    assert "look with --mode check" in sentence


def test_upload_that_breaks_off_goes_on_where_it_was(world: World) -> None:
    refuse = Fault("/_lfs/", method="PUT", status=403, skip=1, times=99)
    world.hub.faults = [refuse]
    sentence = world.refused()
    assert SHARDS[1] in sentence
    assert "the Hub answered 403" in sentence
    assert world.remote() == {}
    assert [r.status for r in world.hub.asked("PUT", "/_lfs/")] == [200, 403]
    world.hub.faults = []
    world.pushed()
    assert world.remote() == CONTENT


def test_finished_uploads_are_not_sent_again(world: World) -> None:
    world.hub.faults = [Fault("/_lfs/", method="PUT", status=403, skip=1, times=99)]
    world.refused()
    world.hub.faults = []
    world.hub.requests.clear()
    assert world.publish().code == 0
    again = world.hub.asked("PUT", "/_lfs/")
    assert [r.received for r in again] == [len(CONTENT[SHARDS[1]])]


def test_object_that_arrives_damaged_is_refused(world: World) -> None:
    """The server checks the sum that we name; a file that changes on its way does not get in."""
    world.pushed()
    path = world.folder / SHARDS[0]
    path.write_bytes(b"first state")

    def change() -> None:
        path.write_bytes(b"second stat")

    world.hub.faults = [Fault(f"/{REPO}.git/info/lfs", hook=change)]
    assert "the Hub answered 400" in world.refused("--mode", "diff")
    assert world.remote() == CONTENT


def test_file_that_changes_during_the_upload_stops_the_commit(world: World) -> None:
    world.pushed()
    (world.folder / "config.json").write_text("{}")
    (world.folder / "notes.md").write_text("1")

    def change() -> None:
        (world.folder / "notes.md").write_text("2")

    world.hub.faults = [Fault(f"{API}/preupload", hook=change)]
    assert "notes.md: changed since the diff was made" in world.refused("--mode", "diff")
    assert world.remote() == CONTENT


def test_wrong_content_after_the_push_is_found(world: World) -> None:
    world.pushed()
    (world.folder / "config.json").write_text("{}")

    def spoil() -> None:
        blob = world.repo.files["notes.md"]
        world.repo.commits[world.repo.head]["config.json"] = blob

    world.hub.faults = [Fault(f"{API}/tree", hook=spoil, skip=2)]
    sentence = world.refused("--mode", "diff")
    assert "config.json has another content after the push" in sentence


def test_readme_that_the_hub_does_not_take_is_one_sentence(world: World) -> None:
    (world.folder / "README.md").write_text("---\nbroken\n---\n")
    assert "README.md: Invalid metadata in README.md." in world.refused()
    assert world.remote() == {}


def test_remark_of_the_hub_is_passed_on(world: World) -> None:
    (world.folder / "README.md").write_text("no metadata")
    done = world.publish()
    assert done.code == 0
    assert "note: " in done.err
    assert "empty or missing yaml metadata" in done.err


def test_transfer_that_the_client_cannot_do_is_one_sentence(world: World, tmp_path: Path) -> None:
    """With Xet on, the client asks for a way of transfer that this server does not have."""
    with Client(world.hub, tmp_path / "xet", HF_HUB_DISABLE_XET="0") as client:
        done = client.run("publish", world.folder, REPO)
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    assert f"error: {REPO}, {SHARDS[0]}: " in done.err
    assert world.remote() == {}


@pytest.mark.parametrize(
    ("path", "method"),
    [
        (f"/api/models/{REPO}/tree", "GET"),
        (f"/api/models/{REPO}", "GET"),
        (f"/api/models/{REPO}/preupload", "POST"),
        (f"/api/models/{REPO}/commit", "POST"),
        ("/api/repos/create", "POST"),
    ],
)
def test_hub_that_never_answers_is_given_up(
    world: World, tmp_path: Path, path: str, method: str
) -> None:
    if "create" not in path:
        world.pushed()
        (world.folder / "notes.md").write_text("changed")
    released = threading.Event()
    hang = Fault(path, method=method, hook=lambda: released.wait(PATIENCE), times=100)
    world.hub.faults.append(hang)
    with Client(world.hub, tmp_path / "home") as client:
        try:
            done = client.run("publish", world.folder, REPO, entry="impatient:main")
        finally:
            released.set()
    assert done.code == 2, done.out + done.err
    assert "Timeout" in done.err
    assert "Traceback" not in done.err
