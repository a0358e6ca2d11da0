"""The page as an ASGI application, and who may use it."""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen35.display import printable
from qwen35.errors import Qwen35Error
from qwen35.threads import detached
from qwen35.ui.jobs import Jobs
from qwen35.ui.page_content import page_html
from qwen35.ui.previews import preview, report_page

__all__ = ["web_app"]

T = TypeVar("T")

MOST_BYTES = 2**16
"""Of a request's body, far above real ones."""

_MOST_PAGES = 8
_PAGES = "/pages/"
_HEADERS = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_CLOSED = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors "
_REPORT_POLICY = "sandbox allow-scripts; frame-ancestors 'self'"
"""For a report, which has a policy of its own: it reaches nothing, and is of no origin."""


def web_app(jobs: Jobs, token: str, port: int) -> ASGIApp:
    """Return the application, which answers only at its own address and with the token."""
    face = _Face(jobs)
    routes = [
        Route("/", face.page),
        Route("/preview", face.preview, methods=["POST"]),
        Route("/jobs", face.start, methods=["POST"]),
        Route("/jobs/{number}/{what}", face.change, methods=["POST"]),
        Route("/events", face.events),
        Route("/report", face.report, methods=["POST"]),
        Route(f"{_PAGES}{{name}}", face.report_page),
    ]
    handlers: dict[Any, Any] = {
        Qwen35Error: _sentence,
        HTTPException: _refusal,
        Exception: _bug,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return _Guarded(app, token, port)


class _Guarded:
    """Lets through what comes from our own page, and nothing else.

    Host is checked because a name of somebody else's may resolve to 127.0.0.1 (DNS rebinding),
    Origin because any page may send requests there.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app = app
        self._token = token.encode()
        self._hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        if port == 80:
            self._hosts |= {"127.0.0.1", "localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        assert scope["type"] == "http", scope["type"]
        request = Request(scope)
        refused = self._refusal(request)

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = dict(message["headers"])
                more = _HEADERS | {"content-security-policy": f"{_CLOSED}'none'"}
                added = [(k.encode(), v.encode()) for k, v in more.items()]
                message["headers"] += [row for row in added if row[0] not in given]
            await send(message)

        app = self._app if refused is None else _error(403, refused)
        await app(scope, receive, sent)

    def _refusal(self, request: Request) -> str | None:
        headers = request.headers
        if headers.getlist("host") not in [[host] for host in self._hosts]:
            return "Host: not the address that qwen35 ui printed"
        origins = [f"http://{headers['host']}"]
        if headers.getlist("origin") not in ([], origins):
            return "Origin: another page's"
        path, site = request.url.path, headers.get("sec-fetch-site", "same-origin")
        if path != "/" and site not in ("same-origin", "none"):
            return "Sec-Fetch-Site: another page's"
        if path.startswith(_PAGES):
            return None  # its name is a secret of its own
        if not hmac.compare_digest(_token_of(request), self._token):
            return "token: missing or wrong; open the address that qwen35 ui printed"
        return None


def _token_of(request: Request) -> bytes:
    """Return the token: of the address for the page itself, else of a header that no form has."""
    if request.url.path == "/":
        return request.query_params.get("token", "").encode("utf-8", "replace")
    return request.headers.get("authorization", "").removeprefix("Bearer ").encode()


class _Face:
    """Answers requests; each is one call of the API, or of a job."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._pages: dict[str, str] = {}
        self._drawing = asyncio.Lock()

    async def page(self, _: Request) -> Response:
        html, policy = await _beside(page_html)
        content = f"{_CLOSED}'none'; connect-src 'self'; img-src data:; frame-src 'self'; {policy}"
        return HTMLResponse(html, headers={"content-security-policy": content})

    async def preview(self, request: Request) -> Response:
        body = await _body(request)
        shown = await _beside(lambda: preview(body.get("action"), body.get("values")))
        return JSONResponse(shown)

    async def start(self, request: Request) -> Response:
        body = await _body(request)
        job = await self._jobs.start(body.get("action"), body.get("values"))
        return JSONResponse({"number": job.number})

    async def change(self, request: Request) -> Response:
        await _body(request)
        number, what = _number(request.path_params["number"]), request.path_params["what"]
        if what == "cancel":
            await self._jobs.cancel(number)
        elif what == "apply":
            number = (await self._jobs.apply(number)).number
        else:
            raise HTTPException(404)
        return JSONResponse({"number": number})

    async def events(self, _: Request) -> Response:
        async def stream() -> AsyncIterator[str]:
            async for state in self._jobs.states():
                yield f"data: {json.dumps(state)}\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    async def report(self, request: Request) -> Response:
        body = await _body(request)
        async with self._drawing:  # Matplotlib draws in one thread at a time
            html = await _beside(lambda: report_page(body.get("values")))
        name = secrets.token_urlsafe(24)
        self._pages[name] = html
        for old in list(self._pages)[:-_MOST_PAGES]:
            del self._pages[old]
        return JSONResponse({"page": f"{_PAGES}{name}"})

    async def report_page(self, request: Request) -> Response:
        html = self._pages.get(request.path_params["name"])
        if html is None:
            raise HTTPException(404)
        return HTMLResponse(html, headers={"content-security-policy": _REPORT_POLICY})


def _number(text: str) -> int:
    """Return the number of a job; no job has one of many digits."""
    if not (text.isascii() and text.isdecimal() and len(text) < 100):
        raise HTTPException(404)
    return int(text)


async def _beside(work: Callable[[], T]) -> T:
    """Return the result of `work`, done in a thread, which the end of the server leaves alone."""
    return await asyncio.shield(asyncio.wrap_future(detached(work)))


async def _body(request: Request) -> dict[str, Any]:
    """Return the object that a request holds; it may be anything, of any length."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "the body: not application/json")
    data = b""
    async for piece in request.stream():
        data += piece
        if len(data) > MOST_BYTES:
            raise HTTPException(413, f"the body: more than {MOST_BYTES} bytes")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body: not JSON") from error
    if not isinstance(value, dict):
        raise HTTPException(400, f"the body: of type {type(value).__name__}, expected an object")
    return value


def _error(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status)


async def _sentence(_: Request, error: Exception) -> Response:
    return _error(422, printable(str(error)))


async def _refusal(_: Request, error: HTTPException) -> Response:
    return _error(error.status_code, error.detail)


async def _bug(_: Request, error: Exception) -> Response:
    return _error(500, f"{type(error).__name__}: a bug; the terminal of qwen35 ui has the details")
