"""Requests to a server of models, each with bounds on time, bytes and repetitions.

- The key goes to the endpoint's address alone: redirects are refused.
- An answer ends within `Bounds.seconds`, whatever the server sends meanwhile, and is no longer than
  the request allows. A server that is busy (429, 503) is asked again after its ``Retry-After``, a
  few times and for a few minutes at most; so is one that does not accept the connection.
- What is shown of an answer is cut, made printable, and never holds the key.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2

from qwen35.closing import Closing
from qwen35.display import cut, printable
from qwen35.errors import EndpointError
from qwen35.serving.endpoint import KEY_VARIABLE, Endpoint
from qwen35.serving.json_values import parsed, text_in
from qwen35.threads import detached
from qwen35.version import __version__

__all__ = ["ANSWER_BYTES", "Bounds", "ServerClient"]

_T = TypeVar("_T")

ANSWER_BYTES = 16 * 2**20
_ERROR_BYTES = 64 * 2**10
_LINE_BYTES = 2**20
_CONNECT_SECONDS = 10.0
_BUSY = (429, 503)
_FIRST_REDIRECT, _FIRST_ERROR = 300, 400
_SHOWN = 200
_DONE = "[DONE]"
_END = "data: [DONE]"


@dataclass(frozen=True)
class Bounds:
    """How patient a client is.

    Args:
        seconds: for a whole answer.
        retries: repetitions of a request to a busy or unreachable server.
        pause: seconds before the first repetition; each other one waits twice as long.
        wait: the longest time in seconds that a server may ask to wait for.
    """

    seconds: float = 600.0
    retries: int = 4
    pause: float = 0.5
    wait: float = 60.0


class ServerClient(Closing):
    """Talks to one server; may be used by several threads.

    Args:
        endpoint: its address and key.
        bounds: how patient to be.
    """

    def __init__(self, endpoint: Endpoint, bounds: Bounds | None = None) -> None:
        self.endpoint, self.bounds = endpoint, bounds or Bounds()
        headers = {"user-agent": f"qwen35/{__version__}", "accept-encoding": "identity"}
        if endpoint.key:
            headers["authorization"] = f"Bearer {endpoint.key}"
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        # Reading the certificates takes longer than a request; without TLS nothing needs them.
        encrypted = endpoint.url.startswith("https:")
        self._http = httpx2.Client(
            headers=headers, follow_redirects=False, limits=limits, verify=encrypted
        )

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def hidden(self, text: str) -> str:
        """Return a text of the server without the key, should it hold that."""
        key = self.endpoint.key
        return text.replace(key, "***") if key else text

    def get(self, path: str) -> Any:
        """Return the JSON at a path.

        Raises:
            EndpointError: the server refused, failed or was not reached, or sent something else.
        """
        return self._json(path, self._answer("GET", path, None, ANSWER_BYTES))

    def text(self, path: str) -> str:
        """Return the text at a path.

        Raises:
            EndpointError: the server refused, failed or was not reached.
        """
        return self.hidden(self._answer("GET", path, None, ANSWER_BYTES).decode(errors="replace"))

    def post(self, path: str, body: Any, *, most: int = ANSWER_BYTES) -> Any:
        """Send JSON and return the JSON that is the answer, of at most `most` bytes.

        Raises:
            EndpointError: the server refused, failed or was not reached, or sent something else.
        """
        return self._json(path, self._answer("POST", path, body, most))

    def events(self, path: str, body: Any) -> Iterator[Any]:
        """Send JSON and yield the JSON of each event of a stream, in the order of its arrival.

        Raises:
            EndpointError: as for `post`, or the stream breaks off before its end.
        """
        with self._opened("POST", path, body) as (response, deadline):
            for line in self._lines(path, response, deadline):
                if line.startswith(_END):
                    return
                if line.startswith("data:"):
                    event = self._json(path, line[5:].encode())
                    if isinstance(event, dict) and event.get("error"):
                        raise self._error(path, f"broke off: {self._told(event)}")
                    yield event
        raise self._error(path, "a stream that ends early", expected=_END)

    # --- requests

    def _answer(self, method: str, path: str, body: Any, most: int) -> bytes:
        content = bytearray()
        with self._opened(method, path, body) as (response, deadline):
            for piece in self._pieces(path, response, deadline):
                content += piece
                if len(content) > most:
                    raise self._error(path, f"an answer of more than {most} bytes")
        return bytes(content)

    @contextmanager
    def _opened(self, method: str, path: str, body: Any) -> Iterator[tuple[httpx2.Response, float]]:
        response, deadline = self._patiently(method, path, body)
        try:
            yield response, deadline
        finally:
            response.close()

    def _patiently(self, method: str, path: str, body: Any) -> tuple[httpx2.Response, float]:
        """Return an opened answer that is no error, and the time by which it must end."""
        pause = self.bounds.pause
        for left in range(self.bounds.retries, -1, -1):
            deadline = time.monotonic() + self.bounds.seconds
            try:
                response = self._send(method, path, body)
            except httpx2.ConnectError as error:
                if not left:
                    raise self._unreached(error) from error
                wait = pause
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                raise self._lost(path, error) from error
            else:
                if response.status_code not in _BUSY:
                    return self._checked(path, response, deadline), deadline
                wait = self._asked_wait(path, response, pause, left)
            time.sleep(wait)
            pause *= 2
        raise AssertionError  # the last round returns or raises

    def _send(self, method: str, path: str, body: Any) -> httpx2.Response:
        seconds = self.bounds.seconds
        timeout = httpx2.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS))
        content = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"} if content is not None else None
        request = self._http.build_request(
            method, f"{self.endpoint.url}{path}", content=content, headers=headers, timeout=timeout
        )
        return _within(seconds, lambda: self._http.send(request, stream=True))

    def _asked_wait(self, path: str, response: httpx2.Response, pause: float, left: int) -> float:
        """Return how long a busy server asks to wait."""
        status = response.status_code
        asked = _seconds(response.headers.get("retry-after", ""))
        response.close()
        wait = pause if asked is None else asked
        if not left or wait > self.bounds.wait:
            told = f", and asks to wait for {wait:.0f} s" if wait > self.bounds.wait else ""
            raise self._error(path, f"is busy (HTTP {status}){told}", hint="try again later")
        return max(wait, 0.0)

    def _checked(self, path: str, response: httpx2.Response, deadline: float) -> httpx2.Response:
        status = response.status_code
        if response.has_redirect_location or _FIRST_REDIRECT <= status < _FIRST_ERROR:
            response.close()
            hint = "give the address where the server is"
            raise self._error(path, f"redirects (HTTP {status})", hint=hint, status=status)
        if status < _FIRST_ERROR:
            return response
        content = bytearray()
        try:
            for piece in self._pieces(path, response, deadline):
                content += piece[: _ERROR_BYTES - len(content)]
                if len(content) >= _ERROR_BYTES:
                    break
        except EndpointError:
            content.clear()  # the status tells enough
        finally:
            response.close()
        hint = f"give the key in {KEY_VARIABLE}, or --api-key-env" if status in (401, 403) else ""
        told = self._message(bytes(content))
        found = f"HTTP {status}" + (f" ({told})" if told else "")
        raise self._error(path, found, hint=hint, status=status)

    # --- bodies

    def _pieces(self, path: str, response: httpx2.Response, deadline: float) -> Iterator[bytes]:
        try:
            for piece in response.iter_raw():
                if time.monotonic() > deadline:
                    raise self._slow(path)
                yield piece
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            raise self._lost(path, error) from error

    def _lines(self, path: str, response: httpx2.Response, deadline: float) -> Iterator[str]:
        rest, total = b"", 0
        try:
            for piece in response.iter_raw():
                if time.monotonic() > deadline:
                    raise self._slow(path)
                total += len(piece)
                *whole, rest = (rest + piece).split(b"\n")
                if total > ANSWER_BYTES or len(rest) > _LINE_BYTES:
                    raise self._error(path, f"a stream of more than {ANSWER_BYTES} bytes")
                yield from (line.decode(errors="replace").rstrip("\r") for line in whole)
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            raise self._lost(path, error) from error
        yield rest.decode(errors="replace")

    def _json(self, path: str, content: bytes) -> Any:
        try:
            return self._without_key(parsed(content))
        except ValueError as error:
            shown = self._shown(content.decode(errors="replace").strip())
            raise self._error(path, f"not JSON: {shown!r}") from error

    def _without_key(self, value: Any) -> Any:
        """Return JSON without the key in any text."""
        if not self.endpoint.key:
            return value
        if isinstance(value, str):
            return self.hidden(value)
        if isinstance(value, list):
            return [self._without_key(one) for one in value]
        if isinstance(value, dict):
            return {self.hidden(k): self._without_key(one) for k, one in value.items()}
        return value

    # --- errors

    def _message(self, content: bytes) -> str:
        """Return what an error's body says."""
        try:
            return self._told(parsed(content))
        except ValueError:
            return self._shown(content.decode(errors="replace").strip())

    def _told(self, body: Any) -> str:
        places = (("error", "message"), ("error",), ("message",), ("detail",))
        texts = (text_in(body, *place) for place in places)
        return self._shown(next((text for text in texts if text), json.dumps(body)))

    def _shown(self, text: str) -> str:
        return cut(printable(" ".join(self.hidden(text).split())[: 8 * _SHOWN]), _SHOWN)

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


def _within(seconds: float, call: Callable[[], _T]) -> _T:
    """Run `call` in a thread that is left alone when the time is over.

    The timeouts of the client hold for each piece of the headers, not for all of them.
    """
    answer = detached(call)
    if not wait([answer], seconds).done:
        raise httpx2.ReadTimeout("the headers came too slowly")
    return answer.result()
