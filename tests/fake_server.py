"""A server of models in a thread, with the OpenAI API and vLLM's extensions; and its faults."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from answering import RIGHT

__all__ = ["FAULTS", "KEY", "Asked", "FakeServer", "Fault", "Turn", "asks", "serving", "when"]

KEY = "sk-very-secret-0123456789"
MODEL = "tiny"
_CHAT = "/v1/chat/completions"
_CITIES = ("Paris", "Rome")


@dataclass(frozen=True)
class Asked:
    """A request for a turn."""

    body: dict[str, Any]

    @property
    def messages(self) -> list[dict[str, Any]]:
        return list(self.body["messages"])

    @property
    def text(self) -> str:
        content = self.messages[-1]["content"]
        return content if isinstance(content, str) else str(content[-1]["text"])

    @property
    def thinking(self) -> bool:
        switched = self.body.get("chat_template_kwargs")
        return bool(switched["enable_thinking"]) if switched else self.effort == "medium"

    @property
    def streamed(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def roles(self) -> list[str]:
        return [message["role"] for message in self.messages]

    @property
    def effort(self) -> str:
        return str(self.body.get("reasoning_effort", ""))


@dataclass(frozen=True)
class Turn:
    """What is answered; `raw` instead of it, if given."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    finish: str = "stop"
    prompt: int | None = 0
    status: int = 200
    raw: bytes | None = None
    unended: bool = False
    broken: bool = False


def _words(asked: Asked) -> int:
    """Count the words of a prompt; reasoning of earlier turns is dropped."""
    template = asked.body.get("chat_template_kwargs", {})
    texts = [str(message["content"]) for message in asked.messages]
    if template.get("preserve_thinking"):
        texts += [str(message.get("reasoning_content", "")) for message in asked.messages]
    return sum(len(text.split()) for text in texts)


def _called(text: str) -> tuple[tuple[str, str], ...]:
    if text.startswith("Book"):
        trip = {"start": "Paris", "end": "Rome", "stops": ["Lyon", "Turin"]}
        return (("book_trip", json.dumps({"trip": trip, "seats": 2})),)
    if "weather" not in text:
        return ()
    return tuple(("weather", json.dumps({"city": c})) for c in _CITIES if c in text)


def _said(asked: Asked) -> str:
    known = {
        "Repeat": asked.text.rpartition("else: ")[2],
        "What is my number": "41",
        "The password": "marigold",
    }
    if "banana" in str(asked.messages[0]["content"]):
        return "Banana."
    if "tool" in asked.roles:
        return "It is 23 degrees."
    if "tools" in asked.body and asked.text.startswith(("What is the weather", "Book")):
        return ""
    found = (said for begin, said in known.items() if asked.text.startswith(begin))
    longest = asked.text.rpartition("blue. ")[2] if "blue. What" in asked.text else asked.text
    return next(found, RIGHT.get(longest, "A fox jumps over a dog by the river."))


def right_turn(asked: Asked) -> Turn:
    """Return what a server without faults answers."""
    calls = _called(asked.text) if "tools" in asked.body and "tool" not in asked.roles else ()
    content, finish = _said(asked), "tool_calls" if calls else "stop"
    for stop in asked.body.get("stop", ()):
        content = content.partition(stop)[0]
    words = content.split(" ")
    if len(words) > asked.body["max_tokens"]:
        content, finish = " ".join(words[: asked.body["max_tokens"]]), "length"
    reasoning = "Let me see." if asked.thinking else ""
    return Turn(content, reasoning, calls, finish, _words(asked))


# --- faults

_Change = Callable[[Asked, Turn], Turn]
_Condition = Callable[[Asked], bool]


def when(condition: _Condition, **changes: Any) -> _Change:
    """Return a fault that changes fields of a turn; a function gets the turn."""

    def change(asked: Asked, turn: Turn) -> Turn:
        if not condition(asked):
            return turn
        return replace(turn, **{n: v(turn) if callable(v) else v for n, v in changes.items()})

    return change


def asks(text: str) -> _Condition:
    return lambda asked: text in asked.text


def _both(*conditions: _Condition) -> _Condition:
    return lambda asked: all(one(asked) for one in conditions)


def _streamed(asked: Asked) -> bool:
    return asked.streamed


def _thinking(asked: Asked) -> bool:
    return asked.thinking


def _not_thinking(asked: Asked) -> bool:
    return not asked.thinking


def _tools(asked: Asked) -> bool:
    return "tools" in asked.body


def _sampled() -> _Condition:
    """Every sixth of the answers that are sampled."""
    count = iter(range(10**6))
    return lambda asked: "temperature" not in asked.body and next(count) % 6 == 3


_FAILED = json.dumps({"error": {"message": "jinja: no such level", "type": "server"}}).encode()
_CAPITAL = asks("capital of France")


@dataclass(frozen=True)
class Fault:
    """A planted fault, and the check and words of its finding."""

    check: str
    words: str
    change: _Change


FAULTS: dict[str, Fault] = {
    "a wrong answer": Fault("behaviour", "'Lyon', expected", when(_CAPITAL, content="Lyon")),
    "reasoning without end": Fault(
        "behaviour",
        "the reasoning does not end",
        when(_thinking, content="", finish="length"),
    ),
    "reasoning though off": Fault(
        "behaviour", "there is a reasoning block", when(_not_thinking, reasoning="Hm.")
    ),
    "no reasoning though on": Fault(
        "behaviour", "thinking ON: no reasoning", when(_thinking, reasoning="")
    ),
    "colours swapped": Fault("behaviour", "'Blue.'", when(asks("image"), content="Blue.")),
    "a question that fails": Fault(
        "request", "HTTP 500", when(asks("Translate"), status=500, raw=_FAILED)
    ),
    "a refusal of plain questions": Fault(
        "request", "HTTP 400", when(asks("Translate"), status=400, raw=_FAILED)
    ),
    "an answer that is not JSON": Fault(
        "request", "not JSON: '<html>", when(asks("Translate"), raw=b"<html>\x1b[2J")
    ),
    "an answer without a message": Fault(
        "request", "without a message", when(asks("Translate"), raw=b'{"choices": [1]}')
    ),
    "a stream of other words": Fault(
        "streaming", "streamed 'A cat", when(_streamed, content=lambda t: "A cat" + t.content)
    ),
    "a stream without reasoning": Fault(
        "streaming", "streamed reasoning ''", when(_streamed, reasoning="")
    ),
    "a stream without an end": Fault(
        "streaming", "a stream that ends early", when(_streamed, unended=True)
    ),
    "a stream without a reason": Fault(
        "streaming", "without a finish_reason", when(_streamed, finish="")
    ),
    "a stream that breaks off": Fault("streaming", "broke off", when(_streamed, broken=True)),
    "a stream that is not JSON": Fault(
        "streaming", "not JSON: '{\"choices", when(_streamed, raw=b'data: {"choices\n\n')
    ),
    "a stream that ends in an error": Fault(
        "streaming",
        "out of memory",
        when(_streamed, raw=b'data: {"error": {"message": "out of memory"}}\n\n'),
    ),
    "a streamed call in pieces lost": Fault(
        "streaming",
        "streamed tool calls",
        when(_both(_streamed, _tools), calls=(("weather", '{"city": "Pa'),)),
    ),
    "a stop string ignored": Fault(
        "stop",
        "expected an answer that stops before 'Paris'",
        when(lambda asked: "stop" in asked.body, content="It is Paris."),
    ),
    "an end of turn as text": Fault(
        "stop", "<|im_end|>", when(_CAPITAL, content=lambda t: t.content + "<|im_end|>")
    ),
    "no end of turn": Fault("stop", "'length', expected 'stop'", when(_CAPITAL, finish="length")),
    "a limit ignored": Fault(
        "stop",
        "max_tokens 4, but",
        when(lambda asked: asked.body["max_tokens"] == 4, content="word " * 40),
    ),
    "a cut answer called whole": Fault(
        "stop",
        "of a cut answer",
        when(lambda asked: asked.body["max_tokens"] == 4, finish="stop"),
    ),
    "no tokens counted": Fault("usage", "0 prompt tokens", when(lambda _: True, prompt=0)),
    "empty answers": Fault("empty", "of 16 answers are empty", when(_sampled(), content="")),
    "characters in pieces": Fault(
        "unicode",
        "holds U+FFFD",
        when(_both(_streamed, asks("Repeat")), content=lambda t: t.content.replace("数", "\ufffd")),
    ),
    "Latin-1": Fault(
        "unicode",
        "expected 'Größe",
        when(asks("Repeat"), content=lambda t: t.content.encode().decode("latin-1")),
    ),
    "a call as text": Fault(
        "tools",
        "a tool call was not recognized",
        when(
            _both(_tools, asks("Paris? Use")),
            content="<tool_call>\n<function=weather>",
            calls=(),
            finish="stop",
        ),
    ),
    "a call that is not JSON": Fault(
        "tools",
        "expected a JSON object",
        when(_both(_tools, asks("Paris? Use")), calls=(("weather", "{'city': 'Paris'}"),)),
    ),
    "a call of another tool": Fault(
        "tools",
        "a call of 'functions.weather'",
        when(_both(_tools, asks("Paris? Use")), calls=(("functions.weather", "{}"),)),
    ),
    "a call with another reason": Fault(
        "tools",
        "'stop', expected 'tool_calls'",
        when(_both(_tools, asks("Paris? Use")), finish="stop"),
    ),
    "one call of two": Fault(
        "tools", "expected Paris and Rome", when(_tools, calls=lambda t: t.calls[:1])
    ),
    "flat arguments": Fault(
        "tools",
        "expected an object",
        when(asks("Book"), calls=(("book_trip", '{"trip": "{\\"start\\": 1}", "seats": 2}'),)),
    ),
    "numbers as text": Fault(
        "tools",
        "seats is '2', expected",
        when(asks("Book"), calls=(("book_trip", '{"trip": {"stops": []}, "seats": "2"}'),)),
    ),
    "a call for everything": Fault(
        "tools",
        "for a sum",
        when(_both(_tools, asks("2 + 2")), calls=(("weather", '{"city": "Four"}'),)),
    ),
    "a result ignored": Fault(
        "tools",
        "expected the tool's result, 23",
        when(lambda asked: "tool" in asked.roles, content="I cannot know."),
    ),
    "an effort that raises": Fault(
        "effort",
        "reasoning_effort 'medium': HTTP 500 (jinja: no such level)",
        when(lambda asked: asked.effort == "medium", status=500, raw=_FAILED),
    ),
    "an effort without an answer": Fault(
        "effort",
        "reasoning_effort 'high': ",
        when(lambda asked: asked.effort == "high", content=""),
    ),
    "a system message ignored": Fault(
        "roles", "expected 'banana'", when(lambda asked: "system" in asked.roles, content="Paris")
    ),
    "a developer message that raises": Fault(
        "roles",
        "HTTP 500",
        when(lambda asked: "developer" in asked.roles, status=500, raw=_FAILED),
    ),
    "an earlier turn forgotten": Fault(
        "turns", "expected '41'", when(asks("my number"), content="I do not know.")
    ),
    "a long input cut": Fault(
        "context", "the server cuts the input", when(asks("blue today"), prompt=180)
    ),
    "a long input not read": Fault(
        "context", "expected 'marigold'", when(asks("blue today"), content="I do not know.")
    ),
}
"""One for each check, and for each way in which it can fail."""


# --- the server


@dataclass
class FakeServer:
    """What the server does, and what it was sent.

    Args:
        change: its fault.
        routes: answers by path, in place of its own.
        owner: who owns its model, which names the server.
        models: the names of its models.
        key: what requests must bear.
        delay: seconds before each turn.
        port: to listen at; any if 0.
    """

    change: _Change = lambda _, turn: turn
    routes: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    owner: str = "vllm"
    models: tuple[str, ...] = (MODEL,)
    key: str = ""
    delay: float = 0.0
    port: int = 0
    heard: list[tuple[str, Any]] = field(default_factory=list)
    bearers: set[str] = field(default_factory=set)
    url: str = ""

    def listed(self) -> dict[str, Any]:
        rows = [{"id": n, "owned_by": self.owner, "max_model_len": 4096} for n in self.models]
        return {"object": "list", "data": rows}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits for an acknowledgement
    fake: FakeServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        self.answer(json.loads(self.rfile.read(length)))

    def answer(self, body: Any) -> None:
        fake = self.fake
        fake.heard.append((self.path, body))
        bearer = self.headers.get("authorization", "")
        fake.bearers.add(bearer)
        if fake.key and bearer != f"Bearer {fake.key}":
            return self.send(401, {"error": {"message": f"wrong key: {bearer}"}})
        if self.path in fake.routes:
            return self.routed(fake.routes[self.path](body))
        if self.path == "/v1/models":
            return self.send(200, fake.listed())
        if self.path == _CHAT:
            time.sleep(fake.delay)
            return self.turn(Asked(body))
        return self.send(404, {"error": {"message": "no such path"}})

    def routed(self, answer: Any) -> None:
        """Send an answer: JSON, bytes, or (status, headers, bytes)."""
        if isinstance(answer, tuple):
            return self.send_bytes(*answer)
        if isinstance(answer, bytes):
            return self.send_bytes(200, {}, answer)
        return self.send(200, answer)

    def send(self, status: int, body: Any) -> None:
        headers = {"content-type": "application/json"}
        self.send_bytes(status, headers, json.dumps(body).encode())

    def send_bytes(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def turn(self, asked: Asked) -> None:
        turn = self.fake.change(asked, right_turn(asked))
        if turn.raw is not None:
            self.send_bytes(turn.status, {}, turn.raw)
        elif asked.streamed:
            self.stream(turn)
        else:
            self.send(200, self.whole(turn))

    def whole(self, turn: Turn) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": turn.content or None}
        if turn.reasoning:
            message["reasoning_content"] = turn.reasoning
        if turn.calls:
            message["tool_calls"] = [
                {"id": "c", "type": "function", "function": {"name": n, "arguments": a}}
                for n, a in turn.calls
            ]
        completion = turn.content.count(" ") + turn.reasoning.count(" ") + 1
        usage = {"prompt_tokens": turn.prompt, "completion_tokens": completion}
        choice = {"index": 0, "message": message, "finish_reason": turn.finish or None}
        return {"model": self.fake.models[0], "choices": [choice], "usage": usage}

    def stream(self, turn: Turn) -> None:
        events = list(self.events(turn))
        if turn.broken:
            content = b"".join(events[:1])
            headers = {"content-length": str(len(content) + 10)}
            self.close_connection = True
            return self.send_bytes(200, headers, content)
        end = b"" if turn.unended else b"data: [DONE]\n\n"
        return self.send_bytes(200, {}, b"".join(events) + end)

    def events(self, turn: Turn) -> Iterator[bytes]:
        deltas: list[dict[str, Any]] = [{"role": "assistant"}]
        deltas += [{"reasoning_content": piece} for piece in _pieces(turn.reasoning)]
        deltas += [{"content": piece} for piece in _pieces(turn.content)]
        for place, (name, arguments) in enumerate(turn.calls):
            pieces = [{"name": name, "arguments": ""}]
            pieces += [{"arguments": piece} for piece in _pieces(arguments)]
            deltas += [{"tool_calls": [{"index": place, "function": one}]} for one in pieces]
        for delta in deltas:
            yield _event({"choices": [{"delta": delta, "finish_reason": None}]})
        yield _event({"choices": [{"delta": {}, "finish_reason": turn.finish or None}]})
        yield _event({"choices": [], "usage": {"prompt_tokens": turn.prompt}})


def _pieces(text: str) -> list[str]:
    return [text[i : i + 5] for i in range(0, len(text), 5)]


def _event(body: Any) -> bytes:
    return f"data: {json.dumps(body)}\r\n\r\n".encode()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell of faults of this server alone, not of clients that leave."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving(fake: FakeServer | None = None, **options: Any) -> Iterator[FakeServer]:
    """Run a server on this machine."""
    fake = fake or FakeServer(**options)
    handler = type("Handler", (_Handler,), {"fake": fake})
    server = _Server(("127.0.0.1", fake.port), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
