"""GGUF from a checkpoint and an importance matrix on the Hub, by the real client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_hub import FakeHub, serving
from gguf_models import make_variant
from hub_command import command
from hub_store import Repo
from imatrices import UP, gguf_file, ones
from qwen35.cli.main import main

REPO = "owner/Tiny-dense-1B"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_variant(tmp_path_factory.mktemp("repo"), "dense")
    gguf_file(folder / "imatrix.gguf_file", {UP: ones(1, 256)})
    return folder


@pytest.fixture
def hub(source: Path) -> Iterator[FakeHub]:
    with serving(FakeHub({REPO: Repo.of(source)})) as hub:
        yield hub


def test_dry_run_and_files_are_those_of_the_folder(
    hub: FakeHub, source: Path, tmp_path: Path
) -> None:
    asked = ("--types", "Q8_0,Q4_K_M", "--imatrix", f"hf:{REPO}/imatrix.gguf_file", "--json")
    dry = command("gguf", REPO, "out", *asked, "--dry-run", home=tmp_path, url=hub.url)
    assert dry.code == 0, dry.err
    assert hub.sent("model.safetensors") < 100_000
    planned = json.loads(dry.out)
    done = command("gguf", REPO, "out", *asked, "--quiet", home=tmp_path, url=hub.url)
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "out" / "qwen35.json").read_text())
    assert manifest["plan"] == planned["digest"]
    assert manifest["source"]["repo"] == REPO
    local = tmp_path / "local"
    imatrix = str(source / "imatrix.gguf_file")
    more = ("--types", "Q8_0", "--imatrix", imatrix, "--quiet")
    assert main(["gguf", str(source), str(local), *more]) == 0
    ours = (tmp_path / "out" / "Tiny-dense-1B-Q8_0.gguf").read_bytes()
    theirs = (local / "Tiny-dense-1B-Q8_0.gguf").read_bytes()
    assert ours[-(10**6) :] == theirs[-(10**6) :]  # the heads name the importance matrix


def test_an_imatrix_that_is_not_there(hub: FakeHub, tmp_path: Path) -> None:
    asked = ("--types", "Q8_0", "--imatrix", f"hf:{REPO}/none.gguf")
    done = command("gguf", REPO, "out", *asked, home=tmp_path, url=hub.url)
    assert done.code == 2
    assert "a file is missing there" in done.err
    assert not (tmp_path / "out").exists()
