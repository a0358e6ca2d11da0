"""`make demo`, from a copy: all paths on the embedded checkpoint, in a process of its own.

`brief`, every artifact is made, measured and documented, but one of GGUF; a part of the questions
is asked, and none of depth behaviour: tests/test_behaviour.py asks each of these formats.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qwen35
from checkpoints import ASSET
from patience import PATIENCE

ROOT = Path(__file__).parent.parent


BRIEF = {'"Q8_0", "Q4_K_M"': '"Q8_0"', 'out = "out"': 'out = "out"\ndepth = "numbers"'}


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
    source = str(Path(qwen35.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "demo/demo.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.endswith("demo passed\n")
    count = 9 if brief else 49
    assert f"{count} of {count} questions answered correctly" in done.stdout
    report = done.stdout.partition("measured against bf16")[2]
    assert report.count(" %\n") == (6 if brief else 7)
    assert (tmp_path / "demo" / "out" / "report" / "report.html").is_file()
