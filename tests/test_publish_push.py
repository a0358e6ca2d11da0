"""`qwen35 publish` to a Hub: the real client against a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fake_hub import Fault
from hub_client import CONTENT, REPO, Client, World, environment, files_in
from hub_store import Repo

API = f"/api/models/{REPO}"
COMMIT_PATH = f"{API}/commit"
SHARDS = [name for name in CONTENT if name.endswith(".safetensors")]


def test_first_push_creates_the_repository_in_one_commit(world: World) -> None:
    done = world.publish()
    assert done.code == 0, done.err
    assert world.remote() == CONTENT
    assert world.repo.titles == ["initial commit", "Upload model"]
    assert not world.repo.private
    head = world.repo.head
    lines = done.out.splitlines()
    assert lines[0].split() == ["FILE", "SIZE", "STATUS"]
    assert [line.split()[0] for line in lines[1:6]] == sorted(CONTENT)
    assert all(line.endswith("to upload") for line in lines[1:6])
    assert lines[7] == "5 to upload / 0 to delete / 0 unchanged"
    assert lines[8].startswith(f"{REPO} does not exist yet")
    assert lines[9] == f"{REPO}@{head[:12]}: holds all of it, verified"


def test_private_and_message(world: World) -> None:
    world.pushed("--private", "--message", "Mine")
    assert world.repo.private
    assert world.repo.titles[-1] == "Mine"


def test_second_push_does_nothing(world: World) -> None:
    world.pushed()
    head = world.repo.head
    done = world.publish()
    assert done.code == 0
    assert "nothing to do" in done.out
    assert world.repo.head == head
    assert not [r for r in world.hub.requests if r.method not in ("GET", "HEAD")]


@pytest.mark.parametrize("mode", [("--mode", "check"), ("--mode", "diff", "--dry-run")])
def test_check_is_two_read_requests_and_no_content(world: World, mode: tuple[str, ...]) -> None:
    world.pushed()
    (world.folder / "config.json").write_text("{}")
    head, before = world.repo.head, files_in(world.tmp)
    done = world.publish(*mode)
    assert done.code == 0, done.err
    models = [r for r in world.hub.requests if "agent-harnesses" not in r.path]
    assert [(r.method, r.path) for r in models] == [("GET", API), ("GET", f"{API}/tree/{head}")]
    assert world.hub.sent() == 0
    assert files_in(world.tmp) == before
    rows = {line.split()[0]: line for line in done.out.splitlines()[1:6]}
    assert rows["config.json"].endswith("to upload")
    digest = world.repo.files[SHARDS[0]].sha256[:8]
    assert rows[SHARDS[0]].endswith(f"unchanged {digest}")
    assert rows["notes.md"].endswith("unchanged")
    assert "1 to upload / 0 to delete / 4 unchanged" in done.out


@pytest.mark.parametrize("mode", ["check", "init"])
def test_dry_run_creates_no_repository(world: World, mode: str) -> None:
    done = world.publish("--mode", mode, "--dry-run")
    assert done.code == 0, done.err
    assert "5 to upload" in done.out
    assert world.hub.repos == {}


def test_dry_run_needs_no_token(world: World) -> None:
    world.pushed()
    world.client.token = None
    assert world.publish("--mode", "check").code == 0


def test_diff_needs_a_repository(world: World) -> None:
    assert "no such repository" in world.refused("--mode", "diff")
    assert world.hub.repos == {}


def test_diff_uploads_what_changed_and_keeps_the_rest(world: World) -> None:
    world.pushed()
    world.repo.put({"theirs.txt": b"theirs"})
    (world.folder / "config.json").write_text("{}")
    (world.folder / "notes.md").unlink()
    done = world.publish("--mode", "diff")
    assert done.code == 0, done.err
    assert world.remote() == {**CONTENT, "config.json": b"{}", "theirs.txt": b"theirs"}
    assert world.repo.titles[-1] == "Push changed files"
    assert done.out.count("only in the repository, kept") == 2
    assert "1 to upload / 0 to delete / 3 unchanged / 3 kept" in done.out
    assert world.hub.asked("PUT", "/_lfs/") == []


def test_delete_shows_and_deletes_but_never_the_hubs_own_file(world: World) -> None:
    world.pushed()
    world.repo.put({"old/theirs.txt": b"theirs", ".env": b"leaked"})
    shown = world.publish("--mode", "check", "--delete").out
    assert [line.split()[0] for line in shown.splitlines() if "to delete" in line][:2] == [
        ".env",
        "old/theirs.txt",
    ]
    done = world.publish("--mode", "diff", "--delete")
    assert done.code == 0, done.err
    assert world.remote() == CONTENT
    assert ".gitattributes" in world.repo.files


def test_mistyped_folder_deletes_nothing(world: World) -> None:
    """The old tool deleted every remote file, and exited with 0."""
    world.pushed()
    head = world.repo.head
    (world.tmp / "empty").mkdir()
    (world.tmp / "photos").mkdir()
    (world.tmp / "photos" / "a.jpg").write_text("")
    for name, found in (("x", "no such folder"), ("empty", "no model"), ("photos", "no model")):
        sentence = world.refused("--mode", "diff", "--delete", folder=world.tmp / name)
        assert found in sentence
    assert world.repo.head == head
    assert world.hub.requests == []


def test_files_mode_commits_the_named_ones(world: World) -> None:
    world.pushed()
    for name in ("config.json", "notes.md", "onnx/graph.txt"):
        (world.folder / name).write_text("new")
    done = world.publish("--mode", "files", "--files", "config.json", "onnx/graph.txt")
    assert done.code == 0, done.err
    changed = {"config.json": b"new", "onnx/graph.txt": b"new"}
    assert world.remote() == {**CONTENT, **changed}
    assert world.repo.titles[-1] == "Update files"


@pytest.mark.parametrize(
    "name", ["missing.txt", "/etc/hostname", "../outside.txt", "onnx", "./config.json", ""]
)
def test_files_must_be_in_the_folder(world: World, name: str) -> None:
    """The old tool uploaded /tmp/x as a deep path, and warned about a missing file."""
    world.pushed()
    (world.tmp / "outside.txt").write_text("outside")
    head = world.repo.head
    assert "not in the folder" in world.refused("--mode", "files", "--files", name)
    assert world.repo.head == head


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("--mode", "files"), "needs --files"),
        (("--files", "a"), "takes no --files"),
        (("--mode", "init", "--delete"), "deletes nothing"),
        (("--mode", "diff", "--save", "x"), "dry run"),
        (("--mode", "pull", "--sign", "x"), "for a fresh push"),
    ],
)
def test_flags_that_do_not_fit(world: World, arguments: tuple[str, ...], found: str) -> None:
    assert found in world.refused(*arguments)
    assert world.hub.requests == []


@pytest.mark.parametrize("name", ["artifact", "a/b/c", "owner/artifact@main", ""])
def test_malformed_repository(world: World, name: str) -> None:
    done = world.client.run("publish", world.folder, name)
    assert (done.code, done.out) == (2, "")
    assert "expected owner/name" in done.err


# what stops a push


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (".env", "A=1", "looks like an environment file"),
        ("sub/.netrc", "machine x", "looks like credentials"),
        ("id_ed25519", "x", "looks like a key"),
        ("model.safetensors.partial", "x", "looks like a temporary file"),
        ("notes.txt", f"token hf_{'aB3' * 12}", "a Hugging Face token"),
        ("a.json", "-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("b.txt", "x hf_opensesame y", "the token in use"),
        ("a\\b.txt", "x", "other systems read differently"),
    ],
)
def test_unwanted_file_stops_the_push_and_is_named(
    world: World, name: str, content: str, message: str
) -> None:
    world.pushed()
    head = world.repo.head
    path = world.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    for mode in ("check", "init", "diff"):
        done = world.publish("--mode", mode)
        assert done.code == 1, done.err
        assert f"STOPPED {name}: " in done.out
        assert message in done.out
        assert "aB3" not in done.out + done.err
        assert world.hub.token not in done.out + done.err
    only = world.publish("--mode", "files", "--files", name)
    assert (only.code, message in only.out) == (1, True)
    assert world.repo.head == head
    assert not [r for r in world.hub.requests if r.method not in ("GET", "HEAD")]


def test_links_that_lead_outside_stop_the_push(world: World) -> None:
    (world.tmp / "secret.txt").write_text("victim")
    (world.folder / "inner.md").symlink_to("notes.md")
    (world.folder / "outer.md").symlink_to(world.tmp / "secret.txt")
    (world.folder / "around").symlink_to(world.tmp)
    (world.folder / "dangling").symlink_to("nothing")
    os.mkfifo(world.folder / "pipe")
    done = world.publish()
    assert done.code == 1
    stopped = [line for line in done.out.splitlines() if line.startswith("STOPPED")]
    assert [line.split()[1] for line in stopped] == ["around:", "dangling:", "outer.md:", "pipe:"]
    assert world.hub.repos == {}
    for name in ("outer.md", "around", "dangling", "pipe"):
        (world.folder / name).unlink()
    world.pushed()
    assert world.repo.read("inner.md") == CONTENT["notes.md"]


def test_git_and_client_folders_are_left_alone(world: World) -> None:
    """The old tool raised a ValueError on the .cache that a download leaves."""
    for name in (".git/HEAD", ".cache/huggingface/download/x.metadata"):
        (world.folder / name).parent.mkdir(parents=True)
        (world.folder / name).write_text("x")
    world.pushed()
    assert world.remote() == CONTENT


def test_unreadable_file_aborts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.pushed()
    (world.folder / "sub").mkdir()
    (world.folder / "sub" / "loop").symlink_to("loop")
    done = world.publish("--mode", "diff", "--delete")
    assert done.code == 1
    assert "sub/loop" in done.out
    assert world.remote() == CONTENT


def test_no_token_is_told_before_anything(world: World) -> None:
    world.client.token = None
    assert "no token to write there with; set HF_TOKEN" in world.refused()
    assert world.hub.requests == []


def test_wrong_token_is_one_sentence_without_it(world: World) -> None:
    world.client.token = "hf_wrong"
    sentence = world.refused()
    assert "the Hub answered 401; the token may not write there" in sentence
    assert "hf_wrong" not in sentence
    assert world.hub.repos == {}


def test_token_by_flag(world: World) -> None:
    world.client.token = "hf_wrong"
    done = world.publish("--hf-token", world.hub.token)
    assert done.code == 0
    assert world.hub.token not in done.out + done.err
    assert world.remote() == CONTENT


def test_gitignore_of_the_repository_hides_nothing(world: World) -> None:
    world.pushed()
    world.repo.put({".gitignore": b"config.json extra.safetensors"})
    (world.folder / "config.json").write_text("{}")
    (world.folder / "extra.safetensors").write_bytes(b"weights")
    assert world.publish().code == 0
    assert world.repo.read("config.json") == b"{}"
    assert world.repo.read("extra.safetensors") == b"weights"


def test_attributes_that_the_hub_adds_are_no_difference(world: World) -> None:
    (world.folder / "tokenizer.json").write_bytes(b'"' + b"t" * (11 * 2**20) + b'"')
    world.pushed()
    assert b"tokenizer.json lfs" in world.repo.read(".gitattributes")
    assert "0 to upload" in world.publish("--mode", "check").out
    (world.folder / ".gitattributes").write_text("of an older download")
    assert "0 to upload" in world.publish("--mode", "check").out


# the Hub misbehaves


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
    assert "someone else made it just now; run again" in world.refused()
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


# a saved difference


def saved(world: World, *arguments: str) -> Path:
    path = world.tmp / "saved.json"
    path.unlink(missing_ok=True)
    done = world.publish("--dry-run", "--save", path, *arguments)
    assert done.code == 0, done.err
    return path


def test_saved_difference_is_applied(world: World) -> None:
    path = saved(world)
    assert world.publish("--apply", path).code == 0
    assert world.remote() == CONTENT
    (world.folder / "notes.md").unlink()
    (world.folder / "config.json").write_text("{}")
    path = saved(world, "--mode", "diff", "--delete")
    assert world.publish("--apply", path).code == 0
    expected = {**CONTENT, "config.json": b"{}"}
    del expected["notes.md"]
    assert world.remote() == expected


def test_saved_difference_holds_no_secret(world: World) -> None:
    text = saved(world).read_text()
    assert world.hub.token not in text
    assert str(world.tmp) not in text
    assert json.loads(text)["repo"] == REPO


def test_remote_that_moved_stops_a_saved_difference(world: World) -> None:
    world.pushed()
    (world.folder / "config.json").write_text("{}")
    path = saved(world, "--mode", "diff")
    head = world.repo.put({"theirs.txt": b"theirs"})
    assert "the diff was made at" in world.refused("--apply", path)
    assert world.repo.head == head


def test_file_that_changed_stops_a_saved_difference(world: World) -> None:
    world.pushed()
    (world.folder / "config.json").write_text("{}")
    path = saved(world, "--mode", "diff")
    (world.folder / "config.json").write_text("[]")
    assert "config.json: changed since the diff was made" in world.refused("--apply", path)
    (world.folder / "config.json").unlink()
    (world.folder / "model.gguf").write_text("")
    assert world.refused("--apply", path)
    assert world.remote() == CONTENT


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"diff": 1}', '{"diff": 2, "operations": []}'])
def test_malformed_saved_difference(world: World, text: str) -> None:
    path = world.tmp / "saved.json"
    path.write_text(text)
    assert "saved.json" in world.refused("--apply", path)
    assert world.hub.requests == []


def test_saved_difference_is_for_its_repository(world: World) -> None:
    path = saved(world)
    done = world.client.run("publish", world.folder, "owner/other", "--apply", path)
    assert done.code == 2
    assert f"is for {REPO}" in done.err
    assert "leave yours" in world.refused("--apply", path, "--mode", "diff")


def test_json_output(world: World) -> None:
    done = world.publish("--json")
    value = done.json()
    assert value["commit"] == world.repo.head
    assert value["counters"] == {"to upload": 5, "to delete": 0, "unchanged": 0}
    assert value["operations"][0]["path"] == "config.json"


# other clients


def hf(world: World, *arguments: object) -> None:
    """Run the Hub's own command."""
    program = Path(sys.executable).parent / "hf"
    done = subprocess.run(
        [program, *map(str, arguments)],
        env=environment(world.hub, world.tmp) | {"HF_TOKEN": world.hub.token},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_hf_downloads_what_was_pushed_and_pushes_what_is_pulled(world: World) -> None:
    world.pushed()
    copy = world.tmp / "copy"
    hf(world, "download", REPO, "--local-dir", copy)
    assert {n: c for n, c in files_in(copy).items() if n in CONTENT} == CONTENT
    (copy / "notes.md").write_text("by hf")
    hf(world, "upload", REPO, copy, ".")
    assert world.repo.read("notes.md") == b"by hf"
    done = world.publish("--mode", "check", folder=copy)
    assert "0 to upload / 0 to delete / 6 unchanged" in done.out
    assert world.publish("--mode", "pull").code == 0
    assert files_in(world.folder) == {**CONTENT, "notes.md": b"by hf"}


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
    hang = Fault(path, method=method, hook=lambda: released.wait(30), times=100)
    world.hub.faults.append(hang)
    with Client(world.hub, tmp_path / "home") as client:
        try:
            started = time.monotonic()
            done = client.run("publish", world.folder, REPO, entry="impatient:main")
            assert time.monotonic() - started < 20
        finally:
            released.set()
    assert done.code == 2, done.out + done.err
    assert "Timeout" in done.err
    assert "Traceback" not in done.err


def test_publish_runs_without_torch(world: World, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom qwen35.cli.main import main\n"
        f"code = main(['publish', {str(world.folder)!r}, {REPO!r}])\n"
        "assert code == 0\nassert 'torch' not in sys.modules, 'torch'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(world.hub, tmp_path) | {"HF_TOKEN": world.hub.token},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert world.remote() == CONTENT
    assert world.hub.token not in done.stdout + done.stderr
