"""Checkpoints on the Hub: pinned to a commit, read by byte range, downloaded to the Hub's cache."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qwen35.checkpoint.sidecars import MANIFEST_NAME, SIDECARS
from qwen35.errors import HubError, InputError, UsageError

__all__ = [
    "HubId",
    "HubLocation",
    "bound_client",
    "cached_snapshot",
    "call_hub",
    "client_errors",
    "download",
    "download_file",
    "download_files",
    "explain",
    "parse_address",
    "status_of",
]

_T = TypeVar("_T")

ANSWER_SECONDS = 300.0
"""Timeout for the next bytes of a response; a commit of many files takes minutes."""

_CONNECT_SECONDS = 20.0

_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?\Z", re.ASCII)


@dataclass(frozen=True)
class HubId:
    """A repository and, optionally, a branch, tag or commit."""

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """Parse ``owner/name[@revision]``; return None if `text` has another form."""
        match = _ID.match(text)
        return cls(match["repo"], match["revision"]) if match else None


def explain(subject: str, error: Exception) -> HubError:
    """Convert an exception of the Hub's client to a `HubError` without URL and token."""
    # Imported late throughout this module: the client takes longer to import than the whole CLI.
    from huggingface_hub import errors

    rows: tuple[tuple[type[Exception], str, str], ...] = (
        (  # before its base class RepositoryNotFoundError
            errors.GatedRepoError,
            "access is gated",
            "accept its terms on the Hub, then give a token",
        ),
        (
            errors.RepositoryNotFoundError,
            "no such repository, or it is private",
            "check the name; for a private one set HF_TOKEN or give --hf-token",
        ),
        (
            errors.OfflineModeIsEnabled,
            "HF_HUB_OFFLINE is set, and the Hub's cache does not have it",
            "unset it, or download the model first",
        ),
        (errors.HFValidationError, "not a valid repository name", "check the name"),
        (errors.RevisionNotFoundError, "no such revision", "check the part after @"),
        (errors.RemoteEntryNotFoundError, "a file is missing there", "is it a model repository?"),
    )
    for kind, found, hint in rows:
        if isinstance(error, kind):
            return HubError(subject, found, hint=hint)
    status = status_of(error)
    name = type(error).__name__
    found = f"the Hub answered {status}" if status else f"the Hub was not reached ({name})"
    return HubError(subject, found, hint="check the network and HF_ENDPOINT, then run again")


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status attached to an exception of the Hub's client or to its causes."""
    while error is not None:
        status: int | None = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__
    return None


def client_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of the Hub's client for refused requests and failed connections."""
    import httpx2
    from huggingface_hub import errors

    try:
        from hf_xet import XetAuthenticationError, XetObjectNotFoundError
    except ImportError:  # no build for this platform: the client works without it
        xet: tuple[type[Exception], ...] = ()
    else:
        xet = (XetAuthenticationError, XetObjectNotFoundError)
    return (
        *xet,
        errors.XetDownloadError,
        errors.HFValidationError,
        errors.HfHubHTTPError,
        httpx2.HTTPError,
        errors.LocalEntryNotFoundError,  # the Hub is unreachable and the cache lacks the file
        ConnectionError,
    )


def call_hub(subject: str, call: Callable[[], _T]) -> _T:
    """Run `call`; raise errors of the Hub's client as `HubError`."""
    try:
        return call()
    except client_errors() as error:
        raise explain(subject, error) from error


def bound_client() -> None:
    """Add timeouts to the Hub's client, which otherwise waits forever for a response.

    Some of its calls disable timeouts explicitly, so a hook adds them to each outgoing request.
    Timeouts that are already set stay.
    """
    from huggingface_hub.utils import get_session

    hooks = get_session().event_hooks
    if _add_timeouts in hooks["request"]:
        return
    import httpx2
    from huggingface_hub import set_client_factory

    hooks = {**hooks, "request": [*hooks["request"], _add_timeouts]}
    set_client_factory(
        lambda: httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=None)
    )


def _add_timeouts(request: Any) -> None:
    """Fill in the timeouts that a request of the client lacks."""
    defaults = {"connect": _CONNECT_SECONDS} | dict.fromkeys(
        ("read", "write", "pool"), ANSWER_SECONDS
    )
    chosen = {n: v for n, v in request.extensions.get("timeout", {}).items() if v is not None}
    request.extensions["timeout"] = defaults | chosen


class HubLocation:
    """The files of a repository at one commit, read by range requests and not cached.

    Args:
        hub_id: repository and revision; the constructor resolves the revision to a commit.
        token: access token, or None for the client's default.

    Raises:
        HubError: the repository or revision does not exist, or the Hub cannot be reached.
    """

    def __init__(self, hub_id: HubId, token: str | None = None) -> None:
        from huggingface_hub import HfApi

        bound_client()
        self._id = hub_id
        self._api = HfApi(token=token)
        info = call_hub(
            hub_id.repo,
            lambda: self._api.model_info(
                hub_id.repo, revision=hub_id.revision, files_metadata=False
            ),
        )
        if not info.sha:
            raise HubError(hub_id.repo, "the Hub named no commit")
        self.repo = hub_id.repo
        self.revision = info.sha
        self._sizes = call_hub(hub_id.repo, self._list)

    def _list(self) -> dict[str, int]:
        from huggingface_hub.hf_api import RepoFile

        entries = list(self._api.list_repo_tree(self.repo, revision=self.revision))
        self._folders = sorted(e.path for e in entries if not isinstance(e, RepoFile))
        return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision[:12]}"

    def sizes(self) -> Mapping[str, int]:
        """Return the size in bytes of each file at the top of the repository."""
        return self._sizes

    def folders(self) -> Sequence[str]:
        """Return the names of the folders at the top of the repository."""
        return self._folders

    def dangling(self) -> Mapping[str, str]:
        """Return nothing: the Hub has no links."""
        return {}

    def read(self, name: str, start: int, count: int) -> bytes:
        """Return `count` bytes of a file, starting at `start`.

        Raises:
            HubError: the Hub refuses the request or sends too little.
        """
        if count == 0:
            return b""
        return call_hub(f"{self}, {name}", lambda: self._read(name, start, count))

    def _read(self, name: str, start: int, count: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.repo, name, revision=self.revision, endpoint=self._api.endpoint)
        headers = build_hf_headers(token=self._api.token)
        headers["Range"] = f"bytes={start}-{start + count - 1}"
        headers["Accept-Encoding"] = "identity"  # a range of compressed data would be useless
        with get_session().stream("GET", url, headers=headers, timeout=60) as response:
            hf_raise_for_status(response)
            range_ignored = response.status_code == 200  # the server sends the whole file
            skip = start if range_ignored else 0
            content = b""
            for chunk in response.iter_bytes():
                content += chunk[skip:]
                skip = max(0, skip - len(chunk))
                if len(content) >= count:
                    break
        if len(content) < count:
            raise HubError(f"{self}, {name}", f"received {len(content)} bytes", expected=str(count))
        return content[:count]


def cached_snapshot(hub_id: HubId) -> Path | None:
    """Return a revision's folder in the Hub's cache if HF_HUB_OFFLINE is set and it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import (
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
    )

    if not is_offline_mode():
        return None
    options: dict[str, Any] = {"revision": hub_id.revision, "local_files_only": True}
    try:
        return Path(snapshot_download(hub_id.repo, **options))
    except IncompleteSnapshotError as error:
        return Path(error.snapshot_path)  # files that no model needs may well be missing
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def parse_address(address: str) -> tuple[HubId, str]:
    """Parse ``owner/name[@revision]/path``.

    Raises:
        UsageError: `address` is malformed.
    """
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/([\w./-]+)", address, re.ASCII)
    if match is None:
        raise UsageError(f"hf:{address}", "malformed", expected="hf:owner/name/path")
    return HubId(match[1], match[2]), match[3]


def download_file(address: str, token: str | None = None) -> Path:
    """Download one file into the Hub's cache and return its path.

    Args:
        address: ``owner/name[@revision]/path``.
        token: access token, or None for the client's default.

    Raises:
        UsageError: the address is malformed.
        HubError: the download failed.
    """
    from huggingface_hub import hf_hub_download

    bound_client()
    hub_id, path = parse_address(address)
    options: dict[str, Any] = {"revision": hub_id.revision, "token": token}
    try:
        return Path(call_hub(address, lambda: hf_hub_download(hub_id.repo, path, **options)))
    except OSError as error:  # client errors are handled above: this is the local disk
        raise _not_stored(address, error) from error


def _not_stored(subject: str, error: OSError) -> HubError:
    hint = "make room in the Hub's cache (HF_HOME), or set HF_HOME to a folder on another disk"
    return HubError(subject, f"the download cannot be stored ({error.strerror})", hint=hint)


def download(place: HubLocation, shards: list[str], token: str | None = None) -> Path:
    """Download a checkpoint into the Hub's cache and return the snapshot's folder.

    Args:
        place: the repository.
        shards: its safetensors files, and optional other files.
        token: access token, or None for the client's default.

    Raises:
        HubError: the download failed.
        InputError: the snapshot is incomplete.
    """
    patterns = [row.name for row in SIDECARS]
    patterns += ["config.json", "*.safetensors.index.json", MANIFEST_NAME, *shards]
    return download_files(place, patterns, token)


def download_files(place: HubLocation, patterns: Sequence[str], token: str | None = None) -> Path:
    """Download the files that exist into the Hub's cache and return the snapshot's folder.

    Args:
        place: the repository.
        patterns: file names or glob patterns.
        token: access token, or None for the client's default.

    Raises:
        HubError: the download failed.
        InputError: the snapshot is incomplete.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():  # progress bars would clutter pipes and logs
        disable_progress_bars()
    options: dict[str, Any] = {
        "revision": place.revision,
        "token": token,
        "allow_patterns": patterns,
    }
    try:
        folder = Path(call_hub(place.repo, lambda: snapshot_download(place.repo, **options)))
    except OSError as error:
        raise _not_stored(place.repo, error) from error
    # If the Hub becomes unreachable, the client falls back to a cached, possibly partial snapshot.
    missing = [name for name in patterns if name in place.sizes() and not (folder / name).exists()]
    if missing:
        raise InputError(str(place), f"{missing[0]} was not downloaded", hint="run again")
    return folder
