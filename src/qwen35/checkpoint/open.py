"""From what a user typed to a checkpoint: a folder, a Hub id or a published size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen35.checkpoint.hub import HubId, HubLocation, download, download_files, parse_address
from qwen35.checkpoint.locations import FileLocation, LocalFolder
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import (
    Checkpoint,
    is_published,
    open_place,
    open_published,
)
from qwen35.errors import HubError, InputError, UsageError, did_you_mean
from qwen35.model.sizes import PUBLISHED

__all__ = [
    "GgufFiles",
    "describe",
    "fetch",
    "folder_of",
    "gguf_files",
    "hub_token",
    "looks_like_artifact",
]

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
    path = folder_of(model)
    if path is not None:
        return open_place(LocalFolder(path), name=model, root=path, lenient=lenient)
    if is_published(model):
        return open_published(model)
    place = _hub_place(model, token, sizes=True)
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
    path = folder_of(model)
    if path is not None:
        return open_place(LocalFolder(path), name=model, root=path, lenient=lenient)
    if is_published(model):
        raise UsageError(
            model,
            "the name of a published size, without weights",
            hint=f"give a folder or a Hub id such as Qwen/{model}",
        )
    place = _hub_place(model, token)
    origin = {"name": model, "repo": place.repo, "revision": place.revision}
    remote = open_place(place, lenient=lenient, **origin)
    root = download(place, [*sorted(remote.file_sizes), *extra], hub_token(token))
    return open_place(LocalFolder(root), root=root, lenient=lenient, **origin)


def looks_like_artifact(model: str) -> bool:
    """Whether there is something at MODEL that a check could find faults with."""
    path = folder_of(model)
    if path is None:
        return _hub_id(model) is not None
    names = LocalFolder(path).sizes()
    return "config.json" in names or any(name.endswith(".safetensors") for name in names)


@dataclass(frozen=True)
class GgufFiles:
    """GGUF files of one place.

    Args:
        place: the folder or repository.
        names: the files.
        whole: whether these are all that the place has, and not one picked out.
        root: the folder, if they are on this machine.
    """

    place: FileLocation
    names: tuple[str, ...]
    whole: bool
    root: Path | None = None

    def fetch(self, token: str | None = None) -> GgufFiles:
        """Return the same files on this machine; those of the Hub are downloaded to its cache.

        Raises:
            HubError: the download failed.
        """
        if self.root is not None:
            return self
        assert isinstance(self.place, HubLocation)  # places are folders or on the Hub
        wanted = [*self.names, MANIFEST_NAME]
        root = download_files(self.place, wanted, hub_token(token))
        return GgufFiles(LocalFolder(root), self.names, self.whole, root)


def gguf_files(model: str, *, token: str | None = None) -> GgufFiles | None:
    """Find GGUF files: `model` itself, or those of a folder or repository without safetensors.

    On the Hub ``owner/name[@revision]`` is a repository and ``hf:owner/name/path`` one file of it.

    Raises:
        HubError: the Hub refused, or was not reached.
        UsageError: the address of a file is malformed.
    """
    if model.startswith("hf:"):
        hub_id, name = parse_address(model.removeprefix("hf:"))
        return GgufFiles(HubLocation(hub_id, hub_token(token)), (name,), whole=False)
    try:
        path = Path(model).expanduser()
        if path.is_file():
            one = GgufFiles(LocalFolder(path.parent), (path.name,), whole=False, root=path.parent)
            return one if path.suffix == ".gguf" else None
    except (OSError, RuntimeError, ValueError):  # too long, no such user, NUL in it
        return None
    root = folder_of(model)
    place: FileLocation
    if root is not None:
        place = LocalFolder(root)
    elif not is_published(model) and looks_like_artifact(model):
        place = _hub_place(model, token)
    else:
        return None
    names = tuple(sorted(name for name in place.sizes() if name.endswith(".gguf")))
    if not names or any(name.endswith(".safetensors") for name in place.sizes()):
        return None
    return GgufFiles(place, names, whole=True, root=root)


def folder_of(model: str) -> Path | None:
    """Return the folder that `model` names, if it names one."""
    try:
        path = Path(model).expanduser()
        return path if path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such user, NUL in it
        return None


def _hub_id(model: str) -> HubId | None:
    """Return the repository that `model` names; None if it can only be meant for a folder."""
    if model.startswith(_LOCAL_STARTS):
        return None
    hub_id = HubId.parse(model)
    if hub_id is not None and hub_id.revision is None and folder_of(model.partition("/")[0]):
        return None
    return hub_id


def _hub_place(model: str, token: str | None, *, sizes: bool = False) -> HubLocation:
    """Ask the Hub for `model`, which is no folder here.

    Args:
        model: as the user gave it.
        token: of the Hub.
        sizes: whether the name of a published size would do as well.
    """
    hub_id = _hub_id(model)
    if hub_id is None:
        raise _not_there(model, sizes)
    try:
        return HubLocation(hub_id, hub_token(token))
    except HubError as error:
        if hub_id.revision is not None:  # no folder was meant
            raise
        found = f"no such folder here, and {error.found}"
        raise HubError(error.subject, found, expected=error.expected, hint=error.hint) from error


def _not_there(model: str, sizes: bool) -> InputError:
    """Say that there is nothing at `model`, and what was likely meant."""
    expected = "a folder or a Hub id (owner/name)"
    try:
        if Path(model).expanduser().is_file():
            return InputError(model, "a file", expected=expected)
    except (OSError, RuntimeError, ValueError):  # too long, no such user, NUL in it
        pass
    if HubId.parse(model) and not model.startswith(_LOCAL_STARTS):
        parent = model.partition("/")[0]
        hint = f"should the repository on the Hub be meant, name a revision: {model}@main"
        return InputError(model, f"no such folder in {parent}/ here", hint=hint)
    near = did_you_mean(model, PUBLISHED)
    if not sizes or not near:
        also = "a folder, a Hub id (owner/name) or a published size (qwen35 plan --help)"
        return InputError(model, "no such folder", expected=also if sizes else expected)
    return InputError(
        model,
        "no such folder, and no published size",
        expected=f"a folder, a Hub id (owner/name) or one of {', '.join(PUBLISHED)}",
        hint=near,
    )
