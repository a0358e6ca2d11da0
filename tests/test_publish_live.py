"""The real Hub, for whoever has a token: QWEN35_LIVE_TOKEN (write) and QWEN35_LIVE_OWNER.

Makes a private repository, publishes to it and back through Xet, and deletes it. Nothing else can
test the server's own rules: refused parents, checked sums, what it does to .gitattributes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import qwen35
from hub_client import CONTENT, files_in

OWNER = os.environ.get("QWEN35_LIVE_OWNER")
TOKEN = os.environ.get("QWEN35_LIVE_TOKEN")

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not (OWNER and TOKEN), reason="needs QWEN35_LIVE_OWNER and _TOKEN"),
]


def command(home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run qwen35 against the real Hub."""
    kept = {name: v for name, v in os.environ.items() if not name.startswith(("HF_", "QWEN35_"))}
    source = str(Path(qwen35.__file__).parents[1])
    environment = kept | {"PYTHONPATH": source, "HF_HOME": str(home), "HF_TOKEN": str(TOKEN)}
    program = [sys.executable, "-m", "qwen35.cli.main", *map(str, arguments)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert str(TOKEN) not in done.stdout + done.stderr
    return done


@pytest.fixture
def repo() -> Iterator[str]:
    """The name of a repository that is deleted afterwards."""
    name = f"{OWNER}/qwen35-live-{uuid.uuid4().hex[:12]}"
    yield name
    code = f"from huggingface_hub import HfApi; HfApi().delete_repo({name!r}, missing_ok=True)"
    environment = {n: v for n, v in os.environ.items() if n != "HF_HUB_OFFLINE"}
    subprocess.run(
        [sys.executable, "-c", code], env=environment | {"HF_TOKEN": str(TOKEN)}, check=True
    )


def test_there_and_back(repo: str, tmp_path: Path) -> None:
    folder, home = tmp_path / "artifact", tmp_path / "home"
    (folder / "onnx").mkdir(parents=True)
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    (folder / "tokenizer.json").write_bytes(b'"' + b"t" * (11 * 2**20) + b'"')
    saved = tmp_path / "saved.json"
    first = command(home, "publish", folder, repo, "--private")
    assert first.returncode == 0, first.stderr
    again = command(home, "publish", folder, repo, "--mode", "check", "--save", saved)
    assert "0 to upload / 0 to delete" in again.stdout
    copy = tmp_path / "copy"
    assert command(home, "publish", copy, repo, "--mode", "pull").returncode == 0
    assert files_in(copy) == files_in(folder)
    (copy / "notes.md").unlink()
    (copy / "config.json").write_text('{"model_type": "qwen3_5", "changed": true}')
    assert command(home, "publish", copy, repo, "--mode", "diff", "--delete").returncode == 0
    stale = command(home, "publish", folder, repo, "--apply", saved)
    assert stale.returncode == 2
    assert "the diff was made at" in stale.stderr
    assert command(home, "publish", folder, repo, "--mode", "pull", "--delete").returncode == 0
    assert files_in(folder) == files_in(copy)
