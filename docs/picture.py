"""Take the README's pictures of the report of the demonstration: `make docs-picture`.

Light and dark, as PNG files with a palette: small, and sharp on dense screens.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "demo" / "out" / "report" / "report.html"
PICTURES = {"report-light.png": 1, "report-dark.png": 0}
"""File names, with the number of the colour scheme in Chromium."""
WIDTH, HEIGHT = 1000, 655


def take(browser: str, scheme: int, target: Path) -> None:
    """Write a picture of the top of the report."""
    with tempfile.TemporaryDirectory() as home:
        taken = Path(home) / "taken.png"
        flags = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--force-device-scale-factor=1.5",
            f"--user-data-dir={home}/profile",
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--window-size={WIDTH},{HEIGHT}",
            f"--screenshot={taken}",
        )
        subprocess.run([browser, *flags, REPORT.as_uri()], check=True, capture_output=True)
        Image.open(taken).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE).save(
            target, optimize=True
        )


def main() -> int:
    """Take both pictures."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), "")
    if not browser or not REPORT.is_file():
        print("needs chromium, and the report of `make demo`", file=sys.stderr)
        return 1
    for name, scheme in PICTURES.items():
        take(browser, scheme, ROOT / "docs" / "pictures" / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
