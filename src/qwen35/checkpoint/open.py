"""Open the model a user named: a folder, a Hub id or a published size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen35.checkpoint.hub import (
    COMMIT,
    HubId,
    HubLocation,
    cached_snapshot,
    download,
    download_files,
    parse_address,
)
from qwen35.checkpoint.locations import FileLocation, LocalFolder
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import (
    Checkpoint,
    is_published,
    open_place,
    open_published,
)
from qwen35.checkpoint.split_gguf import SplitName, by_model
from qwen35.errors import HubError, InputError, UsageError, did_you_mean
from qwen35.model.sizes import PUBLISHED

__all__ = [
    "GgufFiles",
    "describe",
    "fetch",
    "fetch_commit",
    "folder_of",
    "gguf_files",
    "hub_token",
    "looks_like_artifact",
]

_LOCAL_STARTS = ("./", "../", "/", "~", ".")


def hub_token(token: str | None) -> str | None:
    """Return `token`, else HF_TOKEN, else None: the Hub's client then uses the saved login."""
    return token or os.environ.get("HF_TOKEN") or None


def describe(
    model: str, *, token: str | None = None, lenient: bool = False, only: str = ""
) -> Checkpoint:
    """Open a model for its headers only; from the Hub, only headers are read.

    With `lenient`, problems with the index or the packing go into the result. `only` is as for
    `qwen35.checkpoint.source.open_folder`.

    Raises:
        InputError: not a readable Qwen3.5 checkpoint.
        HubError: the Hub refused a request or could not be reached.
    """
    path = folder_of(model)
    if path is not None:
        return open_place(LocalFolder(path), name=model, root=path, lenient=lenient, only=only)
    if is_published(model):
        return open_published(model)
    cached = _cached(model)
    if cached is not None:
        return _open_cached(model, cached, lenient, only)
    place = _hub_place(model, token, sizes=True)
    origin: dict[str, Any] = {"name": model, "repo": place.repo, "revision": place.revision}
    return open_place(place, lenient=lenient, only=only, **origin)


def fetch(
    model: str,
    *,
    token: str | None = None,
    lenient: bool = False,
    extra: Sequence[str] = (),
    only: str = "",
) -> Checkpoint:
    """Open a model with its weights; a Hub repository is first downloaded into the Hub's cache.

    With `lenient`, problems with the index or the packing go into the result. `extra` names
    optional files to download along with the checkpoint's own; `only` is as for
    `qwen35.checkpoint.source.open_folder`, and other files are not downloaded.

    Raises:
        InputError: not a readable Qwen3.5 checkpoint.
        HubError: the Hub refused a request or could not be reached.
        UsageError: `model` is a published size, which has no weights.
    """
    path = folder_of(model)
    if path is not None:
        return open_place(LocalFolder(path), name=model, root=path, lenient=lenient, only=only)
    if is_published(model):
        raise UsageError(
            model,
            "the name of a published size, without weights",
            hint=f"give a folder or a Hub id such as Qwen/{model}",
        )
    return _fetch_hub(model, token, lenient, extra, only)


def fetch_commit(
    repo: str, commit: str, *, token: str | None = None, extra: Sequence[str] = ()
) -> Checkpoint:
    """Open a commit on the Hub with its weights; a local folder never stands in for it.

    Raises:
        InputError: not the name of a commit on the Hub, or not a readable Qwen3.5 checkpoint.
        HubError: the Hub refused a request or could not be reached.
    """
    model = f"{repo}@{commit}"
    if not COMMIT.fullmatch(commit) or _hub_id(model) is None:
        expected = "a repository (owner/name) and a commit of 40 hexadecimal digits"
        raise InputError(model[:200], "no commit on the Hub", expected=expected)
    return _fetch_hub(model, token, lenient=False, extra=extra)


def _fetch_hub(
    model: str, token: str | None, lenient: bool, extra: Sequence[str], only: str = ""
) -> Checkpoint:
    cached = _cached(model)
    if cached is not None:
        return _open_cached(model, cached, lenient, only)
    place = _hub_place(model, token)
    origin: dict[str, Any] = {"name": model, "repo": place.repo, "revision": place.revision}
    remote = open_place(place, lenient=lenient, only=only, **origin)
    root = download(place, [*sorted(remote.file_sizes), *extra], hub_token(token))
    fetched = open_place(LocalFolder(root), root=root, lenient=lenient, only=only, **origin)
    return replace(fetched, others=remote.others)  # what stayed there was not downloaded


def _open_cached(model: str, root: Path, lenient: bool, only: str) -> Checkpoint:
    """Open a snapshot of the Hub's cache; its folder is called like its commit."""
    origin = {"name": model, "repo": model.partition("@")[0], "revision": root.name}
    return open_place(LocalFolder(root), root=root, lenient=lenient, only=only, **origin)


def looks_like_artifact(model: str) -> bool:
    """Return whether `model` names a checkpoint, however broken: something to verify."""
    path = folder_of(model)
    if path is None:
        return _hub_id(model) is not None
    names = LocalFolder(path).sizes()
    return "config.json" in names or any(name.endswith(".safetensors") for name in names)


@dataclass(frozen=True)
class GgufFiles:
    """GGUF files of one folder or repository.

    Args:
        place: the folder or repository.
        names: the file names.
        whole: True for all GGUF files of the place, False for one selected model.
        root: the folder, if the files are local.
    """

    place: FileLocation
    names: tuple[str, ...]
    whole: bool
    root: Path | None = None

    @property
    def models(self) -> list[tuple[str, ...]]:
        """The file names by model: a split one has several."""
        return by_model(self.names)

    def fetch(self, token: str | None = None) -> GgufFiles:
        """Return the files as local files, downloaded into the Hub's cache if necessary.

        Raises:
            HubError: the download failed.
        """
        if self.root is not None:
            return self
        assert isinstance(self.place, HubLocation)  # the only location without a root
        patterns = [*self.names, MANIFEST_NAME]
        root = download_files(self.place, patterns, hub_token(token))
        return GgufFiles(LocalFolder(root), self.names, self.whole, root)


def gguf_files(model: str, *, token: str | None = None) -> GgufFiles | None:
    """Find GGUF files: `model` itself, or all in a folder or repository without safetensors files.

    A file of a split model stands for all its files. On the Hub, ``owner/name[@revision]`` is a
    repository and ``hf:owner/name/path`` a single file.

    Raises:
        HubError: the Hub refused a request or could not be reached.
        UsageError: the address of a file is malformed.
    """
    if model.startswith("hf:"):
        return _file_on_hub(model.removeprefix("hf:"), token)
    try:
        path = Path(model).expanduser()
        if path.is_file():
            if path.suffix != ".gguf":
                return None
            return _one_model(LocalFolder(path.parent), path.name, path.parent)
    except (OSError, RuntimeError, ValueError):  # name too long, unknown ~user, NUL
        return None
    root = folder_of(model)
    if root is None and not is_published(model):
        root = _cached(model)
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


def _file_on_hub(address: str, token: str | None) -> GgufFiles:
    hub_id, name = parse_address(address)
    root = cached_snapshot(hub_id)
    place = HubLocation(hub_id, hub_token(token)) if root is None else LocalFolder(root)
    return _one_model(place, name, root)


def _one_model(place: FileLocation, name: str, root: Path | None) -> GgufFiles:
    """Return the files of the model that a file belongs to."""
    siblings = {name, *place.sizes()} if SplitName.parse(name) is not None else {name}
    [names] = (model for model in by_model(siblings) if name in model)
    return GgufFiles(place, names, whole=False, root=root)


def folder_of(model: str | Path | None) -> Path | None:
    """Return `model` as a folder, or None if it is not one."""
    if model is None:
        return None
    try:
        path = Path(model).expanduser()
        return path if path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # name too long, unknown ~user, NUL
        return None


def _hub_id(model: str) -> HubId | None:
    """Parse `model` as a repository; None if it must mean a folder."""
    if model.startswith(_LOCAL_STARTS):
        return None
    hub_id = HubId.parse(model)
    # If a local folder is called like the owner, "owner/name" is more likely a mistyped path.
    if hub_id is not None and hub_id.revision is None and folder_of(model.partition("/")[0]):
        return None
    return hub_id


def _cached(model: str) -> Path | None:
    """Return the folder in the Hub's cache that stands for a Hub id without a network, or None."""
    hub_id = _hub_id(model)
    return cached_snapshot(hub_id) if hub_id is not None else None


def _hub_place(model: str, token: str | None, *, sizes: bool = False) -> HubLocation:
    """Open `model`, which is not a local folder, on the Hub.

    Args:
        model: the name the user typed.
        token: the Hub's access token.
        sizes: whether a published size is acceptable too.
    """
    hub_id = _hub_id(model)
    if hub_id is None:
        raise _not_found(model, sizes)
    try:
        return HubLocation(hub_id, hub_token(token))
    except HubError as error:
        if hub_id.revision is not None:  # a revision rules out a folder
            raise
        found = f"no such folder here, and {error.found}"
        raise HubError(error.subject, found, expected=error.expected, hint=error.hint) from error


def _not_found(model: str, sizes: bool) -> InputError:
    """Return the error for a `model` that does not exist, with a guess at the intended one."""
    expected = "a folder or a Hub id (owner/name)"
    path = Path(model)
    try:
        path = path.expanduser()
        if path.exists():
            if not path.is_file():
                return InputError(model, "a pipe, a socket or a device", expected=expected)
            folder = path.parent
            hint = f"its folder is {folder}" if (folder / "config.json").is_file() else ""
            return InputError(model, "a file", expected=expected, hint=hint)
    except (OSError, RuntimeError, ValueError):  # name too long, unknown ~user, NUL
        pass
    if path.suffix in (".gguf", ".safetensors"):
        hint = (
            "of a GGUF file on the Hub, write hf:owner/name/file" if path.suffix == ".gguf" else ""
        )
        return InputError(model, "no such file", hint=hint)
    if HubId.parse(model) and not model.startswith(_LOCAL_STARTS):
        parent = model.partition("/")[0]
        hint = f"for the repository on the Hub, give a revision: {model}@main"
        return InputError(model, f"no such folder in {parent}/ here", hint=hint)
    suggestion = did_you_mean(model, PUBLISHED)
    if not sizes or not suggestion:
        with_sizes = "a folder, a Hub id (owner/name) or a published size (qwen35 plan --help)"
        return InputError(model, "no such folder", expected=with_sizes if sizes else expected)
    return InputError(
        model,
        "no such folder, and no published size",
        expected=f"a folder, a Hub id (owner/name) or one of {', '.join(PUBLISHED)}",
        hint=suggestion,
    )
