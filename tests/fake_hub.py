"""A Hub on this machine, enough of it for the real client to list, read, upload and commit.

It encodes what the client (huggingface_hub 2.4) sends and accepts: model info, tree with pages,
resolve with ranges, repository creation, preupload, LFS batch and transfer, commits, and errors
told by the ``X-Error-Code`` header. It counts what it sends, and misbehaves when told to.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from hub_store import COMMIT, Blob, ConflictError, MissingError, Repo, is_large

__all__ = ["COMMIT", "FakeHub", "Fault", "Repo", "Request", "serving"]

_DRIP_SECONDS = 60.0


@dataclass(frozen=True)
class Request:
    """One request that came in, and how it was answered."""

    method: str
    path: str
    range: str | None
    token: str | None
    status: int
    sent: int
    received: int = 0


@dataclass
class Fault:
    """A way to misbehave.

    Args:
        path: beginning of the paths it is for, or a part of them that begins with ``*``.
        method: requests it is for; all if empty.
        status: answer with this instead.
        drop: close the connection ``before`` the request is carried out, or ``after``.
        hook: called before the request is carried out.
        corrupt: flip a bit of the body.
        cut: close the connection after this many bytes of the body.
        slow: seconds to wait in the middle of the body.
        headers: of the answer, added or replaced; left out if None.
        body: instead of the answer's.
        make: makes that body of the request's.
        drip: an endless body made of this.
        pause: seconds between its pieces.
        skip: leave so many requests alone first.
        times: how often.
    """

    path: str
    method: str = ""
    status: int = 0
    drop: str = ""
    hook: Callable[[], object] | None = None
    corrupt: bool = False
    cut: int = -1
    slow: float = 0.0
    headers: Mapping[str, str | None] = field(default_factory=dict)
    body: bytes | None = None
    make: Callable[[bytes], bytes] | None = None
    drip: bytes = b""
    pause: float = 0.0
    skip: int = 0
    times: int = 1

    def meets(self, method: str, path: str) -> bool:
        """Whether it is for this request; counts it."""
        part = self.path.removeprefix("*")
        found = part in path if self.path.startswith("*") else path.startswith(part)
        if not found or (self.method and method not in self.method.split()):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return self.times >= 0

    def applied(self, reply: _Reply, asked: bytes) -> _Reply:
        """Return the answer as this spoils it."""
        headers = {**reply.headers, **self.headers}
        body = reply.body if self.body is None else self.body
        body = self.make(asked) if self.make else body
        return _Reply(reply.status, body, {n: v for n, v in headers.items() if v is not None})


@dataclass
class FakeHub:
    """What the server holds and how it behaves.

    Args:
        repos: the repositories by name.
        folder: where the objects of new repositories go.
        gated: repositories that need a token.
        token: the token that opens them, and that may write.
        ignore_ranges: send whole files whatever is asked.
        page: entries of a listing in one answer.
        tracks: whether a commit of a new kind of LFS file changes .gitattributes, as on the Hub.
        faults: ways to misbehave, the first that meets a request counts.
        requests: what was asked, in order.
        url: where it listens.
    """

    repos: dict[str, Repo]
    folder: Path | None = None
    gated: set[str] = field(default_factory=set)
    token: str = "hf_opensesame"
    ignore_ranges: bool = False
    page: int = 1000
    tracks: bool = True
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    url: str = ""
    lock: Any = field(default_factory=threading.Lock)

    def sent(self, part: str = "/resolve/") -> int:
        """Return the bytes of content sent for paths that contain `part`."""
        return sum(r.sent for r in self.requests if part in r.path and r.method == "GET")

    def asked(self, method: str, part: str) -> list[Request]:
        """Return the requests of a method to paths that contain `part`."""
        return [r for r in self.requests if r.method == method and part in r.path]


@dataclass(frozen=True)
class _Reply:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Asked:
    """A request as it came in."""

    hub: FakeHub
    method: str
    path: str
    query: dict[str, list[str]]
    range: str | None
    token: str | None
    body: bytes

    @property
    def trusted(self) -> bool:
        return self.token == f"Bearer {self.hub.token}"

    def json(self) -> Any:
        return json.loads(self.body)


def _json(value: Any, **headers: str) -> _Reply:
    body = json.dumps(value).encode()
    return _Reply(200, body, {"Content-Type": "application/json", **headers})


def _error(status: int, code: str, **headers: str) -> _Reply:
    body = json.dumps({"error": code}).encode()
    return _Reply(status, body, {"X-Error-Code": code, "X-Error-Message": code, **headers})


def _answer(asked: _Asked) -> _Reply:
    """Answer a request."""
    for pattern, method, handler in _ROUTES:
        match = pattern.match(asked.path)
        if match is None or method != ("GET" if asked.method == "HEAD" else asked.method):
            continue
        if method != "GET" and handler is not _put and not asked.trusted:
            return _Reply(401, b'{"error": "Invalid username or password."}')
        if "repo" not in match.groupdict():
            return handler(asked, match)
        return _in_repo(asked, match, handler)
    return _Reply(404)


def _in_repo(asked: _Asked, match: re.Match[str], handler: Callable[..., _Reply]) -> _Reply:
    hub, name = asked.hub, match["repo"]
    repo = hub.repos.get(name)
    if repo is None or (repo.private and not asked.trusted and handler is not _put):
        return _error(401 if asked.token is None else 404, "RepoNotFound")
    if name in hub.gated and not asked.trusted and handler is _file:
        return _error(403, "GatedRepo")
    revision = unquote(match.groupdict().get("rev") or "main")
    commit = repo.commit_of(revision)
    if commit is None:
        return _error(404, "RevisionNotFound")
    return handler(asked, match, repo, commit)


def _info(asked: _Asked, match: re.Match[str], repo: Repo, commit: str) -> _Reply:
    siblings = [{"rfilename": path} for path in repo.commits.get(commit, {})]
    value = {"id": match["repo"], "sha": commit, "siblings": siblings, "private": repo.private}
    return _json(value)


def _tree(asked: _Asked, match: re.Match[str], repo: Repo, commit: str) -> _Reply:
    files = repo.commits[commit]
    entries = [blob.entry(path) for path, blob in files.items() if "/" not in path]
    folders = sorted({path.split("/")[0] for path in files if "/" in path})
    entries += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]
    if asked.query.get("recursive", [""])[0].lower() == "true":
        entries += [blob.entry(path) for path, blob in files.items() if "/" in path]
    start = int(asked.query.get("cursor", ["0"])[0])
    end = start + asked.hub.page
    if end >= len(entries):
        return _json(entries[start:])
    query = f"cursor={end}&recursive={asked.query.get('recursive', ['False'])[0]}"
    return _json(entries[start:end], Link=f'<{asked.hub.url}{asked.path}?{query}>; rel="next"')


def _paths_info(asked: _Asked, match: re.Match[str], repo: Repo, commit: str) -> _Reply:
    names = parse_qs(asked.body.decode()).get("paths", [])
    files = repo.commits[commit]
    return _json([files[name].entry(name) for name in names if name in files])


def _file(asked: _Asked, match: re.Match[str], repo: Repo, commit: str) -> _Reply:
    blob = repo.commits.get(commit, {}).get(unquote(match["path"]))
    headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    if blob is None:
        return _error(404, "EntryNotFound", **headers)
    body = blob.path.read_bytes()
    headers["ETag"] = f'"{blob.sha256 if blob.lfs else blob.sha1}"'
    if blob.lfs:
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(blob.size)}
    found = re.match(r"bytes=(\d+)-(\d*)\Z", asked.range or "")
    if found is None or asked.hub.ignore_ranges:
        return _Reply(200, body, headers)
    first, last = int(found[1]), int(found[2] or len(body) - 1)
    if first >= len(body):
        return _Reply(416, b"", headers)
    part = body[first : last + 1]
    headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(body)}"
    return _Reply(206, part, headers)


def _create(asked: _Asked, match: re.Match[str]) -> _Reply:
    value, hub = asked.json(), asked.hub
    name = f"{value['organization'] or 'owner'}/{value['name']}"
    body = json.dumps({"url": f"{hub.url}/{name}"}).encode()
    if name in hub.repos:
        return _Reply(409, body)
    assert hub.folder is not None
    folder = hub.folder / name.replace("/", "--")
    hub.repos[name] = Repo.create(folder, private=value.get("visibility") == "private")
    return _Reply(200, body)


def _preupload(asked: _Asked, match: re.Match[str], repo: Repo, commit: str) -> _Reply:
    ignored = asked.json().get("gitIgnore")
    if ignored is None and ".gitignore" in repo.files:
        ignored = repo.read(".gitignore").decode()
    rows = []
    for file in asked.json()["files"]:
        name, known = file["path"], repo.files.get(file["path"])
        mode = "lfs" if is_large(name, file["size"]) else "regular"
        oid = (known.sha256 if known.lfs else known.sha1) if known else None
        ignore = name in (ignored or "").split()
        rows.append({"path": name, "uploadMode": mode, "shouldIgnore": ignore, "oid": oid})
    return _json({"files": rows})


def _batch(asked: _Asked, match: re.Match[str], repo: Repo, commit: str) -> _Reply:
    objects = []
    for row in asked.json()["objects"]:
        target = f"{asked.hub.url}/_lfs/{match['repo']}/{row['oid']}"
        actions = {"upload": {"href": target}, "verify": {"href": f"{target}/verify"}}
        done = repo.has_object(row["oid"])
        objects.append(row if done else {**row, "actions": actions})
    return _json({"transfer": "basic", "objects": objects})


def _put(asked: _Asked, match: re.Match[str], repo: Repo, commit: str) -> _Reply:
    if hashlib.sha256(asked.body).hexdigest() != match["oid"]:
        return _Reply(400, b'{"error": "checksum"}')
    repo.object_path(match["oid"]).write_bytes(asked.body)
    return _Reply(200)


def _verify(asked: _Asked, match: re.Match[str], repo: Repo, commit: str) -> _Reply:
    return _Reply(200 if repo.object_path(match["oid"]).exists() else 404)


def _commit(asked: _Asked, match: re.Match[str], repo: Repo, commit: str) -> _Reply:
    rows = [json.loads(line) for line in asked.body.splitlines()]
    with asked.hub.lock:
        try:
            made = repo.commit(rows, base64.b64decode)
        except ConflictError:
            return _Reply(412, b'{"error": "A commit has happened since. Please refresh."}')
        except MissingError as missing:
            return _error(404, "EntryNotFound", **{"X-Missing": str(missing)})
        others = [r["value"]["path"] for r in rows if r["key"] == "lfsFile"]
        others = [path for path in others if not is_large(path, 1)]
        if asked.hub.tracks and others:
            lines = repo.read(".gitattributes") + "".join(f"{p} lfs\n" for p in others).encode()
            path = repo.folder / "attributes"
            path.write_bytes(lines)
            repo.commits[made][".gitattributes"] = Blob.of(path, lfs=False)
    url = f"{asked.hub.url}/{match['repo']}/commit/{made}"
    return _json({"commitOid": made, "commitUrl": url, "success": True})


def _whoami(asked: _Asked, match: re.Match[str]) -> _Reply:
    if not asked.trusted:
        return _Reply(401, b'{"error": "Invalid username or password."}')
    return _json({"name": "owner", "type": "user", "auth": {"accessToken": {"role": "write"}}})


def _yaml(asked: _Asked, match: re.Match[str]) -> _Reply:
    text = asked.json()["content"]
    if text.startswith("---\nbroken"):
        errors = [{"message": '"metadata" must be an object'}]
        return _Reply(400, json.dumps({"errors": errors, "warnings": []}).encode())
    if not text.startswith("---"):
        return _json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
    faults = list(_faults(yaml.safe_load(text.split("---\n", 2)[1])))
    errors = [{"message": f'"{key}" is not what the Hub takes'} for key in faults]
    answer = json.dumps({"errors": errors, "warnings": []}).encode()
    return _Reply(400 if errors else 200, answer)


def _faults(metadata: Any) -> Iterator[str]:
    """Yield the keys of a card that the Hub refuses, of those that cards here have."""
    ids = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
    for key, form in (("base_model", ids), ("license", re.compile(r"[a-z0-9.-]+"))):
        values = metadata.get(key, [])
        for one in values if isinstance(values, list) else [values]:
            if not isinstance(one, str) or not form.fullmatch(one):
                yield key
    for key in ("datasets", "language", "tags"):
        values = metadata.get(key, [])
        if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
            yield key


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_Handling = Callable[..., _Reply]
_TABLE: list[tuple[str, str, _Handling]] = [
    (r"/api/whoami-v2", "GET", _whoami),
    (r"/api/validate-yaml", "POST", _yaml),
    (r"/api/repos/create", "POST", _create),
    (rf"/api/models/{_REPO}(?:/revision/(?P<rev>[^/]+))?", "GET", _info),
    (rf"/api/models/{_REPO}/tree/(?P<rev>[^/]+)", "GET", _tree),
    (rf"/api/models/{_REPO}/paths-info/(?P<rev>[^/]+)", "POST", _paths_info),
    (rf"/api/models/{_REPO}/preupload/(?P<rev>[^/]+)", "POST", _preupload),
    (rf"/api/models/{_REPO}/commit/(?P<rev>[^/]+)", "POST", _commit),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", "POST", _batch),
    (rf"/_lfs/{_REPO}/(?P<oid>[0-9a-f]+)", "PUT", _put),
    (rf"/_lfs/{_REPO}/(?P<oid>[0-9a-f]+)/verify", "POST", _verify),
    (rf"/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "GET", _file),
]
"""First match wins; `_put` carries its own checksum instead of a token, as a signed URL does."""

_ROUTES = [(re.compile(pattern + r"/?\Z"), method, handler) for pattern, method, handler in _TABLE]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    hub: FakeHub

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        body = self._body()
        headers = self.headers
        asked = _Asked(
            self.hub,
            self.command,
            split.path,
            parse_qs(split.query),
            headers.get("Range"),
            headers.get("Authorization"),
            body,
        )
        fault = next((f for f in self.hub.faults if f.meets(self.command, split.path)), Fault(""))
        if fault.hook:
            fault.hook()
        if fault.drop == "before":
            self._note(asked, 0, 0)
            self.close_connection = True
            return
        reply = _Reply(fault.status) if fault.status else _answer(asked)
        reply = fault.applied(reply, asked.body)
        if fault.drop == "after":
            self._note(asked, reply.status, 0)
            self.close_connection = True
            return
        self._send(asked, reply, fault)

    do_HEAD = do_GET  # noqa: N815
    do_POST = do_GET  # noqa: N815
    do_PUT = do_GET  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, asked: _Asked, reply: _Reply, fault: Fault) -> None:
        body = reply.body if self.command != "HEAD" else b""
        if fault.corrupt and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        whole = len(body)
        if fault.cut >= 0:
            body = body[: fault.cut]
        self._note(asked, reply.status, len(body))
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if fault.drip:
            self._drip(fault)
            return
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        middle = len(body) // 2
        self.wfile.write(body[:middle])
        if fault.slow:
            self.wfile.flush()
            time.sleep(fault.slow)
        self.wfile.write(body[middle:])
        if len(body) < whole:
            self.close_connection = True

    def _drip(self, fault: Fault) -> None:
        self.close_connection = True  # the end of a body without a length, were there one
        self.end_headers()
        end = time.monotonic() + _DRIP_SECONDS
        with contextlib.suppress(OSError):
            while self.command != "HEAD" and time.monotonic() < end:
                self.wfile.write(fault.drip)
                self.wfile.flush()
                time.sleep(fault.pause)

    def _note(self, asked: _Asked, status: int, sent: int) -> None:
        self.hub.requests.append(
            Request(
                asked.method, asked.path, asked.range, asked.token, status, sent, len(asked.body)
            )
        )

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: Any) -> None:
        """A client that hangs up early is no error."""


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve `hub` on a free port while the context lasts."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
