"""Runs that publish, and sources on the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from hub_client import World, files_in
from hub_store import Repo
from pipeline_runs import GGUF, NF4, TEXT, manifest

pytestmark = pytest.mark.usefixtures("own_cache")


def test_publishes_in_one_go_and_then_does_nothing(
    world: World, run_original: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["run", "--path", "A", "--path", "B", "--types", "Q8_0", "--depth", "numbers"]
    command += [str(run_original), str(out), "--repo", "owner", "--json"]
    done = world.client.run(*command)
    assert done.code == 0, done.err
    states = {row["step"]: row for row in done.json()["steps"]}
    for name in (NF4, TEXT, GGUF):
        assert states[f"publish {name}"]["state"] == "done"
        repo = world.hub.repos[f"owner/{name}"]
        assert repo.refs["main"] == states[f"publish {name}"]["commit"]
        assert {n: repo.read(n) for n in repo.files if n != ".gitattributes"} == files_in(
            out / name
        )
        assert f"owner/{name}" in repo.read("README.md").decode()
    heads = {name: repo.refs["main"] for name, repo in world.hub.repos.items()}
    world.hub.requests.clear()
    again = world.client.run(*command)
    assert again.code == 0, again.err
    published = [r["state"] for r in again.json()["steps"] if r["step"].startswith("publish")]
    assert published == ["kept"] * 3
    assert {name: repo.refs["main"] for name, repo in world.hub.repos.items()} == heads
    assert {request.method for request in world.hub.requests} == {"GET"}


def test_publish_gate_stops_what_does_not_belong(
    world: World, run_original: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["run", "--path", "A", str(run_original), str(out), "--depth", "numbers", "--json"]
    assert world.client.run(*command).code == 0
    (out / NF4 / "scratch.txt").write_text("not for others")
    done = world.client.run(*command, "--repo", "owner/mine")
    assert done.code == 1
    closed = done.json()["steps"][-1]
    assert (closed["gate"], closed["state"]) == ("publish", "closed")
    assert closed["reasons"] == ["scratch.txt: not part of the artifact"]
    assert "owner/mine" not in world.hub.repos
    (out / NF4 / "scratch.txt").rename(out / NF4 / ".env")
    done = world.client.run(*command, "--repo", "owner/mine")
    assert done.json()["steps"][-1]["reasons"][0].startswith(".env: looks like")
    (out / NF4 / ".env").unlink()
    assert world.client.run(*command, "--repo", "owner/mine").code == 0


def test_publish_gate_deletes_nothing(world: World, run_original: Path, tmp_path: Path) -> None:
    world.hub.repos["owner/mine"] = Repo.create(tmp_path / "theirs")
    world.hub.repos["owner/mine"].put({"theirs.txt": b"keep me"})
    command = ["run", "--path", "A", str(run_original), str(tmp_path / "out"), "--depth", "numbers"]
    done = world.client.run(*command, "--repo", "owner/mine")
    assert done.code == 0, done.err
    assert world.hub.repos["owner/mine"].read("theirs.txt") == b"keep me"


def test_hub_that_fails_closes_the_gate_and_leaves_the_artifact(
    world: World, run_original: Path, tmp_path: Path
) -> None:
    world.client.token = "wrong"
    command = ["run", "--path", "A", str(run_original), str(tmp_path / "out"), "--depth", "numbers"]
    done = world.client.run(*command, "--repo", "owner/mine", "--json")
    assert done.code == 1
    assert done.json()["steps"][-1]["gate"] == "publish"
    assert "wrong" not in done.out + done.err
    assert manifest(tmp_path / "out" / NF4)["verified"]["passed"]


def test_no_token_is_told_before_anything(world: World, run_original: Path, tmp_path: Path) -> None:
    world.client.token = None
    command = ["run", "--path", "A", str(run_original), str(tmp_path / "out"), "--depth", "numbers"]
    done = world.client.run(*command, "--repo", "owner/mine")
    assert done.code == 2
    assert "no access token" in done.err
    assert not (tmp_path / "out").exists()


def test_source_on_the_hub_is_known_by_its_commit(
    world: World, run_original: Path, tmp_path: Path
) -> None:
    world.hub.repos["owner/Tiny-dense-1B"] = Repo.of(run_original)
    out = tmp_path / "out"
    command = ["run", "--path", "A", "owner/Tiny-dense-1B", str(out), "--depth", "numbers"]
    forecast = world.client.run(*command, "--dry-run", "--json")
    assert forecast.code == 0, forecast.err
    assert not out.exists()
    done = world.client.run(*command, "--json")
    assert done.code == 0, done.err
    assert manifest(out / NF4)["source"]["repo"] == "owner/Tiny-dense-1B"
    said = [row["state"] for row in world.client.run(*command, "--json").json()["steps"]]
    assert said == ["kept", "kept", "kept", "skipped"]
