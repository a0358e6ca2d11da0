"""Checkpoints on the Hub: resolved to a commit, read by ranges, downloaded into the Hub's cache."""

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
    "ask",
    "bound_client",
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
"""How long to wait for the next bytes of an answer; a commit of many files takes its time."""

_CONNECT_SECONDS = 20.0

_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?\Z", re.ASCII)


@dataclass(frozen=True)
class HubId:
    """A repository and, if given, a branch, tag or commit."""

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """Parse ``owner/name[@revision]``; None if `text` is not of that form."""
        match = _ID.match(text)
        return cls(match["repo"], match["revision"]) if match else None


def explain(subject: str, error: Exception) -> HubError:
    """Turn an exception of the Hub's client into a sentence; the URL and token stay out of it."""
    from huggingface_hub import errors

    rows: tuple[tuple[type[Exception], str, str], ...] = (
        (
            errors.GatedRepoError,
            "access is gated",
            "accept its terms on the Hub, then give a token",
        ),
        (
            errors.RepositoryNotFoundError,
            "no such repository, or it is private",
            "check the name; for a private one set HF_TOKEN or give --hf-token",
        ),
        (errors.HFValidationError, "no repository can be called so", "check the name"),
        (errors.RevisionNotFoundError, "no such revision", "check the part after @"),
        (errors.RemoteEntryNotFoundError, "a file is missing there", "is it a model repository?"),
    )
    for kind, found, hint in rows:
        if isinstance(error, kind):
            return HubError(subject, found, hint=hint)
    status = status_of(error)
    found = f"the Hub answered {status}" if status else f"the Hub was not reached ({_kind(error)})"
    return HubError(subject, found, hint="check the network and HF_ENDPOINT, then run again")


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status that an exception of the Hub's client, or its cause, came with."""
    while error is not None:
        status: int | None = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__
    return None


def _kind(error: Exception) -> str:
    return type(error).__name__


def client_errors() -> tuple[type[Exception], ...]:
    """Return what the Hub's client raises when the Hub refuses or is out of reach."""
    import httpx2
    from huggingface_hub import errors

    try:
        from hf_xet import XetAuthenticationError, XetObjectNotFoundError
    except ImportError:  # a machine for which there is no build: the client does without
        xet: tuple[type[Exception], ...] = ()
    else:
        xet = (XetAuthenticationError, XetObjectNotFoundError)
    return (
        *xet,
        errors.XetDownloadError,
        errors.HFValidationError,
        errors.HfHubHTTPError,
        httpx2.HTTPError,
        errors.LocalEntryNotFoundError,
        ConnectionError,
    )


def ask(subject: str, call: Callable[[], _T]) -> _T:
    """Call the Hub; what its client raises becomes a `HubError`."""
    try:
        return call()
    except client_errors() as error:
        raise explain(subject, error) from error


def bound_client() -> None:
    """Make the Hub's client give up when no answer comes: by itself it waits for ever.

    Some of its calls ask for no limit explicitly, so each request is given one as it leaves. A
    limit that somebody has chosen stays.
    """
    from huggingface_hub.utils import get_session

    hooks = get_session().event_hooks
    if _limit in hooks["request"]:
        return
    import httpx2
    from huggingface_hub import set_client_factory

    hooks = {**hooks, "request": [*hooks["request"], _limit]}
    set_client_factory(
        lambda: httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=None)
    )


def _limit(request: Any) -> None:
    """Fill in the timeouts that a request of the client goes without."""
    limits = {"connect": _CONNECT_SECONDS} | dict.fromkeys(
        ("read", "write", "pool"), ANSWER_SECONDS
    )
    chosen = {n: v for n, v in request.extensions.get("timeout", {}).items() if v is not None}
    request.extensions["timeout"] = limits | chosen


class HubLocation:
    """The files of a repository at one commit, read by range requests; nothing is stored.

    Args:
        hub_id: repository and revision; the revision is resolved to a commit at once.
        token: access token, or None for the one the Hub's client finds.

    Raises:
        HubError: the repository or revision is not there, or the Hub is out of reach.
    """

    def __init__(self, hub_id: HubId, token: str | None = None) -> None:
        from huggingface_hub import HfApi

        bound_client()
        self._id = hub_id
        self._api = HfApi(token=token)
        info = ask(
            hub_id.repo,
            lambda: self._api.model_info(
                hub_id.repo, revision=hub_id.revision, files_metadata=False
            ),
        )
        if not info.sha:
            raise HubError(hub_id.repo, "the Hub named no commit")
        self.repo = hub_id.repo
        self.revision = info.sha
        self._sizes = ask(hub_id.repo, self._list)

    def _list(self) -> dict[str, int]:
        from huggingface_hub.hf_api import RepoFile

        entries = self._api.list_repo_tree(self.repo, revision=self.revision)
        return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision[:12]}"

    def sizes(self) -> Mapping[str, int]:
        """Return the size in bytes of each file at the top of the repository."""
        return self._sizes

    def read(self, name: str, start: int, count: int) -> bytes:
        """Return `count` bytes of a file from `start` on.

        Raises:
            HubError: the Hub refuses or sends something else.
        """
        if count == 0:
            return b""
        return ask(f"{self}, {name}", lambda: self._read(name, start, count))

    def _read(self, name: str, start: int, count: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.repo, name, revision=self.revision, endpoint=self._api.endpoint)
        headers = build_hf_headers(token=self._api.token)
        headers["Range"] = f"bytes={start}-{start + count - 1}"
        headers["Accept-Encoding"] = "identity"
        with get_session().stream("GET", url, headers=headers, timeout=60) as response:
            hf_raise_for_status(response)
            ignored = response.status_code == 200  # the whole file comes: stop when we have ours
            skip = start if ignored else 0
            content = b""
            for piece in response.iter_bytes():
                content += piece[skip:]
                skip = max(0, skip - len(piece))
                if len(content) >= count:
                    break
        if len(content) < count:
            raise HubError(f"{self}, {name}", f"{len(content)} bytes came", expected=str(count))
        return content[:count]


def parse_address(address: str) -> tuple[HubId, str]:
    """Parse ``owner/name[@revision]/path``.

    Raises:
        UsageError: it is malformed.
    """
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/([\w./-]+)", address, re.ASCII)
    if match is None:
        raise UsageError(f"hf:{address}", "malformed", expected="hf:owner/name/path")
    return HubId(match[1], match[2]), match[3]


def download_file(address: str, token: str | None = None) -> Path:
    """Download one file into the Hub's cache; return where it is.

    Args:
        address: ``owner/name[@revision]/path``.
        token: access token, or None for the one the Hub's client finds.

    Raises:
        UsageError: the address is malformed.
        HubError: the download failed.
    """
    from huggingface_hub import hf_hub_download

    bound_client()
    hub_id, path = parse_address(address)
    options: dict[str, Any] = {"revision": hub_id.revision, "token": token}
    try:
        return Path(ask(address, lambda: hf_hub_download(hub_id.repo, path, **options)))
    except OSError as error:
        raise _not_stored(address, error) from error


def _not_stored(subject: str, error: OSError) -> HubError:
    hint = "make room in the Hub's cache (HF_HOME), or set HF_HOME to a folder on another disk"
    return HubError(subject, f"the download cannot be stored ({error.strerror})", hint=hint)


def download(place: HubLocation, shards: list[str], token: str | None = None) -> Path:
    """Download the checkpoint's files into the Hub's cache; return the snapshot's folder.

    Args:
        place: where from.
        shards: its safetensors files, and other files that are wanted if they are there.
        token: access token, or None for the one the Hub's client finds.

    Raises:
        HubError: the download failed.
        InputError: the snapshot is not complete.
    """
    wanted = [row.name for row in SIDECARS]
    wanted += ["config.json", "*.safetensors.index.json", MANIFEST_NAME, *shards]
    return download_files(place, wanted, token)


def download_files(place: HubLocation, wanted: Sequence[str], token: str | None = None) -> Path:
    """Download files, if they are there, into the Hub's cache; return the snapshot's folder.

    Args:
        place: where from.
        wanted: names, or patterns of names.
        token: access token, or None for the one the Hub's client finds.

    Raises:
        HubError: the download failed.
        InputError: the snapshot is not complete.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    options: dict[str, Any] = {"revision": place.revision, "token": token, "allow_patterns": wanted}
    try:
        folder = Path(ask(place.repo, lambda: snapshot_download(place.repo, **options)))
    except OSError as error:
        raise _not_stored(place.repo, error) from error
    missing = [name for name in wanted if name in place.sizes() and not (folder / name).exists()]
    if missing:
        raise InputError(str(place), f"{missing[0]} did not arrive", hint="run again")
    return folder
