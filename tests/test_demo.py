"""`make demo`, from a copy: all paths on the embedded checkpoint, in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import qwen35
from patience import PATIENCE

ROOT = Path(__file__).parent.parent


def test_the_demonstration(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    for name in ("demo.py", "run.toml"):
        shutil.copy(ROOT / "demo" / name, tmp_path / "demo")
    (tmp_path / "assets").symlink_to(ROOT / "assets")
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
    assert "49 of 49 questions answered correctly" in done.stdout
    report = done.stdout.partition("measured against bf16")[2]
    assert report.count(" %\n") == 7
    assert (tmp_path / "demo" / "out" / "report" / "report.html").is_file()
