"""Running a calibration: dry run, memory, interruption, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibrating import source
from checkpoints import layout_of, tiny_config, write_checkpoint
from fake_hub import FakeHub, serving
from gguf_models import sidecars
from hub_client import files_in
from hub_command import command as command_in
from hub_store import COMMIT, Repo
from qwen35.array_types import U8
from qwen35.calibration.calibration_plan import CalibrationPlan, CalibrationRequest, make_plan
from qwen35.calibration.calibration_run import calibrate
from qwen35.calibration.calibration_stream import calibration_stream
from qwen35.calibration.states import CalibrationFolder, work_folder
from qwen35.calibration.text_windows import read_text
from qwen35.checkpoint.source import Reader, open_folder
from qwen35.cli.main import main
from qwen35.errors import InputError
from qwen35.forward.blocks import Block
from qwen35.forward.builder import Builder
from qwen35.model.model_config import parse_config
from qwen35.model.roles import expected_tensors
from qwen35.progress import Silent
from running import load_all


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("the rain in a Model, seven times; " * 20)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("source"), moe=True, tied=False)


def plan_for(folder: Path, text: Path, context: int = 32, **asked: Any) -> CalibrationPlan:
    checkpoint = open_folder(folder)
    return make_plan(
        checkpoint, read_text(checkpoint, [text], context=context), CalibrationRequest(**asked)
    )


def command(folder: Path, text: Path, out: Path, *more: str) -> int:
    arguments = ["calibrate", str(folder), "--text", str(text), "--output", str(out)]
    return main([*arguments, "--context", "32", "--device", "cpu", "--threads", "1", *more])


# --- one run


def test_dry_run_states_memory_and_touches_nothing(
    folder: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command(folder, prose, out, "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    layer = max(
        sum(t.numel() for name, t in load_all(folder).items() if f".layers.{i}." in f".{name}")
        for i in range(4)
        if i != 0  # also the MTP layer's number
    )
    assert told["layer_bytes"] >= 2 * layer
    assert told["peak_bytes"] == told["layer_bytes"] + told["batch_bytes"]
    assert told["hidden_bytes"] == told["tokens"] * 256 * 2
    assert told["files"] == ["activation-stats.json", "imatrix.gguf", "coverage.json"]
    assert command(folder, prose, out, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "plus Python and its libraries" in shown
    assert list(tmp_path.iterdir()) == []


def test_command_writes_what_the_dry_run_lists(
    folder: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command(folder, prose, out, "--dat", "--floor", "100") == 0
    shown = capsys.readouterr().out
    assert "layers.0: 4 experts saw" in shown
    assert f"{out}: 5 files" in shown
    listed = {"activation-stats.json", "imatrix.gguf", "imatrix.dat", "coverage.json"}
    assert files_in(out).keys() == listed | {"qwen35.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    plan = plan_for(folder, prose, floor=100, legacy=True)
    assert sum(map(len, files_in(out).values())) <= plan.output_bytes
    assert command(folder, prose, out) == 2
    assert "exists already" in capsys.readouterr().err
    assert command(folder, prose, out, "--overwrite") == 0


def test_reading_ahead_changes_nothing(folder: Path, prose: Path, tmp_path: Path) -> None:
    """What a GPU has: the next block is read while one computes."""
    plan = plan_for(folder, prose)
    sums = []
    for ahead in (False, True):
        work = CalibrationFolder(tmp_path / f"work-{ahead}", plan.digest, restart=False)
        with work, Reader(plan.checkpoint) as reader:
            calibration_stream(plan, work, reader, "cpu", Silent(), ahead=ahead).run()
        names = [block.name for block in plan.blocks]
        sums.append([work.sums(name) for name in names])
    for one, other in zip(*sums, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert (one[name].squares == other[name].squares).all()


def test_a_checkpoint_on_the_hub(folder: Path, prose: Path, tmp_path: Path) -> None:
    """A dry run downloads no weights; the files tell repository and commit."""
    asked = ("--text", str(prose), "--context", "32", "--device", "cpu", "--json")
    with serving(FakeHub({"owner/Tiny": Repo.of(folder)})) as hub:
        where: Any = {"home": tmp_path, "url": hub.url}
        dry = command_in("calibrate", "owner/Tiny", "--output", "out", *asked, "--dry-run", **where)
        assert dry.code == 0, dry.err
        (weights,) = (path.name for path in folder.glob("*.safetensors"))
        assert hub.sent(weights) < 100_000
        done = command_in("calibrate", "owner/Tiny", "--output", "out", *asked, **where)
    assert done.code == 0, done.err
    assert json.loads(done.out)["coverage"]["floor"] == 128
    first = (tmp_path / "out" / "activation-stats.json").read_text().splitlines()[1]
    made = json.loads("{" + first.removesuffix(",") + "}")["__metadata__"]
    assert made["source"] == {"repo": "owner/Tiny", "revision": COMMIT}


def test_where_nothing_can_be_written(
    folder: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert command(folder, prose, tmp_path / "file" / "below" / "out") == 2
    assert "cannot be written" in capsys.readouterr().err


# --- interruption


class Interrupt(Silent):
    """Progress that stops the run when it has heard of a block."""

    def __init__(self, block: str) -> None:
        self.block = block
        self.heard: list[str] = []

    def advance(self, nbytes: int, item: str) -> None:
        self.heard.append(item)
        if item == self.block:
            raise KeyboardInterrupt


@pytest.mark.parametrize("block", ["layers.0", "layers.2", "head", "mtp"])
def test_interrupted_run_goes_on_at_its_layer(
    block: str, folder: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(folder, prose)
    whole = calibrate(plan, tmp_path / "whole", threads=1)
    assert whole.resumed == 0
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        calibrate(plan, out, threads=1, progress=Interrupt(block))
    assert not out.exists()
    built: list[str] = []
    real = Builder.build

    def noted(self: Builder, one: Block) -> Any:
        built.append(one.name)
        return real(self, one)

    monkeypatch.setattr(Builder, "build", noted)
    again = calibrate(plan, out, threads=1)
    names = [one.name for one in plan.blocks]
    assert built == names[names.index(block) + 1 :]
    assert again.resumed == names.index(block) + 1
    assert files_in(out) == files_in(whole.result.out)
    assert not work_folder(out).exists()


def test_killed_in_a_layer_it_begins_that_layer_again(
    folder: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(folder, prose)
    whole = calibrate(plan, tmp_path / "whole", threads=1)
    real, stored = CalibrationFolder.write, []

    def failing(self: CalibrationFolder, name: str, first: int, states: U8) -> None:
        stored.append(name)
        if len(stored) == 4 * -(-len(plan.text.windows) // plan.batch):
            raise KeyboardInterrupt
        real(self, name, first, states)

    monkeypatch.setattr(CalibrationFolder, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        calibrate(plan, tmp_path / "out", threads=1)
    monkeypatch.setattr(CalibrationFolder, "write", real)
    again = calibrate(plan, tmp_path / "out", threads=1)
    assert again.resumed == 2
    assert files_in(again.result.out) == files_in(whole.result.out)


def test_another_command_does_not_take_over_the_work(
    folder: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        calibrate(plan_for(folder, prose), out, threads=1, progress=Interrupt("layers.1"))
    kept = files_in(work_folder(out))
    assert command(folder, prose, out, "--floor", "7") == 2
    error = capsys.readouterr().err
    assert "holds an interrupted run of another plan (3 blocks done)" in error
    assert "--overwrite" in error
    assert files_in(work_folder(out)) == kept
    assert command(folder, prose, out, "--floor", "7", "--overwrite") == 0
    assert not work_folder(out).exists()


@pytest.mark.parametrize("damage", ["short", "another", "shape", "lacking", "states"])
def test_damaged_states_are_refused_in_a_sentence(
    damage: str, folder: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        calibrate(plan_for(folder, prose), out, threads=1, progress=Interrupt("layers.2"))
    path = work_folder(out) / "layers.1.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    if damage == "short":
        path.write_bytes(path.read_bytes()[:-300])
    elif damage == "another":
        path.write_bytes(b"{}")
    elif damage == "shape":
        np.savez(path, **{name: array[..., :1].astype("f2") for name, array in arrays.items()})
    elif damage == "lacking":
        kept = {name: array for name, array in arrays.items() if "down_proj" not in name}
        np.savez(path, **kept)
    else:
        for states in work_folder(out).glob("hidden-*.bin"):
            os.truncate(states, 100)
    assert command(folder, prose, out) == 2
    said = capsys.readouterr().err
    expected = {"lacking": "no sums of mlp.experts.down_proj", "states": "was changed by another"}
    assert expected.get(damage, "not sums of a calibration; remove its folder to start") in said
    assert not out.exists()


def test_a_folder_of_someone_else_is_left_alone(
    folder: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    work_folder(out).mkdir()
    (work_folder(out) / "state.json").write_text("mine")
    assert command(folder, prose, out, "--overwrite") == 2
    assert "was not made by qwen35" in capsys.readouterr().err
    assert (work_folder(out) / "state.json").read_text() == "mine"


# --- memory

LIMITED = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from qwen35.calibration.calibration_plan import CalibrationRequest, make_plan
from qwen35.calibration.calibration_run import calibrate
from qwen35.calibration.text_windows import read_text
from qwen35.checkpoint.source import open_folder

def plan_for(folder):
    checkpoint = open_folder(Path(folder))
    text = read_text(checkpoint, [Path(sys.argv[4])], context=32)
    return make_plan(checkpoint, text, CalibrationRequest())

small, large, out = sys.argv[1:4]
calibrate(plan_for(small), Path(out) / "warm", threads=1)
plan = plan_for(large)
lines = Path("/proc/self/status").read_text().splitlines()
held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
layer = max(block.nbytes for block in plan.blocks)
limit = held + layer * 3 // 2
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if sys.argv[5] == "stream":
    calibrate(plan, Path(out) / "large", threads=1)
else:
    import transformers
    transformers.AutoModelForCausalLM.from_pretrained(large, dtype=torch.bfloat16)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of 51 MB and an embedding of as much, all zeros."""
    config = tiny_config(text_only=True, mtp=0)
    config |= {"intermediate_size": 32768, "vocab_size": 100_000}
    tensors = {
        spec.name: torch.zeros(spec.shape, dtype=torch.bfloat16)
        for spec in expected_tensors(parse_config(config), layout_of(config))
    }
    folder = tmp_path_factory.mktemp("large") / "in"
    return write_checkpoint(folder, config, tensors, sidecars=sidecars())


@pytest.mark.parametrize(("way", "fits"), [("stream", True), ("load", False)])
def test_a_layer_and_a_half_is_memory_enough(
    way: str, fits: bool, folder: Path, large: Path, prose: Path, tmp_path: Path
) -> None:
    """The hidden states lie in files; loading the model, of four layers, fails at this limit."""
    short = tmp_path / "short.txt"  # what is computed takes time, what is held is the same
    short.write_text(prose.read_text()[:300])
    code = subprocess.run(
        [sys.executable, "-c", LIMITED, folder, large, tmp_path, short, way],
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (code.returncode == 0) == fits, code.stderr[-2000:]
    if not fits:
        assert "memory" in code.stderr.casefold()


def test_memory_makes_batches_smaller_and_refuses(
    folder: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    free = plan_for(folder, prose, 4)
    tight = plan_for(folder, prose, 4, memory=free.peak_bytes - 1)
    assert tight.batch < free.batch
    assert tight.peak_bytes < free.peak_bytes
    assert command(folder, prose, tmp_path / "out", "--memory", "1MB") == 2
    assert "too little" in capsys.readouterr().err


@pytest.mark.parametrize("per_expert", [False, True])
def test_experts_of_a_layer_that_does_not_fit_are_read_one_by_one(
    per_expert: bool, prose: Path, tmp_path: Path
) -> None:
    """In MTP too, and with the same statistics."""
    folder = source(tmp_path, moe=True, tied=False, per_expert=per_expert)
    free = plan_for(folder, prose, 4, dtype="float32")
    tight = plan_for(folder, prose, 4, dtype="float32", memory=free.layer_bytes - 1)
    assert free.sizes.wide == 0 < tight.sizes.wide
    assert tight.peak_bytes < free.layer_bytes
    tables = []
    for i, plan in enumerate((free, tight)):
        out = calibrate(plan, tmp_path / f"out-{i}", threads=1).result.out
        tables.append(json.loads((out / "activation-stats.json").read_text()))
        del tables[-1]["__metadata__"]
    whole, one_by_one = tables
    assert whole.keys() == one_by_one.keys()
    for name, entry in whole.items():
        for key, value in entry.items():
            assert np.allclose(one_by_one[name][key], value, rtol=1e-4, atol=1e-6), (name, key)


# --- refusals


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        (b"the rain", (), "tokens, expected a chunk of 32"),
        (b"\xff\xfe", (), "not UTF-8 text"),
        (None, (), "cannot be read"),
        (b"the rain " * 99, ("--context", "1"), "2 tokens at least"),
        (b"the rain " * 99, ("--device", "tpu"), "--device"),
        (b"the rain " * 99, ("--device", "cuda:9"), "--device"),
    ],
)
def test_wrong_input_is_refused_in_a_sentence(
    text: bytes | None,
    more: tuple[str, ...],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "text.txt"
    if text is not None:
        path.write_bytes(text)
    assert command(folder, path, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} <= {"text.txt"}


def test_packed_and_incomplete_sources_are_refused(
    folder: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantized = tmp_path / "nf4"
    assert main(["convert", str(folder), str(quantized), "--recipe", "nf4", "--quiet"]) == 0
    capsys.readouterr()
    assert command(quantized, prose, tmp_path / "out") == 2
    assert "expected the original checkpoint" in capsys.readouterr().err
    config = tiny_config()
    bare = write_checkpoint(tmp_path / "bare", config, load_all(source(tmp_path / "x")))
    assert command(bare, prose, tmp_path / "out") == 2
    assert "no tokenizer.json in it" in capsys.readouterr().err
    assert command(Path("Qwen3.5-0.8B"), prose, tmp_path / "out") == 2
    assert "without weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_named(prose: Path, tmp_path: Path) -> None:
    folder = source(tmp_path)
    tensors = load_all(folder)
    tensors["model.language_model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    config = json.loads((folder / "config.json").read_text())
    bad = write_checkpoint(tmp_path / "bad", config, tensors, sidecars=sidecars())
    with pytest.raises(
        InputError, match=r"layers\.1\.mlp\.down_proj: its input holds NaN"
    ) as caught:
        calibrate(plan_for(bad, prose), tmp_path / "out", threads=1)
    assert "--dtype" not in str(caught.value)  # convert has none, and no dtype holds more
    assert not (tmp_path / "out").exists()


def test_planning_needs_no_torch(folder: Path, prose: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from qwen35.cli.main import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers'} & sys.modules.keys(); sys.exit(code)"
    )
    arguments = ["calibrate", folder, "--text", prose, "--output", tmp_path / "out", "--dry-run"]
    run = [sys.executable, "-c", script, *map(str, arguments), "--context", "32"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_missing_library_is_told_in_a_sentence(
    folder: Path,
    prose: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert command(folder, prose, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "transformers is not installed" in error
    assert "pip install '.[nf4]'" in error


def test_drafts_need_a_layer_and_survive_an_interruption(
    folder: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    windows = read_text(open_folder(folder), [prose], context=32)
    request = CalibrationRequest(draft=True)
    plan = make_plan(open_folder(folder), windows, request)
    whole = calibrate(plan, tmp_path / "whole", threads=1)
    assert whole.draft is not None
    with pytest.raises(KeyboardInterrupt):
        calibrate(plan, tmp_path / "out", threads=1, progress=Interrupt("mtp"))
    assert calibrate(plan, tmp_path / "out", threads=1).draft == whole.draft
    without = source(tmp_path / "none", moe=True, tied=False, mtp=0)
    asked = ["calibrate", str(without), "--text", str(prose), "--context", "32", "--draft"]
    assert main([*asked, "--output", str(tmp_path / "o")]) == 2
    assert "has no MTP layer; take that of the original: --mtp-from" in capsys.readouterr().err
    grafted = [*asked, "--mtp-from", str(folder), "--output", str(tmp_path / "o")]
    assert main([*grafted, "--quiet"]) == 0, capsys.readouterr().err
    assert "drafted tokens are the model's own choice" in capsys.readouterr().out
