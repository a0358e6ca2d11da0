"""What stops `qwen35 publish` before it pushes."""

from __future__ import annotations

import os

import pytest

from hub_client import CONTENT, World


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
    assert "no access token; set HF_TOKEN" in world.refused()
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
