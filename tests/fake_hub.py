"""A read-only Hub on this machine, enough of it for the real client to list, read and download.

It encodes what the client (huggingface_hub 2.4) sends and accepts: model info, tree, resolve with
ranges, and errors told by the ``X-Error-Code`` header. It counts what it sends.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["COMMIT", "FakeHub", "Request", "serving"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Request:
    """One request that came in, and how it was answered."""

    method: str
    path: str
    range: str | None
    token: str | None
    status: int
    sent: int


@dataclass
class FakeHub:
    """What the server holds and how it behaves.

    Args:
        repos: repository to the folder with its files.
        refs: branch or tag to commit.
        gated: repositories that need a token.
        token: the token that opens them.
        ignore_ranges: send whole files whatever is asked.
        broken: beginnings of paths to answer with this status.
        requests: what was asked, in order.
        url: where it listens.
    """

    repos: dict[str, Path]
    refs: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "v1": COMMIT})
    gated: set[str] = field(default_factory=set)
    token: str = "hf_opensesame"
    ignore_ranges: bool = False
    broken: dict[str, int] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def sent(self, part: str = "/resolve/") -> int:
        """Return the bytes of content sent for paths that contain `part`."""
        return sum(r.sent for r in self.requests if part in r.path and r.method == "GET")

    def commit_of(self, revision: str) -> str | None:
        """Return the commit that a revision names."""
        return revision if revision in self.refs.values() else self.refs.get(revision)


@dataclass(frozen=True)
class _Reply:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def _json(value: Any) -> _Reply:
    return _Reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _error(status: int, code: str, **headers: str) -> _Reply:
    body = json.dumps({"error": code}).encode()
    return _Reply(status, body, {"X-Error-Code": code, "X-Error-Message": code, **headers})


_API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<verb>revision|tree)/(?P<rev>[^/]+))?/?\Z"
)
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)\Z")


def _answer(hub: FakeHub, path: str, asked: str | None, token: str | None) -> _Reply:
    """Answer a request."""
    for prefix, status in hub.broken.items():
        if path.startswith(prefix):
            return _Reply(status)
    match = _API.match(path) or _RESOLVE.match(path)
    if match is None:
        return _Reply(404)
    repo, revision = match["repo"], unquote(match["rev"] or "main")
    if repo not in hub.repos:
        return _error(401 if token is None else 404, "RepoNotFound")
    closed = repo in hub.gated and token != f"Bearer {hub.token}"
    if closed and match.re is _RESOLVE:
        return _error(403, "GatedRepo")
    commit = hub.commit_of(revision)
    if commit is None:
        return _error(404, "RevisionNotFound")
    if match.re is _RESOLVE:
        return _file(hub, hub.repos[repo], match["path"], commit, asked)
    files = sorted(p for p in hub.repos[repo].iterdir() if p.is_file())
    if match["verb"] == "tree":
        return _json([_entry(path) for path in files])
    siblings = [{"rfilename": path.name} for path in files]
    return _json({"id": repo, "sha": commit, "siblings": siblings, "private": False})


def _entry(path: Path) -> dict[str, Any]:
    oid = hashlib.sha1(path.name.encode()).hexdigest()
    return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": oid}


def _file(hub: FakeHub, folder: Path, name: str, commit: str, asked: str | None) -> _Reply:
    path = folder / unquote(name)
    headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    if not path.is_file():
        return _error(404, "EntryNotFound", **headers)
    body = path.read_bytes()
    headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()[:40]}"'
    found = re.match(r"bytes=(\d+)-(\d*)\Z", asked or "")
    if found is None or hub.ignore_ranges:
        return _Reply(200, body, headers)
    first, last = int(found[1]), int(found[2] or len(body) - 1)
    if first >= len(body):
        return _Reply(416, b"", headers)
    part = body[first : last + 1]
    headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(body)}"
    return _Reply(206, part, headers)


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve `hub` on a free port while the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            asked, token = self.headers.get("Range"), self.headers.get("Authorization")
            reply = _answer(hub, path, asked, token)
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            body = reply.body if self.command == "GET" else b""
            hub.requests.append(Request(self.command, path, asked, token, reply.status, len(body)))
            self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: Any) -> None:
            """A client that hangs up early is no error."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
