"""Planning makes no file, reads no weight and imports nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import qwen35
from checkpoints import random_tensors, tiny_config, write_checkpoint
from qwen35.checkpoint.source import open_folder
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.safetensors_files.safetensors_display import plan_json

pytestmark = pytest.mark.sentences


def test_plan_makes_no_file_and_reads_no_weight(tmp_path: Path) -> None:
    config = tiny_config()
    source = write_checkpoint(tmp_path / "source", config, random_tensors(config))
    before = {path: path.stat() for path in tmp_path.rglob("*")}
    plan = make_plan(open_folder(source), load_recipe("nf4"))
    plan_json(plan, 1)
    after = {path: path.stat() for path in tmp_path.rglob("*")}
    assert {p: (s.st_mtime_ns, s.st_size) for p, s in before.items()} == {
        p: (s.st_mtime_ns, s.st_size) for p, s in after.items()
    }


_HEAVY = (
    "torch numpy numba transformers bitsandbytes safetensors rich huggingface_hub httpx2 jinja2"
)


_SCRIPT = """
import sys
from qwen35.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print(code, [name for name in HEAVY.split() if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "Qwen3.5-0.8B"],
        ["plan", "Qwen3.5-35B-A3B", "--recipe", "text-nf4", "--json"],
        ["plan", "--roles"],
        ["--help"],
        ["plan", "--help"],
        ["convert", "--help"],
        ["--version"],
        [],
    ],
    ids=" ".join,
)
def test_heavy_modules_stay_out(arguments: list[str], tmp_path: Path) -> None:
    script = f"HEAVY = {_HEAVY!r}\n{_SCRIPT}"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(qwen35.__file__).parent.parent)},
        check=False,
    )
    assert done.stderr == "0 []\n"
    assert done.stdout
    assert list(tmp_path.iterdir()) == []
