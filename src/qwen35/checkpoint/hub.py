"""Checkpoints on the Hub: pinned to a commit, read by byte range, downloaded to the Hub's cache."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from qwen35.checkpoint.sidecars import MANIFEST_NAME, SIDECARS
from qwen35.errors import HubError, InputError, UsageError

__all__ = [
    "COMMIT",
    "HubId",
    "HubLocation",
    "cached_snapshot",
    "call_hub",
    "client_errors",
    "download",
    "download_file",
    "download_files",
    "explain",
    "fetch_file",
    "parse_address",
    "status_of",
]

_T = TypeVar("_T")

_DOWNLOADS_AT_ONCE = 8
_READ_RETRIES = 2

_MISREAD = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What the client raises where an answer has another type or form than it takes for granted."""

COMMIT = re.compile(r"[0-9a-f]{40}")
"""The whole name of a commit, or of a blob."""

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

    from qwen35.checkpoint.hub_headers import BadAnswerError

    if isinstance(error, BadAnswerError):
        return HubError(subject, f"the Hub {error}", hint="check HF_ENDPOINT, or try again later")
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
    if isinstance(error.__cause__, errors.FileMetadataError):
        found = "the Hub named no commit or no ETag of a file"
        return HubError(subject, found, hint="check HF_ENDPOINT, or try again later")
    status = status_of(error)
    name = type(error).__name__
    if isinstance(error, _MISREAD) and not status:
        found = f"the Hub's answer was not understood ({name})"
        return HubError(subject, found, hint="check HF_ENDPOINT, or try again later")
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
    """Return the exceptions of the Hub's client for refused requests and failed connections.

    Those of `_MISREAD` are among them: use it around calls of the client only.
    """
    import httpx2
    from huggingface_hub import errors

    from qwen35.checkpoint.hub_headers import BadAnswerError

    try:
        from hf_xet import XetAuthenticationError, XetObjectNotFoundError
    except ImportError:  # no build for this platform: the client works without it
        xet: tuple[type[Exception], ...] = ()
    else:
        xet = (XetAuthenticationError, XetObjectNotFoundError)
    return (
        *xet,
        *_MISREAD,
        BadAnswerError,
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


class HubLocation:
    """The files of a repository at one commit, read by range requests and not cached.

    Args:
        hub_id: repository and revision; the constructor resolves the revision to a commit.
        token: access token, or None for the client's default.

    Raises:
        HubError: the repository or revision does not exist, or the Hub cannot be reached.
    """

    def __init__(self, hub_id: HubId, token: str | None = None) -> None:
        from qwen35.checkpoint.hub_listing import commit_of, list_tree

        self.repo, self._token = hub_id.repo, token
        self.revision = call_hub(
            self.repo, lambda: commit_of(self.repo, hub_id.revision, self._token)
        )
        entries = call_hub(self.repo, lambda: list_tree(self.repo, self.revision, self._token))
        self._folders = sorted(entry.path for entry in entries if entry.size is None)
        self._sizes = {entry.path: entry.size for entry in entries if entry.size is not None}

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
        import httpx2

        for _ in range(_READ_RETRIES):
            try:
                return self._read_once(name, start, count)
            except httpx2.TimeoutException:  # told by the session
                continue
        return self._read_once(name, start, count)

    def _read_once(self, name: str, start: int, count: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        from qwen35.checkpoint.hub_headers import limited

        url = hf_hub_url(self.repo, name, revision=self.revision)
        headers = build_hf_headers(token=self._token)
        headers["Range"] = f"bytes={start}-{start + count - 1}"
        content = b""
        with (
            limited(self._sizes.get(name, start + count), self.revision),
            get_session().stream("GET", url, headers=headers) as response,
        ):
            hf_raise_for_status(response)
            range_ignored = response.status_code == 200  # the server sends the whole file
            skip = start if range_ignored else 0
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
    if match is None or ".." in match[3].split("/"):
        raise UsageError(f"hf:{address}", "malformed", expected="hf:owner/name/path")
    return HubId(match[1], match[2]), match[3]


def fetch_file(place: str, repo: str, commit: str, path: str, size: int, **options: Any) -> Path:
    """Download one file, which becomes no larger than it is listed; return where it is.

    Args:
        place: what to call the file in errors.
        repo: its repository.
        commit: its commit.
        path: its name in the repository.
        size: its listed bytes.
        options: as for the client's `hf_hub_download`.

    Raises:
        HubError: the download failed, or has another size.
        OSError: it cannot be stored.
    """
    from huggingface_hub import hf_hub_download

    from qwen35.checkpoint.hub_headers import limited
    from qwen35.checkpoint.hub_session import guard_client

    guard_client()
    with limited(size, commit):
        try:
            target = call_hub(
                place, lambda: hf_hub_download(repo, path, revision=commit, **options)
            )
        except OSError as error:
            if error.errno is not None:  # the local disk
                raise
            raise HubError(place, "arrived incomplete", hint="run again") from error
    file, arrived = Path(target), Path(target).stat().st_size
    if arrived != size:
        hint = f"remove {file} and run again"
        raise HubError(place, f"has {arrived} bytes", expected=f"{size}, as listed", hint=hint)
    return file


def download_file(address: str, token: str | None = None) -> Path:
    """Download one file into the Hub's cache and return its path.

    Args:
        address: ``owner/name[@revision]/path``.
        token: access token, or None for the client's default.

    Raises:
        UsageError: the address is malformed.
        HubError: the download failed.
    """
    hub_id, path = parse_address(address)
    root = cached_snapshot(hub_id)
    if root is not None and (root / path).is_file():
        return root / path
    from qwen35.checkpoint.hub_listing import commit_of, list_tree

    commit = call_hub(address, lambda: commit_of(hub_id.repo, hub_id.revision, token))
    deep = "/" in path
    entries = call_hub(address, lambda: list_tree(hub_id.repo, commit, token, recursive=deep))
    size = {entry.path: entry.size for entry in entries}.get(path)
    if size is None:
        raise HubError(address, "a file is missing there", hint="check its name")
    try:
        return fetch_file(address, hub_id.repo, commit, path, size, token=token)
    except OSError as error:
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
        InputError: there are no such files.
    """
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():  # progress bars would clutter pipes and logs
        disable_progress_bars()
    sizes = place.sizes()
    wanted = [n for n in sizes if any(fnmatchcase(n, pattern) for pattern in patterns)]

    def fetch(name: str) -> Path:
        return fetch_file(place.repo, place.repo, place.revision, name, sizes[name], token=token)

    pool = ThreadPoolExecutor(_DOWNLOADS_AT_ONCE)
    try:
        files = list(pool.map(fetch, wanted))
    except OSError as error:
        raise _not_stored(place.repo, error) from error
    finally:
        pool.shutdown(cancel_futures=True)
    if not files:
        raise InputError(str(place), f"none of {', '.join(patterns[:3])} is there")
    return files[0].parent
