"""`--calibration`: Hessians from a text for one output alone, made first and removed at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calibrating import source
from hub_client import files_in
from qwen35.api.calibrate_api import calibrate
from qwen35.api.convert_api import convert
from qwen35.calibration import calibration_run
from qwen35.cli.main import main
from qwen35.errors import UsageError
from qwen35.planning.containers import container_from_manifest
from qwen35.planning.manifest import recipe_of
from qwen35.progress import Silent
from qwen35.publishing.card_steps import input_files, make_command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("source"), mtp=0)


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six windows."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("the rain in a Model, seven times; " * 126)
    return path


def converted(folder: Path, out: Path, **options: Any) -> dict[str, bytes]:
    """Convert to NF4 with refined codes; return the files, but for the manifest's name of them."""
    convert(folder, out, codes="refined", threads=1, **options)
    return {name: data for name, data in files_in(out).items() if name != "qwen35.json"}


class Interrupt(Silent):
    """Progress that stops when the first weight is written."""

    def begin(self, title: str, total: int) -> None:
        self.writing = not title.startswith("calibrating")

    def advance(self, nbytes: int, item: str) -> None:
        if self.writing:
            raise KeyboardInterrupt


def check_card(out: Path) -> None:
    """Check what a card says of how an artifact was made."""
    manifest = json.loads((out / "qwen35.json").read_text())
    recipe = recipe_of(manifest, container_from_manifest(manifest))
    command = make_command(recipe, manifest, "owner/Model")
    assert command.startswith("qwen35 convert owner/Model OUT --recipe nf4 --codes refined")
    assert "--hessian .out.hessians" in command.replace("\\\n   ", "")
    (file,) = input_files(manifest)
    assert (file.option, file.value) == ("--hessian", "DIR")
    assert file.sha256 == manifest["recipe"]["hessians"]["sha256"]
    assert any(note.startswith("refined codes: ") for note in manifest["notes"])


def test_the_files_are_those_of_calibrate_hessian(
    folder: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted run does not calibrate again; nothing is left of the Hessians."""
    made = tmp_path / "made"
    calibrate(folder, text=prose, output=made, hessian=True, threads=1)
    expected = converted(folder, tmp_path / "expected", hessian=made)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        converted(folder, out, calibration=prose, progress=Interrupt())
    assert (tmp_path / ".out.hessians" / "hessians" / "head.safetensors").exists()
    monkeypatch.setattr(calibration_run, "calibrate", None)
    assert converted(folder, out, calibration=[prose]) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "made", "out"]
    check_card(out)
    plain = tmp_path / "plain"
    convert(folder, plain, threads=1)
    assert files_in(plain)["model.safetensors"] != expected["model.safetensors"]


@pytest.mark.parametrize("verb", ["convert", "gguf"])
def test_the_dry_run_says_what_it_takes(
    verb: str, folder: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [verb, str(folder), str(tmp_path / "out"), "--codes", "refined", "--dry-run"]
    assert main([*command, "--calibration", str(prose)]) == 0
    told = capsys.readouterr().err
    assert "note: calibrates first, on 6 windows of 512 tokens: " in told
    assert "disk space until the output is complete" in told
    assert list(tmp_path.iterdir()) == []


def test_what_excludes_it(folder: Path, prose: Path, tmp_path: Path) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(UsageError, match=match):
            convert(folder, tmp_path / "out", **{"calibration": prose, **options})

    short = tmp_path / "short.txt"
    short.write_text("the rain in a Model, seven times; " * 60)
    refused("--calibration: has no effect on plain codes; add --codes refined")
    refused("--calibration: is not for slices and clusters", codes="refined", slice=(1, 2))
    refused("--hessian: is not needed with --calibration", codes="refined", hessian=tmp_path)
    refused(
        "--calibration: 3 windows of 512 tokens, expected 5 at least: every fifth is held out",
        codes="refined",
        calibration=short,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
