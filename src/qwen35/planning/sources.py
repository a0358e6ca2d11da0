"""Open what outputs are made from: checkpoints, and GGUF models, which are read as checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qwen35.checkpoint.hub import HubLocation, parse_address
from qwen35.checkpoint.open import GgufFiles, describe, fetch, gguf_files
from qwen35.checkpoint.source import Checkpoint, open_folder

__all__ = ["describe_source", "fetch_source", "open_source"]


def describe_source(model: str, *, token: str | None = None) -> Checkpoint:
    """Open a source for its headers only; errors as for `qwen35.checkpoint.open.describe`."""
    return _of_gguf(model, token, weights=False) or describe(model, token=token)


def fetch_source(model: str, *, token: str | None = None, extra: Sequence[str] = ()) -> Checkpoint:
    """Open a source with its weights; arguments and errors as for `qwen35.checkpoint.open.fetch`.

    Of a GGUF repository that is downloaded, a file is named: ``hf:owner/name/path``.
    """
    return _of_gguf(model, token, weights=True) or fetch(model, token=token, extra=extra)


def open_source(location: Path, *, repo: str = "", revision: str = "") -> Checkpoint:
    """Open a source where it is on this machine (`Checkpoint.location`).

    Raises:
        InputError: not a readable Qwen3.5 model.
    """
    files = gguf_files(str(location)) if location.is_file() else None
    if files is None:
        return open_folder(location, repo=repo, revision=revision)
    return _opened(files, str(location), (repo, revision))


def _of_gguf(model: str, token: str | None, *, weights: bool) -> Checkpoint | None:
    """Return a GGUF model as a checkpoint; None if `model` is none."""
    files = gguf_files(model, token=token)
    if files is None:
        return None
    origin = _origin(files, model)
    opened = _opened(files, model, origin)
    if not weights or files.root is not None:
        return opened
    return _opened(replace(files, names=opened.within).fetch(token), model, origin)


def _origin(files: GgufFiles, model: str) -> tuple[str, str]:
    """Return the repository and the commit that files are of; nothing for local ones."""
    if isinstance(files.place, HubLocation):
        return files.place.repo, files.place.revision
    if model.startswith("hf:") and files.root is not None:  # in the Hub's cache
        return parse_address(model.removeprefix("hf:"))[0].repo, files.root.name
    return "", ""


def _opened(files: GgufFiles, model: str, origin: tuple[str, str]) -> Checkpoint:
    from qwen35.planning.gguf_files.gguf_source import open_gguf  # late: needs the gguf library

    return open_gguf(files, model, repo=origin[0], revision=origin[1])
