"""Files of JSON and TOML with a wrong value anywhere: every verb that reads them says a sentence.

`make fuzz` runs the same with other and more examples: ``QWEN35_EXAMPLES`` is how many for each
door.
"""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, settings

from fake_hub import FakeHub, serving
from gguf_models import make_variant
from hub_client import environment
from limits import Ended, Limited, limited
from made_reports import report_of
from qwen35.calibration.states import CalibrationFolder, work_folder
from qwen35.cli.main import VERBS
from qwen35.codecs.nf4.arrays import parse_state
from qwen35.errors import Qwen35Error
from qwen35.reporting.evaluation_page import ranking_page
from qwen35.reporting.ranking import rank
from qwen35.reporting.report_reading import read_reports
from qwen35.tuning.measurements import MeasurementKey, Measurements, Probe, load_measurements
from qwen35.tuning.prices import ExpertPrices, Prices
from running import statistics
from structures import as_journal, as_json, as_toml, broken, changed

EXAMPLES = int(os.environ.get("QWEN35_EXAMPLES", "0"))
SETTINGS = settings(
    derandomize=not EXAMPLES, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)

_RUN = """
model = "source"
out = "made"
depth = "structure"
[[artifact]]
recipe = "fp8"
name = "eight"
drop_mtp = true
keep = ["self_attn"]
calib_mode = "mse"
mse_grid_size = 10
activation_stats = "statistics.json"
[[gguf]]
types = ["Q8_0"]
mmproj = true
[evaluate]
text = "text.txt"
chunks = 2
[publish]
owner = "me"
private = true
"""
_RECIPE = """
format = "nf4"
base = "text-nf4"
description = "a recipe"
[[rules]]
match = "self_attn"
layers = "3"
action = "plain"
reason = "attention stays"
[[rules]]
match = "mlp"
action = "nf4"
reason = "the rest"
"""
_TUNE = (
    "tune source --format gguf --size 6bpw --text text.txt --output o.toml --chunks 1 "
    "--overwrite --quiet"
)
_PATH_A = "run --path A source ran --depth structure --threads 1 --quiet"
_REPORT = {
    "base": {"name": "source", "stored": "bfloat16", "engine": "transformers"},
    "text": {"name": "text.txt"},
    "tokens": {"chunks": 2, "context": 512},
    "candidates": [{"name": "nf4", "plan": "x"}, {"name": "other", "plan": "y"}],
    "table": {"columns": ["", "nf4"], "rows": [["Mean KLD", 0.1], ["PPL", "1.5 ± 0.1"]]},
}


@dataclass(frozen=True)
class Door:
    """A file, and what reads it.

    Args:
        file: its path in the world.
        commands: every one reads it.
        examples: how many, in a minute for all doors together.
        read: parses it.
        write: the other way round.
    """

    file: str
    commands: tuple[str, ...]
    examples: int
    read: Callable[[bytes], Any] = json.loads
    write: Callable[[Any], bytes] = as_json


def _toml(raw: bytes) -> Any:
    return tomllib.loads(raw.decode())


def _journal(raw: bytes) -> list[Any]:
    return [json.loads(line.partition(b" ")[2]) for line in raw.splitlines()]


_DRY_GGUF = "gguf source new --types Q8_0 --mmproj --dry-run"
_DRY_TEXT = "convert source new --recipe text-fp8 --dry-run"
_PUBLISH = "publish {} me/x --dry-run"
_REPRODUCE = "reproduce {} --source source --threads 1"
_SLICE = "convert source sliced --recipe text-nf4 --slice {}/2"
DOORS = {
    "config": Door(
        "source/config.json",
        ("inspect source", "plan source --recipe nf4", _DRY_GGUF),
        20,
    ),
    "config, verified": Door("source/config.json", ("verify source",), 6),
    "config, published": Door("nf4/config.json", ("verify nf4", _PUBLISH.format("nf4")), 3),
    "generation": Door("source/generation_config.json", (_DRY_GGUF, _DRY_TEXT, "verify source"), 5),
    "generation, published": Door("set/generation_config.json", (_PUBLISH.format("set"),), 2),
    "preprocessor": Door("source/preprocessor_config.json", (_DRY_GGUF, "verify source"), 6),
    "tokenizer settings": Door("source/tokenizer_config.json", (_DRY_GGUF, _DRY_TEXT), 6),
    "tokenizer settings, verified": Door("source/tokenizer_config.json", ("verify source",), 4),
    "tokenizer": Door("source/tokenizer.json", (_DRY_GGUF, _DRY_TEXT), 6),
    "index": Door("source/model.safetensors.index.json", ("inspect source", "verify source"), 6),
    "manifest": Door(
        "nf4/qwen35.json",
        ("verify nf4", "amend nf4 --dry-run", "convert source nf4 --overwrite --recipe bf16"),
        8,
    ),
    "manifest, published": Door("nf4/qwen35.json", (_PUBLISH.format("nf4"),), 8),
    "manifest, rebuilt": Door("nf4/qwen35.json", (_REPRODUCE.format("nf4"),), 6),
    "manifest of files": Door("gguf/qwen35.json", ("verify gguf", "amend gguf --dry-run"), 6),
    "manifest of files, published": Door("gguf/qwen35.json", (_PUBLISH.format("gguf"),), 6),
    "manifest of files, rebuilt": Door("gguf/qwen35.json", (_REPRODUCE.format("gguf"),), 4),
    "manifest, measured": Door(
        "gguf/qwen35.json",
        ("evaluate gguf/source-F16.gguf gguf --text text.txt --dry-run",),
        4,
    ),
    "order": Door(".sliced.partial/order", ("finalize sliced", _SLICE.format(2)), 10),
    "journal": Door(
        ".sliced.partial/slice-1-of-2",
        ("finalize sliced", _SLICE.format(1)),
        3,
        _journal,
        as_journal,
    ),
    "statistics": Door(
        "statistics.json",
        ("convert source new --recipe fp8 --activation-stats statistics.json --dry-run",),
        8,
    ),
    "measurements of another": Door("before.json", (f"{_TUNE} --start-from before.json",), 2),
    "report": Door("shown/report.json", (_PUBLISH.format("shown"),), 4),
    "run": Door("run.toml", ("run run.toml --dry-run",), 8, _toml, as_toml),
    "state of a run": Door("ran/qwen35-run.json", (_PATH_A,), 2),
    "recipe": Door("recipe.toml", ("plan source --recipe recipe.toml",), 20, _toml, as_toml),
    "difference": Door("diff.json", ("publish nf4 me/x --apply diff.json --dry-run",), 5),
}


class World:
    """A folder with a file of every kind, and a process that runs commands in copies of it."""

    def __init__(self, folder: Path, runs: Limited) -> None:
        self.place = folder / "place"  # what is recorded of files says where they are
        self.sound = folder / "sound"
        self._runs = runs
        self.place.mkdir()
        _make(self.place, runs)
        shutil.copytree(self.place, self.sound, copy_function=_linked)

    def ends(self, door: Door, content: bytes) -> Iterator[tuple[str, Ended]]:
        """Run the commands of a door in fresh copies with this content of its file."""
        for command in door.commands:
            shutil.rmtree(self.place)
            others = shutil.ignore_patterns(*({".sliced.partial"} - {Path(door.file).parts[0]}))
            shutil.copytree(self.sound, self.place, copy_function=_linked, ignore=others)
            path = self.place / door.file
            path.unlink()
            path.write_bytes(content)
            yield command, self._runs.run(command.split(), self.place)


def _linked(source: str, target: str) -> None:
    """Link what no command writes into; copy the rest."""
    if source.endswith((".safetensors", ".gguf")) and ".sliced" not in source:
        os.link(source, target)
    else:
        shutil.copy2(source, target)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    modules = [f"qwen35.cli.{verb}_command" for verb in VERBS] + ["huggingface_hub", "jinja2"]
    with serving(FakeHub({})) as hub:
        online: dict[str, Any] = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": hub.token}
        with limited(*modules, **environment(hub, folder) | online) as runs:
            yield World(folder, runs)


def _make(folder: Path, runs: Limited) -> None:
    source = make_variant(folder, "dense").rename(folder / "source")
    (folder / "text.txt").write_text("the thing in the end " * 400)
    statistics(source, folder, name="statistics.json")
    (folder / "recipe.toml").write_text(_RECIPE)
    (folder / "run.toml").write_text(_RUN)
    for command in (
        "convert source nf4 --recipe text-nf4 --quiet",
        "gguf source gguf --types F16,Q8_0 --quiet",
        "convert source sliced --recipe text-nf4 --slice 1/2 --quiet",
        "convert source sliced --recipe text-nf4 --slice 2/2 --quiet",
        f"{_TUNE} --measurements measured.json",
        "publish nf4 me/x --dry-run --save diff.json",
        _PATH_A,
    ):
        ended = runs.run(command.split(), folder)
        assert ended.code == 0, (command, ended)
    before = json.loads((folder / "measured.json").read_text())
    probes = [{"name": "", "digest": "0", "kld": 0.01}]
    (folder / "before.json").write_text(json.dumps({**before, "probes": probes}))
    shutil.copytree(folder / "nf4", folder / "shown", copy_function=_linked)
    (folder / "shown" / "report.json").write_text(json.dumps(_REPORT))
    shutil.copytree(folder / "gguf", folder / "set", copy_function=_linked)
    shutil.copy(source / "generation_config.json", folder / "set")


def judged(ended: Ended) -> str:
    """Return what is wrong with how a command ended."""
    lines = ended.said.splitlines()
    if ended.code not in (0, 1, 2):
        return f"code {ended.code}"
    if ended.code == 2 and not any(line.startswith("error: ") for line in lines):
        return "no sentence"
    if any(len(line) > 1500 or not line.isprintable() for line in lines):
        return "no clean line"
    return "Traceback" if "Traceback" in ended.said else ""


_Reader = Callable[[Path], object]


READERS: dict[str, tuple[Any, _Reader]] = {
    "measurements": (
        asdict(
            Measurements(
                MeasurementKey("gguf", "model", "text", 512, 8),
                "name",
                Prices(
                    {"a": {"q4_K": 0.5, "f16": 0.0}},
                    {"a": {"q4_K": 0.25, "f16": 0.0}},
                    {"a": ExpertPrices([7, 9], {"q4_K": [0.25, 0.25], "f16": [0.0, 0.0]})},
                ),
                "base",
                [Probe("g", "digest", 0.25)],
            )
        )
        | {"version": 3},
        load_measurements,
    ),
    "report": (
        report_of(),
        lambda path: ranking_page(rank(read_reports([str(path)]))),
    ),
    "calibration": (
        {"plan": "digest", "done": ["embeddings", "layer-0"]},
        lambda path: CalibrationFolder(path.parent, "digest", restart=False).close(),
    ),
    "state of an NF4 weight": (
        {
            "blocksize": 64,
            "dtype": "bfloat16",
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": 0.5,
            "quant_type": "nf4",
            "shape": [2, 64],
        },
        lambda path: parse_state(path.read_bytes(), "weight"),
    ),
}
"""Files that only long runs read: a document, and what reads ``state.json``."""


@pytest.mark.parametrize("name", READERS)
def test_a_reader_takes_it_or_raises_one_of_our_errors(name: str, tmp_path: Path) -> None:
    document, read = READERS[name]
    folder = work_folder(tmp_path / "out")
    folder.mkdir(mode=0o700)
    path = folder / "state.json"
    path.write_bytes(as_json(document))
    read(path)

    @settings(SETTINGS, max_examples=20 * EXAMPLES or 100)
    @given(broken(document))
    def fuzzed(value: Any) -> None:
        path.write_bytes(as_json(value))
        with suppress(Qwen35Error):
            read(path)

    fuzzed()


@pytest.mark.parametrize("name", DOORS)
def test_a_wrong_value_anywhere_is_a_sentence(name: str, world: World) -> None:
    door = DOORS[name]
    document = door.read((world.sound / door.file).read_bytes())
    for command, ended in world.ends(door, door.write(document)):
        # a file that is written anew is not the one whose hash the manifest has
        assert (ended.code in (0, 1), judged(ended)) == (True, ""), (command, ended)

    @settings(SETTINGS, max_examples=EXAMPLES or door.examples)
    @given(broken(document))
    def fuzzed(value: Any) -> None:
        content = door.write(value)
        for command, ended in world.ends(door, content):
            if wrong := judged(ended):
                note(f"{wrong}: qwen35 {command}\n{ended.said}\n{content[:3000]!r}")
                pytest.fail(f"{wrong}: {ended.said[-300:]}")

    fuzzed()


FOUND: tuple[tuple[str, tuple[str | int, ...], str, Any], ...] = (
    ("config", ("vision_config", "deepstack_visual_indexes"), "replace", 7),
    ("config", ("vision_config", "image_size"), "replace", "abc"),
    ("order", ("repo",), "delete", None),
    ("order", ("revision",), "delete", None),
    ("manifest, published", ("tool",), "delete", None),
    ("manifest, published", ("files", "config.json", "size"), "replace", -1),
    ("difference", ("only",), "replace", [[]]),
    ("difference", ("operations", 0, "size"), "replace", "1"),
    ("measurements of another", ("probes", 0, "kld"), "replace", "nan"),
)
"""What had a traceback, or was taken."""


def test_what_was_found_is_refused(world: World) -> None:
    for name, place, kind, new in FOUND:
        door = DOORS[name]
        document = door.read((world.sound / door.file).read_bytes())
        content = door.write(changed(document, place, (kind, "", new)))
        *_, (command, ended) = world.ends(door, content)
        assert (ended.code, judged(ended)) == (2, ""), (command, place, ended)
