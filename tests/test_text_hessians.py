"""`--calibration`: Hessians from a text for one output alone, used up layer by layer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from calibrating import source
from checkpoints import layout_of, random_tensors, tiny_config, write_checkpoint
from gguf_models import sidecars
from hub_client import files_in
from qwen35.api.calibrate_api import calibrate
from qwen35.api.convert_api import convert
from qwen35.api.gguf_api import gguf
from qwen35.api.reproduce_api import reproduce
from qwen35.calibration import hessian_inputs, hessian_plan
from qwen35.calibration.calibration_plan import CalibrationRequest, make_plan
from qwen35.calibration.text_windows import read_text
from qwen35.checkpoint.header import read_header
from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.errors import InputError, UsageError
from qwen35.planning.containers import container_from_manifest
from qwen35.planning.hessians import open_hessians
from qwen35.planning.manifest import recipe_of
from qwen35.progress import Silent
from qwen35.publishing.card_steps import input_files, make_command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("source"), mtp=0)


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five windows."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("the rain in a Model, seven times; " * 105)
    return path


def converted(folder: Path, out: Path, **options: Any) -> dict[str, bytes]:
    """Convert to NF4 with refined codes; return the files, but for the manifest's name of them."""
    convert(folder, out, codes="refined", threads=1, **options)
    return {name: data for name, data in files_in(out).items() if name != "qwen35.json"}


class Interrupt(Silent):
    """Progress that stops when a layer or a weight is done."""

    def __init__(self, item: str) -> None:
        self._item = item

    def advance(self, nbytes: int, item: str) -> None:
        if item.endswith(self._item):
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


@dataclass(frozen=True)
class Made:
    """What `--calibration` must make.

    Args:
        hessians: from a calibration of the same text, all at once.
        out: the output with these.
        files: of it.
    """

    hessians: Path
    out: Path
    files: dict[str, bytes]


@pytest.fixture(scope="module")
def expected(folder: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("expected")
    calibrate(folder, text=prose, output=root / "made", hessian=True, threads=1)
    files = converted(folder, root / "out", hessian=root / "made")
    return Made(root / "made", root / "out", files)


def manifest_of(out: Path) -> dict[str, Any]:
    """Return a manifest without the name of the Hessians, which is that of a folder."""
    manifest: dict[str, Any] = json.loads((out / "qwen35.json").read_text())
    manifest["recipe"]["hessians"].pop("name")
    manifest["notes"] = [note.partition(", by the Hessians")[0] for note in manifest["notes"]]
    return manifest


def test_the_files_are_those_of_calibrate_hessian(
    folder: Path, prose: Path, expected: Made, tmp_path: Path
) -> None:
    """Interrupted and resumed; with the manifest, whose hash `reproduce` compares."""
    out = tmp_path / "out"
    for item in ("layers.0", "layers.1.mlp.up_proj.weight", "layers.3.mlp.down_proj.weight"):
        with pytest.raises(KeyboardInterrupt):
            converted(folder, out, calibration=prose, progress=Interrupt(item))
        assert (tmp_path / ".out.hessians").is_dir()
    assert converted(folder, out, calibration=[prose]) == expected.files
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert manifest_of(out) == manifest_of(expected.out)
    assert not reproduce(out, source=folder, hessian=expected.hessians, threads=1).findings
    found, hint = f"the Hessians of {prose.name}, 2,560 tokens", "calibrate --hessian` on this text"
    with pytest.raises(UsageError, match=f"made with {found}; give them: .*{hint}"):
        reproduce(out, source=folder)
    check_card(out)
    plain = tmp_path / "plain"
    convert(folder, plain, threads=1)
    assert files_in(plain)["model.safetensors"] != expected.files["model.safetensors"]


VERBS: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "experts": (convert, {"recipe": "nf4"}),
    "a stack of experts": (gguf, {"types": "Q4_K_M"}),
    "mtp": (gguf, {"types": "Q4_0,Q8_0"}),
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(name, marks=() if name == "a stack of experts" else pytest.mark.heavy)
        for name in sorted(VERBS)
    ],
)
def test_other_models(
    kind: str, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts with Hessians of their own, with those of all, and without; a tied head."""
    monkeypatch.setattr(hessian_inputs, "OWN_TOKENS", 4.5)
    monkeypatch.setattr(hessian_plan, "OWN_TOKENS", 4.5)
    moe = kind != "mtp"
    model = source(tmp_path / "source", per_expert=kind == "experts", moe=moe, tied=not moe)
    made, (verb, asked) = tmp_path / "made", VERBS[kind]
    calibrate(model, text=prose, output=made, hessian=True, threads=1)
    if moe:
        hessians = open_hessians(made)
        found = {one.name for key, one in hessians.by_weight.items() if key[2] is not None}
        assert {name.rpartition(".")[2].isdecimal() for name in found} == {True, False}
    expected, out = tmp_path / "expected", tmp_path / "out"
    verb(model, expected, codes="refined", hessian=made, threads=1, **asked)
    verb(model, out, codes="refined", calibration=prose, threads=1, **asked)
    left, right = files_in(out), files_in(expected)
    left.pop("qwen35.json")
    right.pop("qwen35.json")
    assert left == right
    assert manifest_of(out) == manifest_of(expected)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from qwen35.api.convert_api import convert
from qwen35.calibration import hessian_files, streamed_hessians
from qwen35.forward.stream_folder import StreamFolder
from qwen35.sinks.journal import Journal
from qwen35.sinks.tensor_writer import TensorWriter

folder, prose, out, *kills = sys.argv[1:]

def killed_at(number):
    # kills this process when it is about to change the disk for the nth time, or just has
    left = [int(number)]

    def note():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def noted(holder, name):
        real = getattr(holder, name)
        def call(*arguments, **options):
            note()
            result = real(*arguments, **options)
            note()
            return result
        setattr(holder, name, call)

    noted(StreamFolder, "write")
    noted(StreamFolder, "finish")
    noted(StreamFolder, "remove")
    noted(streamed_hessians, "without_values")
    noted(hessian_files._HessianFile, "put")
    noted(hessian_files._HessianFile, "finish")
    noted(Journal, "record")
    noted(TensorWriter, "done")

for kill in [*kills, "0"]:
    child = os.fork()
    if child == 0:
        killed_at(kill)
        convert(folder, out, codes="refined", calibration=prose, threads=1)
        os._exit(0)
    _, status = os.wait4(child, 0)[:2]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


def test_killed_at_any_moment(folder: Path, prose: Path, expected: Made, tmp_path: Path) -> None:
    """Each run goes on from where the one before was killed."""
    kills = [2, 15, 30, 41, 59, 64, 77, 88, 100]
    arguments = [folder, prose, tmp_path / "out", *kills]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    ended = done.stdout.split()
    assert ended[-1] == "0", done.stderr[-2000:]
    assert ended[:-1].count("-9") >= 6, ended
    found = files_in(tmp_path / "out")
    found.pop("qwen35.json")
    assert found == expected.files
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class DiskUse(Silent):
    """Progress that notes what a folder takes on disk, and how many files have values in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.most = self.files = 0

    def advance(self, nbytes: int, item: str) -> None:
        there = [(path, path.stat().st_blocks * 512) for path in self._folder.rglob("*")]
        self.most = max(self.most, sum(taken for _, taken in there))
        values = [path for path, taken in there if path.parent.name == "hessians" and taken > 2**16]
        self.files = max(self.files, len(values))


def test_the_disk_holds_the_hessians_of_one_layer(
    folder: Path, prose: Path, tmp_path: Path
) -> None:
    disk = DiskUse(tmp_path / ".out.hessians")
    checkpoint = open_folder(folder)
    plan = make_plan(checkpoint, read_text(checkpoint, [prose]), CalibrationRequest(hessian=True))
    converted(folder, tmp_path / "out", calibration=prose, progress=disk)
    assert disk.files == 1
    assert 2 * plan.hidden_bytes < disk.most <= plan.streamed_disk_bytes
    assert plan.streamed_disk_bytes < plan.disk_bytes


def test_what_was_lost_is_made_again(
    folder: Path, prose: Path, expected: Made, tmp_path: Path
) -> None:
    """Weights whose Hessians are gone, and files of them that were removed."""
    out, hidden = tmp_path / "out", tmp_path / ".out.hessians" / "hessians"

    def interrupted() -> None:
        progress = Interrupt("layers.2")
        with pytest.raises(KeyboardInterrupt):
            converted(folder, out, calibration=prose, progress=progress)

    interrupted()
    (work,) = (path for path in tmp_path.iterdir() if (path / "files").is_dir())
    header = read_header(LocalFolder(work / "files"), "model.safetensors")
    (begin,) = (
        begin
        for name, (_, begin, _) in header.tensors.items()
        if name.endswith("layers.0.mlp.down_proj.weight")
    )
    with (work / "files" / "model.safetensors").open("r+b") as file:
        file.seek(begin)
        file.write(bytes(64))
    first = hidden / "layer-0000.safetensors"
    before = first.stat().st_mtime_ns
    interrupted()
    assert first.stat().st_mtime_ns > before
    (hidden / "layer-0001.safetensors").unlink()
    assert converted(folder, out, calibration=prose) == expected.files


def test_nothing_stays_of_a_run_that_cannot_succeed(prose: Path, tmp_path: Path) -> None:
    config = tiny_config(text_only=True, mtp=0)
    tensors = random_tensors(config, layout_of(config), seed=1)
    (name,) = (name for name in tensors if name.endswith("layers.2.mlp.down_proj.weight"))
    tensors[name][3, 3] = float("nan")
    damaged = write_checkpoint(tmp_path / "in", config, tensors, sidecars=sidecars())
    with pytest.raises(InputError, match="NaN"):
        converted(damaged, tmp_path / "out", calibration=prose)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


PEAK = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from qwen35.api.convert_api import convert
from qwen35.api.text_hessians import text_hessians
from qwen35.checkpoint.header import read_header
from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.source import open_folder
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

small, large, prose, out = sys.argv[1:]
options = {"codes": "refined", "calibration": prose, "threads": 1}
convert(small, Path(out) / "small", **options)
before, checkpoint, recipe = peak(), open_folder(Path(large)), load_recipe("nf4", "safetensors")
text = text_hessians(
    prose, checkpoint, recipe, Path(out), "refined", None, instead=False, alone=False
)
plan = make_plan(checkpoint, recipe, refinement=text.expected)
convert(large, Path(out) / "large", **options)
print(peak() - before, text.peak_bytes(plan, 1), text.plan.hessian_bytes)
"""


@pytest.mark.heavy
def test_memory_is_what_the_dry_run_states(folder: Path, prose: Path, tmp_path: Path) -> None:
    """Four layers with 35 MB of Hessians each."""
    config = tiny_config(text_only=True, mtp=0) | {"intermediate_size": 2048}
    tensors = random_tensors(config, layout_of(config), seed=1)
    large = write_checkpoint(tmp_path / "in", config, tensors, sidecars=sidecars())
    done = subprocess.run(
        [sys.executable, "-c", PEAK, folder, large, prose, tmp_path],
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    taken, stated, hessians = map(int, done.stdout.split()[-3:])
    assert hessians < taken < stated * 1.15, (taken, stated, hessians)


@pytest.mark.parametrize("verb", ["convert", "gguf"])
def test_the_dry_run_says_what_it_takes(
    verb: str, folder: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [verb, str(folder), str(tmp_path / "out"), "--codes", "refined", "--dry-run"]
    assert main([*command, "--calibration", str(prose)]) == 0
    plan, told = capsys.readouterr()
    assert "note: passes 5 chunks of 512 tokens, and encodes each layer when they have" in told
    assert "of disk space beside the output" in told
    assert f"quantized weights, by the Hessians of {prose.name}, 2,560 tokens\n" in plan
    assert list(tmp_path.iterdir()) == []


def test_what_excludes_it(folder: Path, prose: Path, tmp_path: Path) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(UsageError, match=match):
            convert(folder, tmp_path / "out", **{"calibration": prose, **options})

    short = tmp_path / "short.txt"
    short.write_text("the rain in a Model, seven times; " * 60)
    refused("--calibration: has no effect on plain codes; add --codes refined")
    alone = "--calibration: is not for workers, slices and clusters; run"
    refused(alone, codes="refined", slice=(1, 2))
    refused(alone, codes="refined", workers=1)
    refused("--hessian: is not needed with --calibration", codes="refined", hessian=tmp_path)
    refused(
        "--calibration: 3 chunks of 512 tokens, expected 5 at least: every fifth is held out",
        codes="refined",
        calibration=short,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
