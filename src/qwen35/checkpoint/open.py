"""From what a user typed to a checkpoint: a folder, a Hub id or a published size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from qwen35.checkpoint.hub import HubId, HubPlace, download
from qwen35.checkpoint.place import Folder
from qwen35.checkpoint.source import (
    Checkpoint,
    is_published,
    open_place,
    open_published,
)
from qwen35.errors import InputError, UsageError

__all__ = ["describe", "fetch", "gguf_files", "hub_token", "looks_like_artifact"]

_LOCAL_STARTS = ("./", "../", "/", "~", ".")


def hub_token(given: str | None) -> str | None:
    """Return the token given, else HF_TOKEN's, else None (the Hub's client then looks itself)."""
    return given or os.environ.get("HF_TOKEN") or None


def describe(model: str, *, token: str | None = None, lenient: bool = False) -> Checkpoint:
    """Open MODEL for its headers only; on the Hub nothing is downloaded but headers.

    With `lenient`, what is wrong with the index or the packing is put into the result.

    Raises:
        InputError: it is not a readable Qwen3.5 checkpoint.
        HubError: the Hub refused, or was not reached.
    """
    path = _folder(model)
    if path is not None:
        return open_place(Folder(path), name=model, root=path, lenient=lenient)
    if is_published(model):
        return open_published(model)
    hub_id = _hub_id(model)
    place = HubPlace(hub_id, hub_token(token))
    return open_place(place, name=model, repo=place.repo, revision=place.revision, lenient=lenient)


def fetch(
    model: str, *, token: str | None = None, lenient: bool = False, extra: Sequence[str] = ()
) -> Checkpoint:
    """Open MODEL with its weights at hand; a Hub id is downloaded into the Hub's cache first.

    With `lenient`, what is wrong with the index or the packing is put into the result. `extra`
    names files that are downloaded beside those of every checkpoint, if they are there.

    Raises:
        InputError: it is not a readable Qwen3.5 checkpoint.
        HubError: the Hub refused, or was not reached.
        UsageError: it is a published size: a description without weights.
    """
    path = _folder(model)
    if path is not None:
        return open_place(Folder(path), name=model, root=path, lenient=lenient)
    if is_published(model):
        raise UsageError(
            model,
            "the name of a published size, without weights",
            hint=f"give a folder or a Hub id such as Qwen/{model}",
        )
    hub_id = _hub_id(model)
    place = HubPlace(hub_id, hub_token(token))
    origin = {"name": model, "repo": place.repo, "revision": place.revision}
    remote = open_place(place, lenient=lenient, **origin)
    root = download(place, [*sorted(remote.file_sizes), *extra], hub_token(token))
    return open_place(Folder(root), root=root, lenient=lenient, **origin)


def looks_like_artifact(model: str) -> bool:
    """Whether there is something at MODEL that a check could find faults with."""
    path = _folder(model)
    if path is None:
        return HubId.parse(model) is not None and not model.startswith(_LOCAL_STARTS)
    names = Folder(path).sizes()
    return "config.json" in names or any(name.endswith(".safetensors") for name in names)


def gguf_files(model: str) -> tuple[Path, ...]:
    """Return the GGUF files at `model`: itself, or those in a folder without safetensors."""
    try:
        path = Path(model).expanduser()
        if path.is_file():
            return (path,) if path.suffix == ".gguf" else ()
        if not path.is_dir() or any(path.glob("*.safetensors")):
            return ()
        return tuple(sorted(path.glob("*.gguf")))
    except (OSError, RuntimeError, ValueError):  # too long, no such user, NUL in it
        return ()


def _folder(model: str) -> Path | None:
    """Return the folder that `model` names, if it names one."""
    try:
        path = Path(model).expanduser()
        return path if path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such user, NUL in it
        return None


def _hub_id(model: str) -> HubId:
    hub_id = None if model.startswith(_LOCAL_STARTS) else HubId.parse(model)
    if hub_id is None:
        raise InputError(
            model,
            "no such folder",
            expected="a folder, a Hub id (owner/name) or, to plan, a published size",
        )
    return hub_id
