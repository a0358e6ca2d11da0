"""Ask the Hub for a commit and its files; check every word of the answers.

The client's own calls make objects of answers without checking types, names or the number of pages,
so these two requests are made and read here, through the client's session.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx2
from huggingface_hub.utils import (
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
    validate_repo_id,
)

from qwen35.checkpoint.header import strict_json
from qwen35.checkpoint.hub import COMMIT
from qwen35.checkpoint.hub_headers import BadAnswerError, endpoint, joined
from qwen35.checkpoint.hub_session import guard_client
from qwen35.errors import InputError, UsageError

__all__ = ["HubEntry", "commit_of", "list_tree"]

MAX_ENTRIES = 200_000
_MAX_SIZE = 2**63 - 1
_MAX_NAME = 4096
LISTING_SECONDS = 300.0
_RETRIES = 2
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNUSABLE = re.compile("[\0\ud800-\udfff]")
"""Characters of JSON that no path can hold."""

_AUTHORIZATION = re.compile("(Bearer [!-~]+)?")
"""What fits into a header; the client would fail later, as if the network were to blame."""

_TOP = re.compile(r"(?!\.\.?\Z)[^/]+")


@dataclass(frozen=True)
class HubEntry:
    """A file or folder of a repository.

    Args:
        path: relative to the repository.
        size: bytes; None for a folder.
        blob: git's object id of the content, or of the pointer if it is an LFS file.
        sha256: of the content; for LFS files only.
    """

    path: str
    size: int | None
    blob: str = ""
    sha256: str | None = None


def commit_of(repo: str, revision: str | None, token: str | None) -> str:
    """Return the commit of a revision, by default of the main branch.

    Raises:
        BadAnswerError: the Hub names none, or a malformed one.
    """
    validate_repo_id(repo)
    part = f"/revision/{quote(revision, safe='')}" if revision else ""
    answer, _ = _ask(f"{_api(repo)}{part}", token, retry_on_exceptions=httpx2.TimeoutException)
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(commit, str):
        raise BadAnswerError("named no commit")
    if not COMMIT.fullmatch(commit):
        raise BadAnswerError("named a malformed commit")
    return commit


def list_tree(
    repo: str, commit: str, token: str | None, *, recursive: bool = False
) -> tuple[HubEntry, ...]:
    """Return the files and folders of a commit, at the top or all of them.

    Names at the top are those of files in a folder. Others can be strings of any form, which
    whoever writes files by them must check.

    Raises:
        BadAnswerError: a malformed entry, too many of them, or pages without end.
    """
    validate_repo_id(repo)
    url = f"{_api(repo)}/tree/{commit}?recursive={str(recursive).lower()}&expand=false"
    found: dict[str, HubEntry] = {}
    for row in _rows(url, token):
        entry = _entry(row)
        if not recursive and not _TOP.fullmatch(entry.path):
            raise BadAnswerError(f"lists a name that no file can have: {entry.path[:80]!r}")
        if entry.path in found:
            raise BadAnswerError("lists a file twice")
        found[entry.path] = entry
        if len(found) > MAX_ENTRIES:
            raise BadAnswerError(f"lists more than {MAX_ENTRIES} files")
    return tuple(found.values())


def _api(repo: str) -> str:
    return f"{str(endpoint()).rstrip('/')}/api/models/{repo}"


def _rows(url: str | None, token: str | None) -> Iterator[Any]:
    """Yield the rows of all pages; each page names the next one."""
    begun, seen = time.monotonic(), set[str]()
    while url:
        if url in seen:
            raise BadAnswerError("goes round in circles with its listing")
        if time.monotonic() - begun > LISTING_SECONDS:
            raise BadAnswerError("does not come to an end with its listing")
        seen.add(url)
        page, url = _ask(url, token)
        if not isinstance(page, list) or (url and not page):
            raise BadAnswerError("sent a malformed listing")
        yield from page


def _ask(url: str, token: str | None, **options: Any) -> tuple[Any, str | None]:
    """Return the JSON of an answer, and the address of the next page.

    Args:
        url: what to ask for.
        token: the access token.
        options: of the client's `http_backoff`.

    Raises:
        UsageError: the token cannot be one.
    """
    guard_client()
    headers = build_hf_headers(token=token)
    if not _AUTHORIZATION.fullmatch(headers.get("authorization", "")):
        found = "holds a space, a line break or a letter outside ASCII"
        raise UsageError("access token", found, hint="copy it again, to HF_TOKEN or --hf-token")
    answer = http_backoff("GET", url, headers=headers, max_retries=_RETRIES, **options)
    hf_raise_for_status(answer)
    try:
        value = strict_json(answer.content, "answer")
    except InputError as error:
        raise BadAnswerError("sent an answer that is not valid JSON") from error
    following = answer.links.get("next", {}).get("url")
    return value, str(joined(answer.url, following)) if following else None


def _entry(row: Any) -> HubEntry:
    """Check one row of a listing."""
    if not isinstance(row, dict):
        raise BadAnswerError("sent a malformed listing")
    path = row.get("path")
    if not isinstance(path, str) or len(path) > _MAX_NAME or _UNUSABLE.search(path):
        raise BadAnswerError(f"lists a name that no file can have: {str(path)[:80]!r}")
    if row.get("type") == "directory":
        return HubEntry(path, None)
    size, blob = row.get("size"), row.get("oid")
    if type(size) is not int or not 0 <= size <= _MAX_SIZE:
        raise BadAnswerError(f"lists {path[:80]!r} with a size of {str(size)[:40]}")
    if row.get("type") != "file" or not isinstance(blob, str) or not COMMIT.fullmatch(blob):
        raise BadAnswerError(f"lists {path[:80]!r} without what it is")
    return HubEntry(path, size, blob, _sha256(row.get("lfs"), path, size))


def _sha256(lfs: Any, path: str, size: int) -> str | None:
    """Check what a row says of a large file."""
    if lfs is None:
        return None
    digest = lfs.get("oid") if isinstance(lfs, Mapping) else None
    if isinstance(digest, str) and _SHA256.fullmatch(digest) and lfs.get("size") == size:
        return digest
    raise BadAnswerError(f"lists {path[:80]!r} with malformed details")
