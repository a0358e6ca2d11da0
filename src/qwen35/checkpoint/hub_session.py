"""The session of the Hub's client, held to bounds: what a Hub answers is untrusted.

`guard_client` gives the client (huggingface_hub) a session that promises, for each request:

- The access token goes to the endpoint's own host and port alone, wherever a redirect, a page of a
  listing or the address for an upload leads. Nothing goes over plain HTTP if the endpoint has
  HTTPS, and a change is not redirected to another host.
- An answer is at most `ANSWER_BYTES` long, a file at most as long as it is listed
  (`qwen35.checkpoint.hub_headers.limited`), and nothing is decompressed.
- An answer begins within `READ_SECONDS` (`CHANGE_SECONDS` for commits and uploads), and at least
  `SLOW_BYTES` of its body arrive in `SLOW_SECONDS`. Transfers that break off or slow down
  `STRIKES` times in a row end the command. So does a request to wait for more than a minute.
- Commits, ETags and sizes of files, which the client makes paths of, are well-formed and are those
  of the listing.

An answer against these rules raises `BadAnswerError`, which the client does not retry. Trouble that
it does retry is logged as a warning, and the command line prints it as a note.

Transfers by Xet's library (hf_xet) do not use this session: only the addresses that it is given are
checked.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.utils import get_session
from huggingface_hub.utils import logging as client_log

from qwen35.checkpoint.hub_headers import (
    FIRST_ERROR,
    XET_ROUTE,
    BadAnswerError,
    check_answer,
    check_request,
    listed_size,
)
from qwen35.threads import detached

__all__ = ["guard_client"]

_LOG = logging.getLogger(__name__)

READ_SECONDS = 30.0
CHANGE_SECONDS = 300.0
"""A commit of many files takes minutes."""

_CONNECT_SECONDS = 20.0
_NOTICE_SECONDS = 10.0
"""A longer silence is told."""

BODY_SECONDS = 120.0
"""For the whole of an answer that is not a file."""

SLOW_SECONDS = 15.0
SLOW_BYTES = 15 * 1024
STRIKES = 3
_PROGRESS_BYTES = 256 * 1024
"""A transfer that brings less before it breaks off is a strike."""

_UPLOAD_RATE = 16 * 1024
"""Bytes a second of the slowest upload that is waited for."""

ANSWER_BYTES = 16 * 2**20
_ERROR_BYTES = 2**20

_strikes: Counter[str] = Counter()


def guard_client() -> None:
    """Give the Hub's client a session as described above, unless it has one."""
    if isinstance(get_session(), _Session):
        return
    if client_log.get_verbosity() == client_log.WARNING:  # not what the user chose
        client_log.set_verbosity_error()  # its warnings hold addresses; ours do not
    hooks = get_session().event_hooks
    set_client_factory(lambda: _Session.with_hooks(hooks))


class _Session(httpx2.Client):  # type: ignore[misc]
    """A session whose requests end in time."""

    @classmethod
    def with_hooks(cls, hooks: dict[str, list[Callable[..., Any]]]) -> _Session:
        """Return a session with the client's own hooks and ours."""
        ours = {
            "request": [*hooks["request"], check_request, _add_timeouts],
            "response": [*hooks["response"], check_answer, _bound],
        }
        return cls(event_hooks=ours, follow_redirects=True, timeout=None)

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Send a request; headers that come byte by byte do not prolong it."""
        stream = options.pop("stream", False)
        call = super().send
        try:
            response = _in_time(request, lambda: call(request, stream=True, **options))
        except httpx2.TransportError as error:
            if not isinstance(error, httpx2.ConnectError):
                _LOG.warning("no answer from the Hub (%s)", type(error).__name__)
            raise
        if not stream:
            try:
                response.read()
            finally:
                response.close()
        return response


def _patience(request: httpx2.Request) -> float:
    """Return the seconds in which the next bytes of an answer must come."""
    slow = request.method == "PUT" or "/commit/" in request.url.path
    return CHANGE_SECONDS if slow else READ_SECONDS


def _add_timeouts(request: httpx2.Request) -> None:
    """Fill in the timeouts that a request lacks: some calls of the client turn them off."""
    seconds = _patience(request)
    defaults = {"connect": _CONNECT_SECONDS, "read": seconds, "write": seconds, "pool": seconds}
    chosen = {n: v for n, v in request.extensions.get("timeout", {}).items() if v is not None}
    request.extensions["timeout"] = defaults | chosen


def _deadline(request: httpx2.Request) -> float | None:
    """Return the seconds until the headers of the answer must be here, redirects included."""
    length = request.headers.get("content-length", "0")
    if "transfer-encoding" in request.headers:
        return None  # a body of unknown length: each piece of it has a timeout
    return 1.5 * _patience(request) + int(length) / _UPLOAD_RATE


def _in_time(request: httpx2.Request, call: Callable[[], httpx2.Response]) -> httpx2.Response:
    """Run `call` in a thread, which is left alone at the deadline.

    A read timeout holds for each piece of the headers, not for all of them.
    """
    answer = detached(call)
    seconds = _deadline(request)
    notice = _NOTICE_SECONDS if seconds is None else min(seconds, _NOTICE_SECONDS)
    if not wait([answer], notice).done:
        if request.method != "PUT":
            _LOG.warning("the Hub has not answered for %.0f s", _NOTICE_SECONDS)
        rest = None if seconds is None else max(0.0, seconds - _NOTICE_SECONDS)
        if not wait([answer], rest).done:
            answer.add_done_callback(_close_late)
            raise _too_late(request)
    return answer.result()


def _close_late(answer: Future[httpx2.Response]) -> None:
    """Close an answer that nobody waits for any more."""
    if answer.exception() is None:
        answer.result().close()


def _too_late(request: httpx2.Request) -> Exception:
    """Return the error for no answer; only reading may be tried again."""
    if request.method in ("GET", "HEAD"):
        error: Exception = httpx2.ReadTimeout("the headers came too slowly", request=request)
        return error
    return BadAnswerError("did not answer in time")


def _bound(answer: httpx2.Response) -> None:
    """Replace the body of an answer by a bounded one."""
    assert isinstance(answer.stream, httpx2.SyncByteStream)
    url, listed, seconds = answer.request.url, listed_size(), None
    if answer.status_code >= FIRST_ERROR or answer.has_redirect_location:
        limit, seconds = _ERROR_BYTES, BODY_SECONDS
    elif listed is None or XET_ROUTE in url.path:
        limit, seconds = ANSWER_BYTES, BODY_SECONDS
    else:  # a file, on whatever path of whatever host the Hub keeps it
        limit = listed
    answer.stream = _Body(answer.stream, limit, seconds, str(url.copy_with(query=None)))


class _Body(httpx2.SyncByteStream):  # type: ignore[misc]
    """A body, counted and timed.

    Args:
        stream: the body.
        limit: its greatest length in bytes.
        seconds: the longest time for all of it, if there is a limit.
        key: what is transferred, for counting failures in a row.
    """

    def __init__(
        self, stream: httpx2.SyncByteStream, limit: int, seconds: float | None, key: str
    ) -> None:
        self._stream, self._limit, self._seconds, self._key = stream, limit, seconds, key

    def __iter__(self) -> Iterator[bytes]:
        pace, begun, total = _Pace(), time.monotonic(), 0
        try:
            for piece in self._stream:
                total += len(piece)
                if total > self._limit:
                    raise BadAnswerError(f"sent more than {self._limit} bytes")
                if self._seconds is not None and time.monotonic() - begun > self._seconds:
                    raise BadAnswerError(f"took more than {self._seconds:.0f} s for an answer")
                pace.add(len(piece))
                yield piece
        except httpx2.TransportError as error:
            self._strike(0 if pace.slow else total, error)
            raise
        del _strikes[self._key]

    def _strike(self, progress: int, error: Exception) -> None:
        _strikes[self._key] = 1 + (_strikes[self._key] if progress < _PROGRESS_BYTES else 0)
        if _strikes[self._key] >= STRIKES:
            raise BadAnswerError("keeps breaking off or slowing down") from error
        _LOG.warning("the Hub's answer broke off or slowed down: trying again")

    def close(self) -> None:
        """Close the body."""
        self._stream.close()


class _Pace:
    """Watches that bytes keep coming.

    Attributes:
        slow: whether they did not.
    """

    def __init__(self) -> None:
        self.slow = False
        self._since, self._bytes, self._told = time.monotonic(), 0, False

    def add(self, nbytes: int) -> None:
        """Count bytes.

        Raises:
            httpx2.ReadTimeout: too few for too long; the client tries again.
        """
        self._bytes += nbytes
        seconds = time.monotonic() - self._since
        if self._bytes >= SLOW_BYTES:
            self._since, self._bytes, self._told = time.monotonic(), 0, False
        elif seconds > SLOW_SECONDS:
            self.slow = True
            raise httpx2.ReadTimeout("too slow")
        elif seconds > SLOW_SECONDS / 3 and not self._told:
            self._told = True
            _LOG.warning("the Hub sends slowly: %d bytes in %.0f s", self._bytes, seconds)
