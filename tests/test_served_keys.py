"""Keys of servers: sent to one address, judged as they come back, and never shown."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qwen35
from fake_server import KEY, Asked, FakeServer, Turn, serving
from qwen35.cli.main import main
from qwen35.errors import UsageError
from qwen35.serving.chat_replies import chat, streamed_chat
from qwen35.serving.endpoint import Endpoint
from qwen35.serving.hidden_keys import hidden, hide
from qwen35.serving.server_client import ServerClient

Capture = pytest.CaptureFixture[str]
QUOTED = 'sk-"quo\\te"-0123456789'


pytestmark = pytest.mark.usefixtures("no_known_keys")

# --- texts


def spellings(key: str) -> Iterator[str]:
    yield key
    yield key.upper()
    yield json.dumps(key)[1:-1]
    yield json.dumps(json.dumps(key)[1:-1])[1:-1]
    yield repr(key)[1:-1]
    yield "\0".join(key)
    yield json.dumps("\0".join(key))[1:-1]
    yield "".join(f"\\u{ord(sign):04x}" for sign in key)
    yield "".join(f"%{ord(sign):02X}" for sign in key)
    yield "".join(f"&#{ord(sign)};" for sign in key)
    yield "\u200b".join(key)
    yield f"{key[:9]}\n{key[9:]}"


@pytest.mark.parametrize("key", [KEY, QUOTED, "a+/=&b;c%z\\d-9876"])
def test_a_key_is_blanked_however_it_is_spelled(key: str) -> None:
    hide(key)
    for spelled in spellings(key):
        assert hidden(f"It is {spelled}!") == "It is ***!", spelled
    assert hidden(f"It is {key[:12]}...") == "It is ***..."
    assert hidden("Nothing is secret here: sk-") == "Nothing is secret here: sk-"


def test_a_short_key_is_blanked_by_itself_only() -> None:
    hide("EMPTY")
    hide("a")
    assert (
        hidden("Bearer EMPTY, an empty answer, emptyish") == "Bearer ***, an *** answer, emptyish"
    )
    assert hidden("a bar") == "*** bar"


# --- what a server sends back


def _echoing(asked: Asked, turn: Turn) -> Turn:
    """Return a turn with the key wherever a server can put it."""
    if "developer" in asked.roles:
        body = json.dumps({"error": {"code": 3, "text": ["bad", QUOTED]}})
        return Turn(status=500, raw=body.encode())
    if "tools" in asked.body:
        calls = (("weather" + QUOTED, json.dumps({"city": QUOTED})),)
        return Turn(f"x {QUOTED}" if not asked.streamed else "y", QUOTED, calls, QUOTED)
    long = "The answer is of some length, before what follows: " + QUOTED
    return Turn(long, f"\0{QUOTED.upper()}", (), QUOTED)


def _shows(text: str) -> list[str]:
    """Return what of the key is in a text."""
    folded = text.casefold()
    pieces = {json.dumps(QUOTED)[1:-1], QUOTED, QUOTED[:8], QUOTED[-8:], "0123456", "quo"}
    return [piece for piece in pieces if piece.casefold() in folded]


def test_no_output_shows_the_key(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    monkeypatch.setenv("QWEN35_API_KEY", QUOTED)
    routes: dict[str, Any] = {
        "/version": lambda _: {"version": QUOTED},
        "/metrics": lambda _: f"{QUOTED}\n".encode(),
    }
    fake = FakeServer(change=_echoing, routes=routes, models=(f"m{QUOTED}",), key=QUOTED)
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"prompt": "What?", "exact": "x"}\n')
    with serving(fake):
        assert main(["verify", "--endpoint", fake.url]) == 1
        assert main(["verify", "--endpoint", fake.url, "--json"]) == 1
        assert main(["evaluate", "--tasks", str(tasks), "--endpoint", fake.url]) == 0
        assert main(["verify", "--endpoint", fake.url, "--model", "x"]) == 2
        assert main(["verify", "--endpoint", fake.url, "--api-key-env", "PATH"]) == 2
    shown = capsys.readouterr()
    assert "***" in shown.out
    assert _shows(shown.out + shown.err) == []


def test_the_key_is_judged_as_it_comes() -> None:
    """A key that is a word of the answers, or of the protocol, changes nothing."""
    with serving() as fake:
        for key in ("Paris", "content", "4", "a"):
            verdict = qwen35.verify(endpoint=fake.url) if not key else _verified(fake.url, key)
            assert verdict.findings == (), key
            told = verdict.to_json()
            assert all(answer["right"] for answer in told["answers"])
    call = Turn("", "", (("weather", json.dumps({"city": QUOTED})),), "tool_calls")
    with (
        serving(FakeServer(change=lambda *_: call)) as fake,
        ServerClient(Endpoint(fake.url, QUOTED)) as client,
    ):
        request = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9}
        for reply in (chat(client, request), streamed_chat(client, request).reply):
            assert reply.calls[0].values == {"city": QUOTED}


def _verified(url: str, key: str) -> Any:
    os.environ["QWEN35_TEST_KEY"] = key
    try:
        return qwen35.verify(endpoint=url, api_key_env="QWEN35_TEST_KEY")
    finally:
        del os.environ["QWEN35_TEST_KEY"]


# --- where it goes, and where it comes from


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_no_proxy_gets_the_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as proxy, serving() as fake:
        for address in (proxy.url, "socks5://127.0.0.1:1", "gopher://x", "::"):
            monkeypatch.setenv(name, address)
            with ServerClient(Endpoint(fake.url, KEY)) as client:
                assert client.get("/v1/models")
    assert proxy.heard == []


@pytest.mark.parametrize("given", [KEY, "AIzaSy0123456789abcdefghijk", "", "\ud800", "a\0b", "a=b"])
def test_a_key_in_place_of_its_variable_is_not_shown(given: str, capsys: Capture) -> None:
    assert main(["verify", "--endpoint", "http://127.0.0.1:1", "--api-key-env", given]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: --api-key-env: ")
    assert "give the name of a variable that holds the key" in shown
    assert not given or given not in shown


def test_certificates_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("")
    for file in ("/nowhere/ca.pem", str(tmp_path / "empty.pem"), str(tmp_path)):
        monkeypatch.setenv("SSL_CERT_FILE", file)
        with pytest.raises(UsageError, match="SSL_CERT_FILE: no certificates can be read there"):
            ServerClient(Endpoint("https://127.0.0.1:1"))
