"""Requests to a server of models, each with bounds on time, bytes and repetitions.

- The key goes to the endpoint's address alone: redirects are refused, and proxies are not used.
- An answer ends within `Bounds.seconds`, whatever the server sends meanwhile, and is no longer than
  the request allows. A server that is busy (429, 503) is asked again after its ``Retry-After``, a
  few times and for a few minutes at most; so is one that does not accept the connection. One that
  is busy all the time is not asked again for each request.
- What is shown of an answer is cut, made printable, and never holds the key; what is returned is
  what the server sent.
"""

from __future__ import annotations

import json
import os
import queue
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar
from typing import Any

import httpx2

from qwen35.closing import Closing
from qwen35.errors import EndpointError, UsageError
from qwen35.serving.endpoint import KEY_VARIABLE, Endpoint
from qwen35.serving.hidden_keys import shown
from qwen35.serving.json_values import parsed, text_in
from qwen35.threads import detached
from qwen35.version import __version__

__all__ = ["ANSWER_BYTES", "Bounds", "ServerClient"]

ANSWER_BYTES = 16 * 2**20
_ERROR_BYTES = 64 * 2**10
_LINE_BYTES = 2**20
_CONNECT_SECONDS = 10.0
_BUSY = (429, 503)
_FIRST_REDIRECT, _FIRST_ERROR = 300, 400
_SHOWN = 200
_WAITING = 64
_LOOK_SECONDS = 0.5
_END = "[DONE]"

_KEPT_SECONDS = 2.0
"""For which an idle connection is used again: servers close theirs after five, and a request then
would be lost."""


@dataclass(frozen=True)
class Bounds:
    """How patient a client is.

    Args:
        seconds: for a whole answer.
        retries: repetitions of a request to a busy or unreachable server.
        pause: seconds before the first repetition; each other one waits twice as long.
        wait: the longest time in seconds that a server may ask to wait for.
        patience: repetitions in a row, of all requests, without any answer in between.
    """

    seconds: float = 600.0
    retries: int = 4
    pause: float = 0.5
    wait: float = 60.0
    patience: int = 24


class ServerClient(Closing):
    """Talks to one server; may be used by several threads.

    Args:
        endpoint: its address and key.
        bounds: how patient to be; by default as the endpoint says.

    Raises:
        UsageError: the certificates that the environment names cannot be read.
    """

    def __init__(self, endpoint: Endpoint, bounds: Bounds | None = None) -> None:
        self.endpoint, self.bounds = endpoint, bounds or Bounds(endpoint.seconds)
        self._left = self.bounds.patience
        headers = {"user-agent": f"qwen35/{__version__}", "accept-encoding": "identity"}
        if endpoint.key:
            headers["authorization"] = f"Bearer {endpoint.key}"
        limits = httpx2.Limits(
            max_connections=None, max_keepalive_connections=64, keepalive_expiry=_KEPT_SECONDS
        )
        self._http = httpx2.Client(
            headers=headers,
            follow_redirects=False,
            limits=limits,
            verify=_certificates(endpoint),
            cookies=_NoCookies(),
            trust_env=False,  # a proxy would read the key
        )

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def get(self, path: str) -> Any:
        """Return the JSON at a path.

        Raises:
            EndpointError: the server refused, failed or was not reached, or sent something else.
        """
        return self._told_json(path, self._answer("GET", path, None, ANSWER_BYTES))

    def text(self, path: str) -> str:
        """Return the text at a path.

        Raises:
            EndpointError: the server refused, failed or was not reached.
        """
        return self._answer("GET", path, None, ANSWER_BYTES).decode(errors="replace")

    def post(self, path: str, body: Any, *, most: int = ANSWER_BYTES) -> Any:
        """Send JSON and return the JSON that is the answer, of at most `most` bytes.

        Raises:
            EndpointError: the server refused, failed or was not reached, or sent something else.
        """
        return self._told_json(path, self._answer("POST", path, body, most))

    def events(self, path: str, body: Any) -> Iterator[Any]:
        """Send JSON and yield the JSON of each event of a stream, in the order of its arrival.

        Raises:
            EndpointError: as for `post`, or the stream breaks off before its end.
        """
        with self._opened("POST", path, body) as exchange:
            for line in self._lines(path, exchange):
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()  # the space before it may be left out
                if data == _END:
                    return
                event = self._json(path, data.encode())
                if isinstance(event, dict) and event.get("error"):
                    raise self._error(path, f"broke off: {self._told(event, data)}")
                yield event
        raise self._error(path, "a stream that ends early", expected=f"data: {_END}")

    # --- requests

    def _answer(self, method: str, path: str, body: Any, most: int) -> bytes:
        content = bytearray()
        with self._opened(method, path, body) as exchange:
            for piece in self._pieces(path, exchange):
                content += piece
                if len(content) > most:
                    raise self._error(path, f"an answer of more than {most} bytes")
        return bytes(content)

    @contextmanager
    def _opened(self, method: str, path: str, body: Any) -> Iterator[_Exchange]:
        exchange = self._patiently(method, path, body)
        try:
            yield exchange
        finally:
            exchange.leave()

    def _patiently(self, method: str, path: str, body: Any) -> _Exchange:
        """Return an opened answer that is no error."""
        pause = self.bounds.pause
        for number in range(self.bounds.retries, -1, -1):
            left = max(0, min(number, self._left))
            exchange = self._sent(method, path, body)
            try:
                response = exchange.response()
            except httpx2.ConnectError as error:
                if not left:
                    raise self._unreached(error) from error
                wait = pause
            except httpx2.HTTPError as error:
                raise self._lost(path, error) from error
            except (httpx2.InvalidURL, OSError, ValueError) as error:
                raise self._unreached(error) from error
            else:
                if response.status_code not in _BUSY:
                    self._left = self.bounds.patience
                    self._check(path, response, exchange)
                    return exchange
                exchange.leave()
                wait = self._asked_wait(path, response, pause, left)
            self._left -= 1
            time.sleep(wait)
            pause *= 2
        raise AssertionError  # the last round returns or raises

    def _sent(self, method: str, path: str, body: Any) -> _Exchange:
        seconds = self.bounds.seconds
        timeout = httpx2.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS))
        content = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"} if content is not None else None
        try:
            request = self._http.build_request(
                method,
                f"{self.endpoint.url}{path}",
                content=content,
                headers=headers,
                timeout=timeout,
            )
        except (httpx2.InvalidURL, ValueError) as error:
            raise self._unreached(error) from error
        return _Exchange(self._http, request, seconds)

    def _asked_wait(self, path: str, response: httpx2.Response, pause: float, left: int) -> float:
        """Return how long a busy server asks to wait."""
        status = response.status_code
        asked = _seconds(response.headers.get("retry-after", ""))
        wait = pause if asked is None else asked
        if not left or wait > self.bounds.wait:
            told = f", and asks to wait for {wait:.0f} s" if wait > self.bounds.wait else ""
            raise self._error(path, f"is busy (HTTP {status}){told}", hint="try again later")
        return max(wait, 0.0)

    def _check(self, path: str, response: httpx2.Response, exchange: _Exchange) -> None:
        """Raise what an answer's status says; nothing if that is no error."""
        status = response.status_code
        if status < _FIRST_REDIRECT:
            return
        if response.has_redirect_location or status < _FIRST_ERROR:
            exchange.leave()
            hint = "give the address where the server is"
            raise self._error(path, f"redirects (HTTP {status})", hint=hint, status=status)
        content = bytearray()
        try:
            for piece in self._pieces(path, exchange):
                content += piece[: _ERROR_BYTES - len(content)]
                if len(content) >= _ERROR_BYTES:
                    break
        except EndpointError:
            content.clear()  # the status tells enough
        finally:
            exchange.leave()
        hint = f"give the key in {KEY_VARIABLE}, or --api-key-env" if status in (401, 403) else ""
        told = self._message(bytes(content))
        found = f"HTTP {status}" + (f" ({told})" if told else "")
        raise self._error(path, found, hint=hint, status=status)

    # --- bodies

    def _pieces(self, path: str, exchange: _Exchange) -> Iterator[bytes]:
        try:
            yield from exchange.pieces()
        except (httpx2.HTTPError, httpx2.StreamError, OSError) as error:
            raise self._lost(path, error) from error

    def _lines(self, path: str, exchange: _Exchange) -> Iterator[str]:
        rest, total = b"", 0
        for piece in self._pieces(path, exchange):
            total += len(piece)
            *whole, rest = (rest + piece).split(b"\n")
            if total > ANSWER_BYTES:
                raise self._error(path, f"a stream of more than {ANSWER_BYTES} bytes")
            if len(rest) > _LINE_BYTES:
                raise self._error(path, f"a stream with a line of more than {_LINE_BYTES} bytes")
            yield from (line.decode(errors="replace").rstrip("\r") for line in whole)
        yield rest.decode(errors="replace")

    def _told_json(self, path: str, content: bytes) -> Any:
        """Parse an answer; what stands before a server may send its errors with HTTP 200."""
        answer = self._json(path, content)
        if isinstance(answer, dict) and answer.get("error"):
            told = self._message(content)
            raise self._error(path, f"an error in place of an answer ({told})", status=200)
        return answer

    def _json(self, path: str, content: bytes) -> Any:
        try:
            return parsed(content)
        except ValueError as error:
            told = self._shown(content.decode(errors="replace").strip())
            raise self._error(path, f"not JSON: {told!r}") from error

    # --- errors

    def _message(self, content: bytes) -> str:
        """Return what an error's body says."""
        text = content.decode(errors="replace").strip()
        try:
            return self._told(parsed(content), text)
        except ValueError:
            return self._shown(text)

    def _told(self, body: Any, whole: str) -> str:
        places = (("error", "message"), ("error",), ("message",), ("detail",))
        texts = (text_in(body, *place) for place in places)
        return self._shown(next((text for text in texts if text), whole))

    def _shown(self, text: str) -> str:
        return shown(" ".join(text[: 8 * _SHOWN].split()), _SHOWN)

    def _error(
        self, path: str, found: str, *, expected: str = "", hint: str = "", status: int = 0
    ) -> EndpointError:
        error = EndpointError(f"{self.endpoint.url}{path}", found, expected=expected, hint=hint)
        error.status = status
        return error

    def _slow(self, path: str) -> EndpointError:
        return self._error(path, f"no whole answer within {self.bounds.seconds:g} s")

    def _unreached(self, error: Exception) -> EndpointError:
        found = f"cannot be reached ({self._shown(str(error)) or type(error).__name__})"
        return EndpointError(self.endpoint.url, found, hint="is the server running there?")

    def _lost(self, path: str, error: Exception) -> EndpointError:
        if isinstance(error, httpx2.TimeoutException):
            return self._slow(path)
        return self._error(path, f"the answer broke off ({type(error).__name__})")


def _seconds(text: str) -> float | None:
    """Return the seconds of a Retry-After: a number, or a date."""
    try:
        return float(int(text))
    except OverflowError:
        return float("inf")
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - datetime.now(UTC)).total_seconds()


class _NoCookies(CookieJar):
    """Keeps no cookies."""

    def extract_cookies(self, response: Any, request: Any) -> None:
        """Do nothing."""


def _certificates(endpoint: Endpoint) -> ssl.SSLContext | bool:
    """Return what to trust: the usual authorities, or those in SSL_CERT_FILE and SSL_CERT_DIR."""
    if not endpoint.url.startswith("https:"):
        return False  # reading them takes longer than a request, and nothing needs them
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if not file and not folder:
        return True
    try:
        return ssl.create_default_context(cafile=file or None, capath=folder or None)
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        subject = "SSL_CERT_FILE" if file else "SSL_CERT_DIR"
        found = f"no certificates can be read there ({type(error).__name__})"
        raise UsageError(subject, found, hint="correct it, or unset it") from error


class _Exchange:
    """A request in a thread of its own, which is left alone when the time is over.

    The timeouts of the HTTP client hold for each piece of headers and body, not for all of them.

    Args:
        http: the client.
        request: what to send.
        seconds: until the end of the answer.
    """

    def __init__(self, http: httpx2.Client, request: httpx2.Request, seconds: float) -> None:
        self._http, self._request = http, request
        self._deadline = time.monotonic() + seconds
        self._came: queue.Queue[Any] = queue.Queue(_WAITING)
        self._abandoned = threading.Event()
        detached(self._work)

    def response(self) -> httpx2.Response:
        """Return status and headers."""
        response: httpx2.Response = self._next()
        return response

    def pieces(self) -> Iterator[bytes]:
        """Yield the body."""
        while (piece := self._next()) is not None:
            yield piece

    def leave(self) -> None:
        """Let the thread end: nobody wants the rest."""
        self._abandoned.set()

    def _next(self) -> Any:
        try:
            item = self._came.get(timeout=max(0.0, self._deadline - time.monotonic()))
        except queue.Empty:
            self.leave()
            raise httpx2.ReadTimeout("the answer came too slowly") from None
        if isinstance(item, BaseException):
            raise item
        return item

    def _work(self) -> None:
        try:
            response = self._http.send(self._request, stream=True)
            try:
                self._put(response)
                for piece in response.iter_raw():
                    if not self._put(piece):
                        return
            finally:
                self._close(response)
        except BaseException as error:  # noqa: BLE001 - raised by `_next`, in the caller's thread
            self._put(error)
        else:
            self._put(None)

    def _close(self, response: httpx2.Response) -> None:
        response.close()
        if self._http.is_closed:  # it closed what was connected, and this may have been under way
            response.extensions["network_stream"].close()

    def _put(self, item: Any) -> bool:
        """Hand something over; return whether anybody waits for it."""
        while not self._abandoned.is_set():
            try:
                self._came.put(item, timeout=_LOOK_SECONDS)
            except queue.Full:
                continue
            return True
        return False
