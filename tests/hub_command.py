"""The command in a process of its own, with a Hub on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import qwen35
from hub_client import Done
from patience import PATIENCE


def command(*arguments: str, home: Path, url: str, token: str = "") -> Done:
    """Run the command with the Hub at `url` in a process of its own."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))
    }
    environment |= {
        "PYTHONPATH": str(Path(qwen35.__file__).parent.parent),
        "HF_ENDPOINT": url,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    if token:
        environment["HF_TOKEN"] = token
    done = subprocess.run(
        [sys.executable, "-m", "qwen35.cli.main", *arguments],
        capture_output=True,
        text=True,
        cwd=home,
        env=environment,
        check=False,
        timeout=PATIENCE,
    )
    return Done(done.returncode, done.stdout, done.stderr)
