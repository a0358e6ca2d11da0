"""The client of servers: bounds on time, bytes and repetitions; whatever is sent, one sentence."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

import qwen35
from fake_server import KEY, FakeServer, serving
from hasty_client import HASTY, raw_server, talking
from qwen35.cli.main import main
from qwen35.errors import EndpointError, UsageError
from qwen35.serving.chat_replies import CHAT_PATH, chat, streamed_chat
from qwen35.serving.endpoint import Endpoint
from qwen35.serving.json_values import text_in
from qwen35.serving.served_model import Dialect, ServedModel, draft_counts, identify
from qwen35.serving.server_client import Bounds, ServerClient
from qwen35.serving.token_scores import TokenScorer

pytestmark = pytest.mark.usefixtures("no_known_keys")

# --- busy and unreachable servers


def busy(*answers: tuple[int, str]) -> FakeServer:
    """Return a server that is busy a few times: status and Retry-After."""
    left = list(answers)

    def answer(_: Any) -> Any:
        if not left:
            return {"well": True}
        status, after = left.pop(0)
        return status, {"retry-after": after} if after else {}, b"busy"

    return FakeServer(routes={"/x": answer})


def test_a_busy_server_is_asked_again() -> None:
    soon = format_datetime(datetime.now(UTC) - timedelta(seconds=5))
    for after in ("0", "", soon, "nonsense"):
        with talking(busy((429, after), (503, after))) as client:
            assert client.get("/x") == {"well": True}


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ([(429, "0")] * 9, r"/x: is busy \(HTTP 429\); try again later$"),
        ([(503, "3600")], r"/x: is busy \(HTTP 503\), and asks to wait for 3600 s; try again"),
    ],
)
def test_patience_ends(answers: list[tuple[int, str]], found: str) -> None:
    fake = busy(*answers)
    with talking(fake) as client, pytest.raises(EndpointError, match=found):
        client.get("/x")
    assert len(fake.heard) <= 1 + HASTY.retries


def test_nobody_is_there() -> None:
    with serving() as fake:
        url = fake.url
    found = rf"^{url}: cannot be reached \(.+; is the server"
    with ServerClient(Endpoint(url), HASTY) as client, pytest.raises(EndpointError, match=found):
        client.get("/x")


# --- too slow, too much, broken


def _dribble(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for number in range(30):
        connection.sendall(b"x-%d: y\r\n" % number)
        time.sleep(0.02)


def _slow_body(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n[")
    for _ in range(30):
        connection.sendall(b" ")
        time.sleep(0.02)


def _endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"\n data: " + b"1" * 2**19)


def _silent(connection: socket.socket) -> None:
    time.sleep(0.8)


def _torn(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")


def _no_http(connection: socket.socket) -> None:
    connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")


SLOW = r"no whole answer within 0.4 s$"
LARGE = r"an answer of more than 16777216 bytes$"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (_dribble, SLOW),
        (_slow_body, SLOW),
        (_silent, SLOW),
        (_endless, LARGE),
        (_torn, r"the answer broke off \(RemoteProtocolError\)$"),
        (_no_http, r"the answer broke off \(RemoteProtocolError\)$"),
    ],
)
def test_what_a_server_sends_is_bounded(
    answer: Callable[[socket.socket], None], found: str
) -> None:
    bounds = HASTY if answer is not _endless else Bounds(seconds=10)
    with raw_server(answer) as url, ServerClient(Endpoint(url), bounds) as client:
        begun = time.monotonic()
        with pytest.raises(EndpointError, match=found):
            client.get("/x")
        assert time.monotonic() - begun < 3


def test_endless_streams_are_bounded() -> None:
    with (
        raw_server(_endless) as url,
        ServerClient(Endpoint(url), Bounds(seconds=10)) as client,
        pytest.raises(EndpointError, match="a stream of more than 16777216 bytes"),
    ):
        list(client.events("/x", {}))
    many = b"data: {}\n" * 100_001
    with (
        talking(FakeServer(routes={"/v1/chat/completions": lambda _: many}), Bounds()) as client,
        pytest.raises(EndpointError, match="a stream of more than 100000 events"),
    ):
        streamed_chat(client, {})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>\xff",
        b'{"a": NaN}',
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_other_than_json_is_a_sentence(body: bytes) -> None:
    with (
        talking(FakeServer(routes={"/x": lambda _: body})) as client,
        pytest.raises(EndpointError, match="/x: not JSON: ") as caught,
    ):
        client.get("/x")
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


# --- any type anywhere

VALUES: tuple[Any, ...] = (
    None, True, 1, -1, 1.5, 10**30, 1e300, "", "\x1b[2J\ud800",
    [], [[]], {}, {"a": 1}, [None], [{}],
)  # fmt: skip


def _with(value: Any) -> Iterator[Any]:
    """Yield answers of a chat with a value of another type in each place."""
    yield value
    for key in ("choices", "usage", "model"):
        yield {"choices": [{"message": {"content": "x"}}], key: value}
    yield {"choices": [value]}
    for key in ("message", "finish_reason", "delta"):
        yield {"choices": [{"message": {}, key: value}]}
    for key in ("content", "reasoning_content", "tool_calls"):
        yield {"choices": [{"message": {key: value}, "delta": {key: value}}]}
    for key in ("function", "index"):
        entry = {"function": {"name": "x"}, key: value}
        yield {"choices": [{"message": {"tool_calls": [entry]}, "delta": {"tool_calls": [entry]}}]}
    call = {"tool_calls": [{"function": {"name": value, "arguments": value}}]}
    yield {"choices": [{"message": call, "delta": call}]}


def test_a_chat_of_any_types_is_read_or_refused() -> None:
    bodies = [body for value in VALUES for body in _with(value)]
    left = iter(bodies * 2)

    def answer(request: Any) -> Any:
        body = json.dumps(next(left))
        return f"data: {body}\n\ndata: [DONE]".encode() if request.get("stream") else body.encode()

    read = 0
    with talking(FakeServer(routes={"/v1/chat/completions": answer}), Bounds()) as client:
        for number in range(2 * len(bodies)):
            try:
                reply = (
                    chat(client, {}) if number < len(bodies) else streamed_chat(client, {}).reply
                )
            except EndpointError:
                continue
            read += 1
            text = reply.content + reply.turn + reply.finish + reply.model
            assert isinstance(text.encode(), bytes)
            assert all(call.values is None or call.values for call in reply.calls)
    assert read > len(bodies)


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ({"content": [{"type": "text", "text": "4"}]}, "a message whose content is a list"),
        ({"content": 4}, "a message whose content is a number, true or false"),
        (
            {"tool_calls": [{"function": {"name": "x", "arguments": {"city": "Paris"}}}]},
            "a tool call whose arguments are an object",
        ),
    ],
)
def test_what_is_no_text_is_not_taken_for_an_empty_one(message: Any, found: str) -> None:
    body = {"choices": [{"message": message}]}
    with (
        talking(FakeServer(routes={CHAT_PATH: lambda _: body})) as client,
        pytest.raises(EndpointError, match=f"{found}, expected text") as error,
    ):
        chat(client, {})
    assert error.value.status == 200  # an answer: the server is not lost


def test_an_error_that_a_gateway_sends_as_an_answer_is_told() -> None:
    body = {"error": {"message": "no provider left", "code": 502}}
    with (
        talking(FakeServer(routes={CHAT_PATH: lambda _: body})) as client,
        pytest.raises(EndpointError, match=r"an error in place of an answer \(no provider left\)"),
    ):
        chat(client, {})


def test_a_stream_without_spaces_after_its_colons_is_read() -> None:
    deltas = [{"delta": {"content": text}} for text in ("It is ", "Paris.")]
    lines = [": waiting", *(f"data:{json.dumps({'choices': [one]})}" for one in deltas)]
    body = "\n\n".join([*lines, "data:[DONE]", ""]).encode()
    with talking(FakeServer(routes={CHAT_PATH: lambda _: body})) as client:
        assert streamed_chat(client, {}).reply.content == "It is Paris."


@pytest.mark.parametrize(
    "path", ["", "/", "/v1", "/v1/", "/v1/models", "/v1/completions", "/v1/chat/completions"]
)
def test_the_path_of_a_request_may_be_given(path: str) -> None:
    assert Endpoint.parse(f"http://host:1/proxy{path}").url == "http://host:1/proxy"


@pytest.mark.parametrize("owner", ["vllm", "sglang", "llamacpp", "someone"])
def test_a_description_of_any_types_is_read(owner: str) -> None:
    """Whatever a server tells about itself."""
    keys = (
        "version", "model_path", "default_generation_settings", "modalities", "quantization",
        "details", "capabilities", "max_total_tokens", "chat_template", "build_info",
    )  # fmt: skip
    told: dict[str, Any] = {}

    def list_models(_: Any) -> Any:
        row = {"id": "x", "owned_by": owner, **dict.fromkeys(("max_model_len", "meta"), told["x"])}
        return {"data": [row, told["x"]]}

    fake = FakeServer(routes={"/v1/models": list_models})
    for path in ("/version", "/props", "/server_info", "/info", "/api/show", "/api/version"):
        fake.routes[path] = lambda _: told
    with talking(fake, Bounds()) as client:
        for value in VALUES:
            told.update(dict.fromkeys((*keys, "x"), value))
            model = identify(client, "x")
            assert model.described.isprintable()
            json.dumps(model.to_json())


def _scored(value: Any) -> Iterator[dict[str, Any]]:
    """Yield log probabilities with a value of another type in each place."""
    for entry in (value, {"logprob": value, "decoded_token": value}):
        for row in (value, {"1": entry}, {str(value): entry}):
            yield {"choices": [{"prompt_logprobs": [None, row, row]}]}
    for entry in (value, [value, 1, value], [-1.0, value, "x"]):
        meta = {
            "input_token_logprobs": [entry] * 3,
            "input_top_logprobs": [value, [entry], [entry]],
        }
        yield {"meta_info": meta}
        yield {"meta_info": {**meta, "input_top_logprobs": value}}
    for entry in (
        value,
        {"id": value, "logprob": -1.0},
        {"id": 1, "logprob": value, "token": value},
    ):
        yield {"completion_probabilities": [{"top_logprobs": [entry]}]}
        yield {"completion_probabilities": [{"top_logprobs": entry}]}


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "llama.cpp"])
def test_log_probabilities_of_any_types_are_read_or_refused(dialect: Dialect) -> None:
    answers: list[Any] = []
    paths = ("/v1/completions", "/generate", "/completion")
    sound = {
        "choices": [{"prompt_logprobs": [None, {"2": {"logprob": -1}}, {"3": {"logprob": -2}}]}]
    }
    fake = FakeServer(routes={path: lambda _: answers[-1] for path in paths})
    read = 0
    with talking(fake, Bounds()) as client:
        answers.append(sound)
        scorer = TokenScorer(client, ServedModel("x", dialect))
        for value in VALUES:
            for body in _scored(value):
                answers.append(body)
                with suppress(EndpointError):
                    scores = scorer.scores([1, 1, 1], [0, 1])
                    read += 1
                    assert (scores.values <= 0).all()
                    assert scores.ids.shape == scores.values.shape
                    assert all(text.encode() or True for text in scores.texts.values())
    assert read


def test_a_list_of_models_of_any_types_is_read_or_refused() -> None:
    listed: list[Any] = []
    with talking(FakeServer(routes={"/v1/models": lambda _: listed[-1]}), Bounds()) as client:
        for value in VALUES:
            for models in (value, {"data": value}, {"data": [{"id": value}]}):
                listed.append(models)
                with suppress(EndpointError, UsageError):
                    assert identify(client).name == text_in(value)


def test_a_server_without_a_list_of_models_needs_a_name() -> None:
    missing: Any = (404, {}, b'{"detail": "Not Found"}')
    with talking(FakeServer(routes={"/v1/models": lambda _: missing})) as client:
        assert identify(client, "x").described == "the server tells nothing about it"
        with pytest.raises(EndpointError, match=r"/v1/models: HTTP 404 \(Not Found\)"):
            identify(client)


@pytest.mark.parametrize(
    ("text", "drafted"),
    [(b"", None), (b"NAME x\n", None), (b"NAME 1\nNAME{a} 2\n\0", 3.0)],
)
def test_metrics_of_any_form_are_read(text: bytes, drafted: float | None) -> None:
    lines = text.replace(b"NAME", b"vllm:spec_decode_num_draft_tokens_total")
    with talking(FakeServer(routes={"/metrics": lambda _: lines})) as client:
        counts = draft_counts(client)
    assert (counts and counts.drafted) == drafted


# --- keys


def test_the_key_goes_to_the_endpoint_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", KEY)
    with serving() as other:
        moved = (307, {"location": f"{other.url}/v1/models"}, b"")
        fake = FakeServer(routes={"/v1/models": lambda _: moved})
        found = r"redirects \(HTTP 307\); give the address"
        with serving(fake), pytest.raises(EndpointError, match=found):
            qwen35.verify(endpoint=fake.url, api_key_env="MINE")
        assert fake.bearers == {f"Bearer {KEY}"}
        assert other.heard == []


def test_the_key_is_never_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that answers with it in every text, in pieces, and in its errors."""
    monkeypatch.setenv("QWEN35_API_KEY", KEY)
    echo = [{"choices": [{"delta": {"content": piece}}]} for piece in (KEY[:9], KEY[9:])]
    stream = "".join(f"data: {json.dumps(one)}\n\n" for one in echo) + "data: [DONE]\n"

    def answer(body: Any) -> Any:
        if body.get("stream"):
            return stream.encode()
        if "tools" in body:
            return 500, {}, json.dumps({"error": {"message": f"bad: {KEY}"}}).encode()
        message = {"content": f"{KEY} <|im_end|>", "reasoning_content": KEY}
        return {"model": KEY, "choices": [{"message": message}]}

    fake = FakeServer(
        routes={"/v1/chat/completions": answer}, models=(f"a{KEY}",), key=KEY, owner="someone"
    )
    with serving(fake):
        assert main(["verify", "--endpoint", fake.url]) == 1
        assert main(["verify", "--endpoint", fake.url, "--json"]) == 1
        monkeypatch.setenv("QWEN35_API_KEY", "another-key-0123456789")
        assert main(["verify", "--endpoint", fake.url]) == 2
    shown = capsys.readouterr()
    assert "***" in shown.out
    assert KEY not in shown.out + shown.err
    assert "another-key" not in shown.out + shown.err
    assert "/v1/models: HTTP 401 (wrong key: Bearer ***); give the key in QWEN35_API" in shown.err


@pytest.mark.parametrize("key", ["a b", "a\nb", "Schlüssel", "x" * 5000])
def test_a_key_that_is_none_is_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN35_API_KEY", key)
    with pytest.raises(UsageError, match=r"^QWEN35_API_KEY: holds no key, expected letters") as e:
        Endpoint.parse("http://127.0.0.1:1")
    assert key not in str(e.value)
    monkeypatch.setenv("QWEN35_API_KEY", "x")
    assert "x'" not in repr(Endpoint.parse("http://127.0.0.1:1"))
    assert Endpoint.parse("http://10.0.0.1:1").exposes_key
    assert not Endpoint.parse("http://localhost:1").exposes_key
    assert not Endpoint.parse("https://10.0.0.1:1").exposes_key


def test_a_connection_that_comes_after_the_end_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client may be closed while the thread of a request that was given up connects."""
    connect, ready, closed = socket.create_connection, threading.Event(), threading.Event()
    made: list[socket.socket] = []

    def late(*arguments: Any, **options: Any) -> socket.socket:
        ready.set()
        assert closed.wait(5)
        made.append(connect(*arguments, **options))
        return made[0]

    def no_content(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    with raw_server(no_content) as url:
        with ServerClient(Endpoint(url), HASTY) as client:
            monkeypatch.setattr(socket, "create_connection", late)
            with pytest.raises(EndpointError, match=SLOW):
                client.get("/x")
            assert ready.wait(5)
        closed.set()
        end = time.monotonic() + 5
        while (not made or made[0].fileno() != -1) and time.monotonic() < end:
            time.sleep(0.01)
    assert made[0].fileno() == -1
