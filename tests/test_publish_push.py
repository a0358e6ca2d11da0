"""`qwen35 publish` to a Hub: the real client against a server on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hub_client import CONTENT, REPO, World, environment, files_in
from patience import PATIENCE

API = f"/api/models/{REPO}"
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
        timeout=PATIENCE,
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
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert world.remote() == CONTENT
    assert world.hub.token not in done.stdout + done.stderr
