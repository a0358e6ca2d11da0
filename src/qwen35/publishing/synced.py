"""Remember what folder and repository agreed on, so that a pull can tell local changes."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path

from qwen35.checkpoint.locations import cache_folder

__all__ = ["remember_synced", "synced_files"]

_TABLE = (
    "CREATE TABLE IF NOT EXISTS synced (folder TEXT, path TEXT, identity TEXT,"
    " PRIMARY KEY (folder, path))"
)


def synced_files(folder: Path) -> dict[str, str]:
    """Return what each file was at the latest push or pull: path to SHA-256 or git blob.

    Empty without a record: then every file that differs from the repository counts as changed here.
    """
    path = _path()
    if path.exists():
        with suppress(sqlite3.Error), closing(sqlite3.connect(path)) as base:
            query = "SELECT path, identity FROM synced WHERE folder = ?"
            return dict(base.execute(query, (str(folder.resolve()),)))
    return {}


def remember_synced(folder: Path, files: Mapping[str, str | None]) -> None:
    """Record files that folder and repository now share; a failure only makes pulls more careful.

    Args:
        folder: the folder.
        files: path to SHA-256 or git blob.
    """
    name, path = str(folder.resolve()), _path()
    rows = [(name, file, identity) for file, identity in files.items() if identity]
    with suppress(sqlite3.Error, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path)) as base, base:
            base.execute(_TABLE)
            base.executemany("INSERT OR REPLACE INTO synced VALUES (?, ?, ?)", rows)


def _path() -> Path:
    return cache_folder() / "synced.sqlite"
