"""Artifacts of every kind verified on the Hub: their structure by ranges, without their data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints import ASSET
from fake_hub import FakeHub, serving
from hub_command import command
from hub_store import Repo
from qwen35.cli.main import main
from running import run

RECIPES = ("text", "nf4", "text-nf4", "fp8", "fp8-conservative", "bf16")
SMALL = 500_000
"""Bytes that headers, index, config, manifest and a tokenizer of this size may take."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An artifact of each kind, by name."""
    folder = tmp_path_factory.mktemp("made")
    found = {recipe: run(ASSET, folder / recipe, recipe=recipe).out for recipe in RECIPES}
    asked = ["--types", "Q8_0,Q4_K_M", "--mmproj", "--quiet"]
    assert main(["gguf", str(ASSET), str(folder / "gguf"), *asked]) == 0
    return found | {"gguf": folder / "gguf"}


@pytest.fixture
def hub(made: dict[str, Path]) -> Iterator[FakeHub]:
    repos = {f"owner/{name}": Repo.of(folder) for name, folder in made.items()}
    with serving(FakeHub(repos)) as hub:
        yield hub


@pytest.mark.parametrize("kind", [*RECIPES, "gguf"])
def test_structure_by_ranges(kind: str, hub: FakeHub, made: dict[str, Path], home: Path) -> None:
    """Nothing found, little read, nothing stored, and the same as of the folder."""
    done = command("verify", f"owner/{kind}", "--json", home=home, url=hub.url)
    assert done.code == 0, done.out + done.err
    files = 3 if kind == "gguf" else 1
    assert hub.sent() < files * SMALL < sum(p.stat().st_size for p in made[kind].iterdir())
    assert list(home.iterdir()) == []
    local = command("verify", str(made[kind]), "--json", home=home, url=hub.url)
    here, there = json.loads(local.out), json.loads(done.out)
    assert {**there, "artifact": ""} == {**here, "artifact": ""}
    assert there["counts"]["files"] == files


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def test_one_file_of_a_repository(hub: FakeHub, made: dict[str, Path], home: Path) -> None:
    [name] = [path.name for path in made["gguf"].glob("*Q4_K_M.gguf")]
    done = command("verify", f"hf:owner/gguf/{name}", "--json", home=home, url=hub.url)
    assert done.code == 0, done.err
    assert json.loads(done.out)["counts"]["files"] == 1
    shown = command("inspect", f"hf:owner/gguf/{name}", home=home, url=hub.url)
    assert "file type     Q4_K_M" in shown.out
    assert hub.sent() < 2 * SMALL
    gone = command("verify", "hf:owner/gguf/none.gguf", home=home, url=hub.url)
    assert gone.code == 1
    assert "none.gguf" in gone.out
    malformed = command("verify", "hf:owner", home=home, url=hub.url)
    assert (malformed.code, "expected hf:owner/name/path" in malformed.err) == (2, True)


def test_faults_show_from_afar(
    hub: FakeHub, made: dict[str, Path], home: Path, tmp_path: Path
) -> None:
    """A file that is missing, and one that was cut off."""
    broken = tmp_path / "broken"
    broken.mkdir()
    paths = sorted(made["gguf"].iterdir())
    for path in paths:
        if "Q8_0" not in path.name:
            (broken / path.name).write_bytes(path.read_bytes())
    [cut] = broken.glob("*Q4_K_M.gguf")
    cut.write_bytes(cut.read_bytes()[:-1000])
    hub.repos["owner/broken"] = Repo.of(broken)
    done = command("verify", "owner/broken", "--json", home=home, url=hub.url)
    assert done.code == 1, done.err
    found = {
        (row["check"], row["subject"].split("-")[-1]) for row in json.loads(done.out)["findings"]
    }
    assert {("readable", "Q4_K_M.gguf"), ("files", "Q8_0.gguf")} <= found


def test_numbers_download_the_files(hub: FakeHub, made: dict[str, Path], home: Path) -> None:
    """With a source every number is compared; the files come once, into the Hub's cache."""
    arguments = ("verify", "owner/gguf", "--source", str(ASSET), "--json", "--quiet")
    done = command(*arguments, home=home, url=hub.url)
    assert done.code == 0, done.out + done.err
    assert json.loads(done.out)["relative_error"]
    data = sum(path.stat().st_size for path in made["gguf"].glob("*.gguf"))
    assert data <= hub.sent(".gguf") < data + 3 * SMALL
    again = hub.sent(".gguf")
    assert command(*arguments, home=home, url=hub.url).code == 0
    assert hub.sent(".gguf") == again
