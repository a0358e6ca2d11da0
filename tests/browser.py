"""A real browser, where there is one: pages on a phone and a desktop, light and dark."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from patience import PATIENCE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), "")
in_a_browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
PHONE, DESKTOP = (390, 800), (1280, 900)
DARK, LIGHT = 0, 1


def chromium(*options: str, theme: int, window: tuple[int, int], home: Path, url: Path) -> str:
    """Run the browser once; return what it prints."""
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={home}",
        f"--blink-settings=preferredColorScheme={theme}",
        f"--window-size={window[0]},{window[1]}",
    )
    command = [CHROMIUM, *flags, *options, url.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    return done.stdout
