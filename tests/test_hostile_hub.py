"""A Hub that lies, floods, stalls or wants the token elsewhere, asked by the real client."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fake_hub import COMMIT, FakeHub, Fault, Repo, serving
from hub_client import CONTENT, REPO, Client, Done, World, files_in
from qwen35.checkpoint.hub_headers import BadAnswerError, check_answer, joined

SOURCE = "owner/source"
INFO = f"/api/models/{SOURCE}"
TREE = f"{INFO}/tree"
OBJECT = f"/{SOURCE}/resolve"
_BEFORE = ("note: ", "writing ", "downloading ", "uploading ")
SECONDS = 10
"""No command may take longer, though a server drips for a minute."""


@pytest.fixture(scope="module")
def hubs_and_client(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[FakeHub, FakeHub, Client]]:
    """A Hub, a second host, and an impatient process that knows the first one."""
    home = tmp_path_factory.mktemp("home")
    with (
        serving(FakeHub({})) as hub,
        serving(FakeHub({})) as second,
        Client(hub, home, TMPDIR=str(home)) as client,
    ):
        yield hub, second, client


class Hostile(World):
    """A world with a checkpoint on the Hub, and a second host with the same."""

    second: FakeHub

    def run(self, *arguments: object) -> Done:
        """Run a command, which must end in time, tell no secret and leave no traceback."""
        begun = time.monotonic()
        done = self.client.run(*arguments, entry="impatient:main")
        assert time.monotonic() - begun < SECONDS
        assert "Traceback" not in done.err
        assert self.hub.token not in done.out + done.err
        assert all(request.token is None for request in self.second.requests)
        return done

    def sentence(self, *arguments: object) -> str:
        """Run a command that must be refused in one sentence, after notes perhaps."""
        done = self.run(*arguments)
        assert done.code == 2, done.out + done.err
        *notes, error = done.err.splitlines()
        assert all(line.startswith(_BEFORE) for line in notes)
        assert error.startswith("error: ")
        return done.err


@pytest.fixture
def hostile(
    hubs_and_client: tuple[FakeHub, FakeHub, Client], dense: Path, tmp_path: Path
) -> Hostile:
    """The Hub, well-behaved still."""
    hub, second, client = hubs_and_client
    world = Hostile.fresh(hub, client, tmp_path)
    world.second = second
    second.requests.clear()
    second.faults.clear()
    hub.repos[SOURCE] = second.repos[SOURCE] = Repo.of(dense)
    return world


def row(**changes: Any) -> bytes:
    """Return a listing of one file."""
    good = {"type": "file", "path": "config.json", "size": 5, "oid": "0" * 40}
    return json.dumps([{**good, **changes}]).encode()


def bomb() -> bytes:
    """Return 100 MB of spaces in 100 kB of gzip."""
    packed = zlib.compressobj(9, zlib.DEFLATED, 31)
    return packed.compress(b" " * 10**8) + packed.flush()


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"null",
        b"7",
        b'"x"',
        b"<html>",
        DEEP,
        b"{}",
        b'{"sha": null}',
        b'{"sha": [1]}',
        b"\xff",
    ],
)
def test_commit_of_another_type(hostile: Hostile, body: bytes) -> None:
    hostile.hub.faults = [Fault(INFO, body=body, times=9)]
    assert ": no such folder here, and the Hub " in hostile.sentence("inspect", SOURCE)
    assert "the Hub " in hostile.sentence("publish", hostile.tmp / "x", SOURCE, "--mode", "fetch")


@pytest.mark.parametrize("commit", ["../../../../pwned", "/tmp/pwned", "main", COMMIT.upper(), ""])
def test_commit_that_is_none(hostile: Hostile, commit: str) -> None:
    hostile.hub.faults = [Fault(INFO, body=json.dumps({"sha": commit}).encode())]
    assert "named a malformed commit" in hostile.sentence("convert", SOURCE, hostile.tmp / "out")
    assert len(hostile.hub.requests) == 1


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b'{"a": 1}', "sent a malformed listing"),
        (b'["x", 1, null]', "sent a malformed listing"),
        (b"<html>", "not valid JSON"),
        (DEEP, "not valid JSON"),
        (b'[{"type": "file"}]', "a name that no file can have"),
        (row(path=["x"]), "a name that no file can have"),
        (row(path="x" * 5000), "a name that no file can have"),
        (row(path="a\0b"), "a name that no file can have"),
        (row(path="\ud800"), "a name that no file can have"),
        (row(path="../evil"), "a name that no file can have"),
        (row(path="/etc/x"), "a name that no file can have"),
        (row(path=".."), "a name that no file can have"),
        (row(size=-5), "with a size of -5"),
        (row(size="12"), "with a size of 12"),
        (row(size=1.5), "with a size of 1.5"),
        (row(size=2**70), "with a size of 1180591620717411303424"),
        (row(size=True), "with a size of True"),
        (row(oid=None), "without what it is"),
        (row(oid="../x"), "without what it is"),
        (row(type=3), "without what it is"),
        (row(lfs={"oid": ["x"], "size": "a"}), "with malformed details"),
        (row(lfs={"oid": "0" * 64, "size": 6}), "with malformed details"),
        (row(lfs="x"), "with malformed details"),
        (row()[:-1] + b"," + row()[1:], "lists a file twice"),
    ],
)
def test_malformed_listing(hostile: Hostile, body: bytes, found: str) -> None:
    hostile.hub.faults = [Fault(TREE, body=body)]
    assert found in hostile.sentence("inspect", SOURCE)


def test_listing_without_end(hostile: Hostile) -> None:
    pages = [
        Fault(
            TREE,
            body=json.dumps([json.loads(row(path=f"{n}-{i}"))[0] for i in range(100)]).encode(),
            headers={"Link": f'<{hostile.hub.url}{TREE}/{COMMIT}?cursor={n}>; rel="next"'},
        )
        for n in range(20)
    ]
    hostile.hub.faults = pages
    assert "lists more than 1000 files" in hostile.sentence("inspect", SOURCE)


@pytest.mark.parametrize(
    ("body", "found"), [(b"[]", "malformed"), (row(), "goes round in circles")]
)
def test_pages_that_lead_nowhere(hostile: Hostile, body: bytes, found: str) -> None:
    link = {"Link": f'<{hostile.hub.url}{TREE}/{COMMIT}?cursor=1>; rel="next"'}
    hostile.hub.faults = [Fault(TREE, body=row(path="first"), headers=link)]
    hostile.hub.faults += [Fault(TREE, body=body, headers=link, times=99)]
    assert found in hostile.sentence("inspect", SOURCE)


@pytest.mark.parametrize("path", [INFO, TREE, OBJECT])
def test_answer_without_end(hostile: Hostile, path: str) -> None:
    hostile.hub.faults = [Fault(path, drip=b'["' + b"a" * 100_000, times=9)]
    assert "the Hub sent more than " in hostile.sentence("inspect", SOURCE)


@pytest.mark.parametrize("path", [INFO, TREE, OBJECT])
def test_answer_that_drips(hostile: Hostile, path: str) -> None:
    hostile.hub.faults = [Fault(path, drip=b"a", pause=0.02, times=9)]
    said = hostile.sentence("inspect", SOURCE)
    assert "note: the Hub sends slowly: " in said
    assert "trying again" in said
    assert "the Hub keeps breaking off or slowing down" in said


@pytest.mark.parametrize("path", [INFO, TREE, OBJECT])
@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP, deflate"])
def test_compressed_answer(hostile: Hostile, path: str, encoding: str) -> None:
    headers = {"Content-Encoding": encoding}
    hostile.hub.faults = [Fault(path, body=bomb(), headers=headers, times=9)]
    assert "the Hub sent compressed data" in hostile.sentence("inspect", SOURCE)


@pytest.mark.parametrize("path", [INFO, TREE, OBJECT])
@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (429, {"Retry-After": "100000"}),
        (429, {"Retry-After": "9" * 5000}),
        (429, {"RateLimit": '"api";r=0;t=99999'}),
        (503, {"Retry-After": "86400"}),
    ],
)
def test_far_away_time_is_not_waited_for(
    hostile: Hostile, path: str, status: int, headers: dict[str, str]
) -> None:
    hostile.hub.faults = [Fault(path, status=status, headers=headers, times=9)]
    sentence = hostile.sentence("inspect", SOURCE)
    assert f"the Hub answered {status} and asks to wait " in sentence


def test_short_wait_is_told_and_overcome(hostile: Hostile) -> None:
    hostile.hub.faults = [Fault(INFO, status=429, headers={"Retry-After": "2"})]
    done = hostile.run("inspect", SOURCE)
    assert done.code == 0, done.err
    assert "note: the Hub answered 429: waiting 2 s\n" in done.err


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"../../../../pwned"', "X-Linked-Etag": None},
        {"X-Linked-Etag": '"/tmp/pwned"'},
        {"ETag": '""', "X-Linked-Etag": None},
        {"ETag": '"' + "e" * 3000 + '"', "X-Linked-Etag": None},
        {"ETag": None, "X-Linked-Etag": None},
        {"X-Repo-Commit": "../../../../pwned"},
        {"X-Repo-Commit": "b" * 40},
        {"X-Repo-Commit": None},
        {"X-Linked-Size": "999999999999999"},
        {"X-Linked-Size": "-1"},
        {"X-Xet-Hash": "0" * 64, "X-Xet-Refresh-Route": "https://elsewhere.test/token"},
        {"Link": '<https://elsewhere.test/token>; rel="xet-auth"'},
    ],
)
@pytest.mark.parametrize("verb", ["convert", "pull"])
def test_headers_of_a_file(hostile: Hostile, verb: str, headers: dict[str, str | None]) -> None:
    asked: tuple[object, ...] = ("publish", hostile.tmp / "new", SOURCE, "--mode", "pull")
    if verb == "convert":
        asked = ("convert", SOURCE, hostile.tmp / "new", "--recipe", "text", "--quiet")
    hostile.hub.faults = [Fault(OBJECT, method="HEAD", headers=headers, times=99)]
    before = files_in(hostile.tmp)
    hostile.sentence(*asked)
    after = {name for name in files_in(hostile.tmp) if ".new.pull" not in name}
    assert after == before.keys()
    assert not hostile.hub.asked("GET", f"{OBJECT}/{COMMIT}/model-00001-of")


def test_absent_file_with_a_commit_that_leads_elsewhere(hostile: Hostile) -> None:
    """The client remembers an absent file under the commit that the answer names."""
    headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "../../../../pwned"}
    hostile.hub.faults = [Fault(OBJECT, method="HEAD", status=404, headers=headers, times=99)]
    asked = ("convert", SOURCE, hostile.tmp / "out", "--recipe", "text")
    assert "named a malformed commit" in hostile.sentence(*asked)
    assert not list(hostile.client.home.rglob("*pwned*"))


@pytest.mark.parametrize("verb", ["convert", "pull"])
def test_file_never_grows_beyond_its_listed_size(hostile: Hostile, verb: str) -> None:
    asked: tuple[object, ...] = ("publish", hostile.tmp / "new", "owner/flood", "--mode", "pull")
    if verb == "convert":
        asked = ("convert", "owner/flood", hostile.tmp / "new", "--recipe", "text", "--quiet")
    flood = Fault("*tokenizer", method="GET", drip=b"a" * 10**6, times=99)
    hostile.hub.repos["owner/flood"] = Repo.of(_with_tokenizer(hostile))
    hostile.hub.faults = [flood]
    assert "the Hub sent more than 2 bytes" in hostile.sentence(*asked)
    assert not (hostile.tmp / "new").exists()


@pytest.mark.parametrize("path", ["/api/resolve-cache/x", "/api/models/a/b/xet-read-token/x"])
def test_file_on_another_path_of_the_hub_does_not_grow_either(hostile: Hostile, path: str) -> None:
    hostile.pushed()
    notes = f"/{REPO}/resolve/{hostile.repo.head}/notes.md"
    good = {"X-Repo-Commit": hostile.repo.head, "ETag": '"x"', "X-Linked-Size": "7"}
    hostile.hub.faults = [
        Fault(notes, status=307, headers={"Location": path}, times=9),
        Fault(path, method="HEAD", status=200, headers=good),
        Fault(path, method="GET", status=200, drip=b"a" * 100_000, times=9),
    ]
    said = hostile.sentence("publish", hostile.tmp / "new", REPO, "--mode", "pull")
    assert ("sent more than 7 bytes" in said) == ("resolve-cache" in path)
    assert "redirects to where tokens" in said or "resolve-cache" in path


def _with_tokenizer(hostile: Hostile) -> Path:
    """Return a folder like the source's, with a tokenizer of two bytes."""
    folder = hostile.tmp / "with"
    folder.mkdir()
    for path in hostile.hub.repos[SOURCE].folder.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_transfer_that_breaks_off_again_and_again(hostile: Hostile) -> None:
    hostile.pushed()
    hostile.hub.faults = [Fault(f"/{REPO}/resolve", method="GET", cut=1, times=999)]
    said = hostile.sentence("publish", hostile.tmp / "new", REPO, "--mode", "pull")
    assert "the Hub keeps breaking off or slowing down" in said


def test_transfer_that_breaks_off_once_is_resumed(hostile: Hostile) -> None:
    hostile.pushed()
    hostile.hub.faults = [Fault("*.safetensors", method="GET", cut=100)]
    done = hostile.run("publish", hostile.tmp / "new", REPO, "--mode", "pull")
    assert done.code == 0, done.err
    assert files_in(hostile.tmp / "new") == files_in(hostile.folder)
    assert "note: the Hub's answer broke off or slowed down: trying again" in done.err


@pytest.mark.parametrize("status", [302, 307, 308])
@pytest.mark.parametrize("path", [INFO, TREE, OBJECT])
def test_token_does_not_follow_a_redirect(hostile: Hostile, path: str, status: int) -> None:
    """What is asked for without a token there is as good as any other answer."""
    target = {INFO: INFO, TREE: f"{TREE}/{COMMIT}", OBJECT: f"{OBJECT}/{COMMIT}/config.json"}[path]
    location = {"Location": hostile.second.url + target}
    hostile.hub.faults = [Fault(path, status=status, headers=location)]
    hostile.run("inspect", SOURCE)
    assert hostile.hub.requests[0].token
    assert hostile.second.requests


def test_token_does_not_follow_a_page(hostile: Hostile) -> None:
    """The client would send it along: such an address is not a redirect."""
    link = {"Link": f'<{hostile.second.url}{TREE}/{COMMIT}>; rel="next"'}
    hostile.hub.faults = [Fault(TREE, body=row(path="first"), headers=link)]
    hostile.run("inspect", SOURCE)
    assert hostile.second.requests


def test_redirect_without_end(hostile: Hostile) -> None:
    hostile.hub.faults = [Fault(INFO, status=302, headers={"Location": INFO}, times=99)]
    assert "TooManyRedirects" in hostile.sentence("inspect", SOURCE)
    hostile.hub.faults = [Fault(INFO, status=302, headers={"Location": "file:///etc/passwd"})]
    assert "UnsupportedProtocol" in hostile.sentence("inspect", SOURCE)


@pytest.mark.parametrize(
    "headers",
    [
        {"Location": "http://[::1"},
        {"Location": "/" + "x" * 70_000},
        {"Link": '<http://[::1>; rel="next"'},
        {"X-Xet-Hash": "a" * 64, "Link": '<http://[::1>; rel="xet-auth"'},
        {"X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": "http://[::1"},
        {"X-Xet-Hash": "a" * 64, "X-Xet-Cas-Url": "http://[::1"},
    ],
    ids=lambda headers: "-".join(headers),
)
def test_malformed_address(headers: dict[str, str]) -> None:
    request = httpx2.Request("GET", "http://127.0.0.1:1/a")
    status = 302 if "Location" in headers else 200
    answer = httpx2.Response(status, headers=headers, request=request)

    def read() -> None:
        check_answer(answer)
        joined(request.url, answer.links["next"]["url"])

    with pytest.raises(BadAnswerError, match="named a malformed address"):
        read()


WRONG = [b"[]", b"null", b"7", b"{}", b"<html>", DEEP, b'{"files": 3}', b'{"objects": [1]}']


@pytest.mark.parametrize("body", WRONG)
@pytest.mark.parametrize(
    "path", ["/api/repos/create", f"/api/models/{REPO}/preupload", f"/{REPO}.git/info/lfs"]
)
def test_malformed_answer_to_a_push(hostile: Hostile, path: str, body: bytes) -> None:
    hostile.hub.faults = [Fault(path, body=body, times=9)]
    done = hostile.run("publish", hostile.folder, REPO)
    if done.code:  # some are as good as an answer
        assert done.code == 2
        assert len([line for line in done.err.splitlines() if line.startswith("error: ")]) == 1
        assert hostile.remote() == {}


@pytest.mark.parametrize("body", [*WRONG, b'{"commitOid": "../x", "commitUrl": "x"}'])
def test_malformed_answer_to_a_commit_is_looked_into(hostile: Hostile, body: bytes) -> None:
    hostile.hub.faults = [Fault(f"/api/models/{REPO}/commit", body=body)]
    done = hostile.run("publish", hostile.folder, REPO)
    assert done.code == 0, done.err
    assert hostile.remote() == CONTENT


def test_bytes_go_where_the_hub_says_but_the_token_stays(hostile: Hostile) -> None:
    """As with a storage service; the address for the check afterwards is no exception."""
    oid = hostile.second.url + f"/_lfs/{REPO}/" + "0" * 64
    actions = {"upload": {"href": oid}, "verify": {"href": oid + "/verify"}}

    def spoil(asked: bytes) -> bytes:
        objects = [{**o, "actions": actions} for o in json.loads(asked)["objects"]]
        return json.dumps({"transfer": "basic", "objects": objects}).encode()

    hostile.hub.faults = [Fault(f"/{REPO}.git/info/lfs", make=spoil, times=9)]
    hostile.second.repos[REPO] = Repo.create(hostile.tmp / "theirs")
    hostile.sentence("publish", hostile.folder, REPO)
    assert {request.method for request in hostile.second.requests} == {"PUT"}
    hostile.second.faults = [Fault("/_lfs/", method="PUT", status=200, body=b"", times=9)]
    hostile.run("publish", hostile.folder, REPO)
    assert {request.method for request in hostile.second.requests} == {"PUT", "POST"}


@pytest.mark.parametrize("status", [307, 308])
@pytest.mark.parametrize("path", ["/api/repos/create", f"/api/models/{REPO}/commit"])
def test_change_is_not_redirected_to_another_host(hostile: Hostile, path: str, status: int) -> None:
    location = {"Location": hostile.second.url + path}
    hostile.hub.faults = [Fault(path, status=status, headers=location)]
    said = hostile.sentence("publish", hostile.folder, REPO)
    assert "another host" in said
    assert hostile.second.requests == []


def test_encryption_is_not_given_up() -> None:
    """A test of the rule itself: nothing here serves HTTPS."""
    import httpx2
    from huggingface_hub import constants

    from qwen35.checkpoint.hub_headers import BadAnswerError, check_request

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "https://hub.test")
        inside = httpx2.Request("GET", "https://hub.test:443/x", headers={"Authorization": "x"})
        check_request(inside)
        assert inside.headers["authorization"] == "x"
        for address in ("https://hub.test:444/x", "https://hub.test.evil/x", "https://hub/x"):
            other = httpx2.Request("GET", address, headers={"Authorization": "x"})
            check_request(other)
            assert "authorization" not in other.headers
        with pytest.raises(BadAnswerError, match="without encryption"):
            check_request(httpx2.Request("GET", "http://hub.test/x"))


def test_headers_that_drip(hostile: Hostile) -> None:
    """A time limit for each read does not end them."""
    import socket
    import threading

    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=drip, args=(peer,), daemon=True).start()

        def drip(peer: socket.socket) -> None:
            try:
                for piece in [b"HTTP/1.1 200 OK\r\nX: ", *[b"a"] * 1000]:
                    peer.sendall(piece)
                    time.sleep(0.05)
            except OSError:
                pass
            finally:
                peer.close()

        threading.Thread(target=serve, daemon=True).start()
        location = {"Location": f"http://127.0.0.1:{server.getsockname()[1]}/"}
        hostile.hub.faults = [Fault(INFO, status=302, headers=location, times=9)]
        assert "ReadTimeout" in hostile.sentence("inspect", SOURCE)
        server.shutdown(socket.SHUT_RDWR)
