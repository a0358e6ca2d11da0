"""`qwen35 ui` in a process of its own, for a browser; run as a program, it makes docs/ui.png."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import qwen35
from browser import DESKTOP
from browser_tab import Tab
from patience import PATIENCE

__all__ = ["ui_server"]


@contextmanager
def ui_server(folder: Path, **settings: str) -> Iterator[str]:
    """Run the server in a folder; its address."""
    environment = os.environ | {"PYTHONPATH": str(Path(qwen35.__file__).parents[1])} | settings
    with subprocess.Popen(
        [sys.executable, "-m", "qwen35", "ui", "--no-browser", "--quiet"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()
            server.wait(PATIENCE)


def picture(file: Path) -> None:
    """Write a screenshot of a plan."""
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as models:
        folder = Path(models) / "models"
        folder.mkdir()
        with ui_server(folder) as address, Tab(Path(home), (DESKTOP[0], 700)) as tab:
            tab.call("Page.navigate", url=address)
            tab.wait("document.querySelector('nav a[aria-current]')")
            tab.write("#convert-out", "Qwen3.5-9B-bnb-4bit")
            tab.write("#convert-model", "Qwen3.5-9B")
            tab.wait("document.querySelector('.plan:not(.old) .figures')")
            tab.run("document.activeElement.blur()")
            tab.run("document.querySelector('header .soft code').textContent = '~/models'")
            tab.picture(file)


if __name__ == "__main__":
    picture(Path(sys.argv[1]))
