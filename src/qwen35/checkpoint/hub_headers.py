"""What a request to the Hub may carry, and what the headers of an answer may say.

Imported late, as is `qwen35.checkpoint.hub_session`: the Hub's client takes longer to import than
the whole command line.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import httpx2
from huggingface_hub import constants
from huggingface_hub.utils import parse_ratelimit_headers

from qwen35.checkpoint.hub import COMMIT

__all__ = [
    "FIRST_ERROR",
    "XET_ROUTE",
    "BadAnswerError",
    "check_answer",
    "check_request",
    "endpoint",
    "joined",
    "limited",
    "listed_size",
    "same_origin",
]

_LOG = logging.getLogger(__name__)

FIRST_ERROR = 400

WAIT_SECONDS = 60
"""The longest wait that a Hub may ask for."""

_ETAG = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z._+=-]{0,127}")
_SECONDS = re.compile(r"[0-9]{1,9}")

XET_ROUTE = "/xet-read-token/"
"""In the paths where Xet's tokens are given out: no files."""

_listed: ContextVar[tuple[int, str] | None] = ContextVar("_listed", default=None)


class BadAnswerError(Exception):
    """An answer of the Hub that is refused; the text continues "the Hub ..."."""


@contextmanager
def limited(size: int, commit: str) -> Iterator[None]:
    """Hold the file that this thread downloads meanwhile to its listed size in bytes."""
    token = _listed.set((size, commit))
    try:
        yield
    finally:
        _listed.reset(token)


def listed_size() -> int | None:
    """Return the size in bytes that `limited` set."""
    listed = _listed.get()
    return listed[0] if listed else None


def endpoint() -> httpx2.URL:
    """Return the address of the Hub in use."""
    return httpx2.URL(constants.ENDPOINT)


def joined(base: httpx2.URL, address: str) -> httpx2.URL:
    """Return an address that an answer names, which may be relative.

    Raises:
        BadAnswerError: it is malformed.
    """
    try:
        return base.join(address)
    except (httpx2.InvalidURL, ValueError) as error:
        raise BadAnswerError(f"named a malformed address: {address[:80]!r}") from error


def same_origin(url: httpx2.URL, other: httpx2.URL) -> bool:
    """Return whether scheme, host and port are the same."""
    return _origin(url) == _origin(other)


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"https": 443, "http": 80}.get(url.scheme)


def check_request(request: httpx2.Request) -> None:
    """Keep the token from other hosts, and everything from addresses without encryption."""
    home = endpoint()
    _check_encrypted(home, request.url)
    if not same_origin(request.url, home):
        request.headers.pop("authorization", None)
    request.headers["accept-encoding"] = "identity"  # a small answer may decompress to a huge one


def _check_encrypted(home: httpx2.URL, url: httpx2.URL) -> None:
    if home.scheme == "https" and url.scheme != "https":
        raise BadAnswerError("leads to an address without encryption")


def check_answer(answer: httpx2.Response) -> None:
    """Check the headers of an answer, a redirect included.

    Raises:
        BadAnswerError: a rule of `qwen35.checkpoint.hub_session` is broken.
    """
    if answer.headers.get("content-encoding", "identity").lower() != "identity":
        raise BadAnswerError("sent compressed data, which was not asked for")
    if answer.has_redirect_location:
        _check_redirect(answer)
    if answer.status_code in (429, 503):
        _check_wait(answer)
    if answer.request.method == "HEAD":  # of these the client makes paths and sizes
        _check_commit(answer)
        _check_etag(answer)
        _check_size(answer)
    _check_xet(answer)


def _check_redirect(answer: httpx2.Response) -> None:
    url = answer.request.url
    target = joined(url, answer.headers["location"])
    if answer.request.method not in ("GET", "HEAD") and not same_origin(target, url):
        raise BadAnswerError("redirects a change to another host")
    if XET_ROUTE in target.path:
        raise BadAnswerError("redirects to where tokens are given out")


def _check_wait(answer: httpx2.Response) -> None:
    """Tell that the client will wait; refuse to wait for long."""
    limits = parse_ratelimit_headers(answer.headers)
    after = answer.headers.get("retry-after", "").strip()
    waits = [int(after) if _SECONDS.fullmatch(after) else 10**9] if after.isdigit() else []
    waits += [limits.reset_in_seconds] if limits and limits.remaining == 0 else []
    wait = max(waits, default=0)
    if wait > WAIT_SECONDS:
        raise BadAnswerError(f"answered {answer.status_code} and asks to wait {wait} s")
    pause = f": waiting {wait} s" if wait else ""
    _LOG.warning("the Hub answered %d%s", answer.status_code, pause)


def _check_commit(answer: httpx2.Response) -> None:
    commit = answer.headers.get("x-repo-commit")
    if commit is None:
        return
    if not COMMIT.fullmatch(commit):
        raise BadAnswerError("named a malformed commit")
    listed = _listed.get()
    if listed and commit != listed[1]:
        raise BadAnswerError(f"sent commit {commit[:12]} instead of {listed[1][:12]}")


def _check_etag(answer: httpx2.Response) -> None:
    tag = answer.headers.get("x-linked-etag") or answer.headers.get("etag")
    if tag is not None and not _ETAG.fullmatch(tag.removeprefix("W/").strip('"')):
        raise BadAnswerError("named a malformed ETag")


def _check_size(answer: httpx2.Response) -> None:
    size = answer.headers.get("x-linked-size")
    if size is None and answer.is_success:
        size = answer.headers.get("content-length")
    limit = listed_size()
    failed = answer.status_code >= FIRST_ERROR
    if failed or size is None or limit is None or size == str(limit):
        return
    raise BadAnswerError(f"offers {size[:20]} bytes, but lists {limit}")


def _check_xet(answer: httpx2.Response) -> None:
    """Check the addresses for Xet's library, which sends them tokens without asking us."""
    home, headers = endpoint(), answer.headers
    named = answer.links.get(constants.HUGGINGFACE_HEADER_LINK_XET_AUTH_KEY, {}).get("url")
    for route in (named, headers.get(constants.HUGGINGFACE_HEADER_X_XET_REFRESH_ROUTE)):
        # the client replaces the default endpoint by the one in use
        if not route or route.startswith(constants.HUGGINGFACE_CO_URL_HOME):
            continue
        if not same_origin(joined(home, route), home):
            raise BadAnswerError("sends the token to another host")
    if store := headers.get(constants.HUGGINGFACE_HEADER_X_XET_ENDPOINT):
        _check_encrypted(home, joined(home, store))
