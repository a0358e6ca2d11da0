"""`make demo`, from a copy: all paths on the embedded checkpoint, in a process of its own.

`brief`, every artifact is made, checked and measured, but one of GGUF, and a part of the questions
is asked. llama.cpp is not there, and nothing but the demonstration's own lines is printed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qwen35
from checkpoints import ASSET
from patience import PATIENCE

ROOT = Path(__file__).parent.parent


BRIEF = {'"Q8_0", "Q4_K_M"': '"Q8_0"'}


@pytest.mark.parametrize("brief", [True, pytest.param(False, marks=pytest.mark.heavy)])
def test_the_demonstration(brief: bool, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    shutil.copy(ROOT / "demo" / "demo.py", tmp_path / "demo")
    text = (ROOT / "demo" / "run.toml").read_text("utf-8")
    for part, other in BRIEF.items() if brief else ():
        assert text.count(part) == 1
        text = text.replace(part, other)
    (tmp_path / "demo" / "run.toml").write_text(text, "utf-8")
    asset = tmp_path / "assets" / ASSET.name
    asset.mkdir(parents=True)
    for path in ASSET.iterdir():
        (asset / path.name).symlink_to(path)
    rows = [
        row for row in json.loads((ASSET / "questions.json").read_text()) if not row["thinking"]
    ]
    rows = rows[::6] if brief else rows
    assert {bool(row["image"]) for row in rows} == {False, True}
    (asset / "questions.json").unlink()
    (asset / "questions.json").write_text(json.dumps(rows))
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "llama_cpp.py").write_text("raise ImportError(name='llama_cpp')")
    source = [str(tmp_path / "without"), str(Path(qwen35.__file__).parent.parent)]
    done = subprocess.run(
        [sys.executable, "demo/demo.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(source)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"\ndemo passed in \d+ s\n$", done.stdout)
    assert len(done.stdout.splitlines()) <= 35  # the story alone, and not the graph of steps
    assert all(re.fullmatch("  .+ \\.\\.\\.", line) for line in done.stderr.splitlines())
    said = ("writing 5", "checking ", "loading ", "asking ", "running ", "evaluating")
    assert [word for word in said if f"  {word}" not in done.stderr] == []
    count = 9 if brief else 49
    assert f"{count} of {count} questions answered correctly" in done.stdout
    report = done.stdout.partition("same top token")[2]
    assert report.count("%\n") == (4 if brief else 5)
    assert (tmp_path / "demo" / "out" / "report" / "report.html").is_file()
    assert done.stdout.count("/report/report.html\n") == 1


def test_the_first_line_waits_for_no_large_library() -> None:
    """Where nothing was read before, they took seconds in which nothing was printed."""
    script = "import demo, sys; print({'numpy', 'torch', 'transformers', 'rich'} & {*sys.modules})"
    source = [str(ROOT / "demo"), str(Path(qwen35.__file__).parent.parent)]
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(source)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "set()\n"
