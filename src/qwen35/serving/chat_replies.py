"""Chat completions of the OpenAI API, and what servers add to them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen35.errors import EndpointError
from qwen35.serving.json_values import count_in, list_in, parsed, text_in, value_in
from qwen35.serving.server_client import ServerClient

__all__ = ["CHAT_PATH", "ChatReply", "StreamedReply", "ToolCall", "chat", "streamed_chat"]

CHAT_PATH = "/v1/chat/completions"

_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of the reasoning beside the content: llama-server, SGLang and older vLLM; vLLM and Ollama;
the native interface of Ollama."""

_KINDS: dict[type, str] = {list: "a list", dict: "an object"}


@dataclass(frozen=True)
class ToolCall:
    """A call that the model wants made.

    Args:
        name: of the tool.
        arguments: their JSON text, as the server sent it.
    """

    name: str
    arguments: str

    @property
    def values(self) -> dict[str, Any] | None:
        """The arguments; None if they are no JSON object."""
        try:
            found = parsed(self.arguments)
        except ValueError:
            return None
        return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class ChatReply:
    """A model's turn.

    Args:
        content: its text.
        reasoning: the reasoning, if the server tells it apart.
        calls: of tools.
        finish: why it ended: ``stop``, ``length``, ``tool_calls``; empty if it is not told.
        prompt_tokens: of the prompt, if told.
        completion_tokens: of the turn, if told.
        model: the model's name, as the answer has it.
    """

    content: str
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    finish: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    model: str = ""

    @property
    def turn(self) -> str:
        """The whole turn as the model wrote it, as far as the server shows that."""
        if self.reasoning:
            ended = bool(self.content) or bool(self.calls) or self.finish != "length"
            return f"<think>{self.reasoning}" + (f"</think>{self.content}" if ended else "")
        return self.content


@dataclass(frozen=True)
class StreamedReply:
    """A turn that came in pieces.

    Args:
        reply: the pieces put together.
        first: seconds until the first piece of text came.
        seconds: until the end.
        pieces: number of pieces with text.
    """

    reply: ChatReply
    first: float
    seconds: float
    pieces: int


def chat(client: ServerClient, request: Mapping[str, Any]) -> ChatReply:
    """Ask for a turn.

    Raises:
        EndpointError: the server refused or failed, or the answer holds no turn.
    """
    answer = client.post(CHAT_PATH, dict(request))
    message = value_in(answer, "choices", 0, "message")
    if not isinstance(message, dict):
        raise EndpointError(f"{client.endpoint.url}{CHAT_PATH}", "an answer without a message")
    calls = list_in(message, "tool_calls")
    _check_text(client, message, "a message whose content is", "content")
    for entry in calls:
        _check_text(client, entry, "a tool call whose arguments are", "function", "arguments")
    return ChatReply(
        content=text_in(message, "content") or "",
        reasoning=_reasoning(message),
        calls=tuple(map(_call, calls)),
        finish=text_in(answer, "choices", 0, "finish_reason") or "",
        prompt_tokens=count_in(answer, "usage", "prompt_tokens"),
        completion_tokens=count_in(answer, "usage", "completion_tokens"),
        model=text_in(answer, "model") or "",
    )


def _check_text(client: ServerClient, value: Any, what: str, *path: str) -> None:
    """Refuse what is not the text that it must be, rather than take it for an empty one."""
    found = value_in(value, *path)
    if found is not None and not isinstance(found, str):
        kind = _KINDS.get(type(found), "a number, true or false")
        error = EndpointError(
            f"{client.endpoint.url}{CHAT_PATH}", f"{what} {kind}", expected="text"
        )
        error.status = 200
        raise error


def _reasoning(message: Any) -> str:
    found = (text_in(message, name) for name in _REASONING)
    return next((text for text in found if text), "")


def _call(entry: Any) -> ToolCall:
    return ToolCall(
        text_in(entry, "function", "name") or "", text_in(entry, "function", "arguments") or ""
    )


@dataclass
class _Pieces:
    """Pieces of a turn, put together."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, tuple[list[str], list[str]]] = field(default_factory=dict)
    finish: str = ""
    usage: Any = None
    model: str = ""

    def add(self, event: Any) -> bool:
        """Add an event; return whether it holds a part of the turn."""
        self.model = text_in(event, "model") or self.model
        self.usage = value_in(event, "usage") or self.usage
        self.finish = text_in(event, "choices", 0, "finish_reason") or self.finish
        delta = value_in(event, "choices", 0, "delta")
        content, reasoning = text_in(delta, "content") or "", _reasoning(delta)
        calls = list_in(delta, "tool_calls")
        self.content.append(content)
        self.reasoning.append(reasoning)
        for entry in calls:
            self._add_call(entry)
        return bool(content or reasoning or calls)

    def _add_call(self, entry: Any) -> None:
        place = count_in(entry, "index")
        names, arguments = self.calls.setdefault(
            len(self.calls) if place is None else place, ([], [])
        )
        piece = _call(entry)
        names.append(piece.name)
        arguments.append(piece.arguments)

    def reply(self) -> ChatReply:
        calls = [self.calls[place] for place in sorted(self.calls)]
        return ChatReply(
            content="".join(self.content),
            reasoning="".join(self.reasoning),
            calls=tuple(ToolCall("".join(n), "".join(a)) for n, a in calls),
            finish=self.finish,
            prompt_tokens=count_in(self.usage, "prompt_tokens"),
            completion_tokens=count_in(self.usage, "completion_tokens"),
            model=self.model,
        )


def streamed_chat(client: ServerClient, request: Mapping[str, Any]) -> StreamedReply:
    """Ask for a turn in pieces.

    Raises:
        EndpointError: the server refused or failed, or the stream breaks off or does not end.
    """
    pieces, begun, first, count = _Pieces(), time.monotonic(), 0.0, 0
    body = {**request, "stream": True, "stream_options": {"include_usage": True}}
    for event in _bounded(client, client.events(CHAT_PATH, body)):
        if pieces.add(event):
            first = first or time.monotonic() - begun
            count += 1
    return StreamedReply(pieces.reply(), first, time.monotonic() - begun, count)


_MOST_EVENTS = 100_000


def _bounded(client: ServerClient, events: Iterator[Any]) -> Iterator[Any]:
    for number, event in enumerate(events):
        if number >= _MOST_EVENTS:
            place = f"{client.endpoint.url}{CHAT_PATH}"
            raise EndpointError(place, f"a stream of more than {_MOST_EVENTS} events")
        yield event
