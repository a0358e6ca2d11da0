"""Find the files in an output's folder that qwen35 did not write: nothing deletes those."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.errors import InputError, OutputError
from qwen35.planning.manifest import read_manifest
from qwen35.sinks.files import hash_file

__all__ = ["refuse_strangers", "strangers"]

_UNLISTED = {MANIFEST_NAME, "model.sig"}
"""Files of ours that a manifest cannot list: itself, and the signature over it."""

_NOTES = (".cache", "huggingface")
"""The Hub's client keeps notes on its downloads there."""

_SHOWN = 5


def refuse_strangers(out: Path) -> None:
    """Refuse to replace a folder that holds files of others.

    Raises:
        OutputError: it does, which are named; or its manifest does not tell.
    """
    try:
        names = list(strangers(out))
    except InputError as error:
        found = f"cannot be replaced, since nothing tells which files are ours ({error.message})"
        hint = "remove it yourself or choose another folder"
        raise OutputError(str(out), found, hint=hint) from error
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        found = f"holds files that qwen35 did not write: {', '.join(names[:_SHOWN])}{more}"
        hint = "move them away or choose another folder"
        raise OutputError(str(out), found, hint=hint)


def strangers(folder: Path) -> Iterator[str]:
    """Yield the files in an artifact's folder that its manifest does not list, sorted.

    A model card or other document that was edited since it was written counts as well.

    Raises:
        InputError: the manifest is malformed, or a file cannot be read.
    """
    manifest = read_manifest(LocalFolder(folder)) or {}
    added = manifest.get("added", {})
    known = {*_UNLISTED, *manifest.get("files", {}), *added}
    try:
        for path in sorted(folder.rglob("*")):
            relative = path.relative_to(folder)
            name = relative.as_posix()
            if (path.is_dir() and not path.is_symlink()) or relative.parts[:2] == _NOTES:
                continue
            if name not in known or (name in added and _edited(path, added[name])):
                yield name
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
        raise InputError(str(error.filename or folder), found) from error


def _edited(path: Path, entry: Mapping[str, Any]) -> bool:
    return not path.is_file() or hash_file(path) != entry["sha256"]
