"""The plain text of the training set: the sources of Python's own standard library.

Every machine that can run the training has this text, so nothing is downloaded and nothing is
shipped. A few whole files are held out; they become `eval.txt` and are never trained on.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

EXCLUDED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "encodings",
        "lib2to3",
        "turtledemo",
        "_bundled",
        "__pycache__",
    }
)
EXCLUDED_PREFIX = "_sysconfigdata"
HELD_OUT_BYTES = 250_000
HELD_OUT_FILE_BYTES = (6_000, 40_000)
HELD_OUT_SHARE = 12


@dataclass(frozen=True)
class Corpus:
    """Training documents and the held-out text, both in a fixed order."""

    train: tuple[str, ...]
    held_out: str
    held_out_files: tuple[str, ...]


def stdlib_files(root: Path) -> list[Path]:
    """Python files of the standard library, without tests, tables and third parties, sorted."""
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if EXCLUDED_FOLDERS & set(relative.parts) or relative.name.startswith(EXCLUDED_PREFIX):
            continue
        found.append(relative)
    return sorted(found)


def _drawn(relative: Path) -> bool:
    """A fixed pseudo-random choice by file name, the same on every machine."""
    digest = hashlib.sha256(relative.as_posix().encode()).digest()
    return digest[0] % HELD_OUT_SHARE == 0


def load_corpus() -> Corpus:
    """Read the standard library and split it by file into training and held-out text."""
    root = Path(sysconfig.get_path("stdlib"))
    low, high = HELD_OUT_FILE_BYTES
    train: list[str] = []
    held: list[str] = []
    names: list[str] = []
    room = HELD_OUT_BYTES
    for relative in stdlib_files(root):
        try:
            text = (root / relative).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        size = len(text.encode())
        if _drawn(relative) and low <= size <= min(high, room):
            held.append(text)
            names.append(relative.as_posix())
            room -= size
        elif text.strip():
            train.append(text)
    return Corpus(tuple(train), "\n".join(held), tuple(names))
