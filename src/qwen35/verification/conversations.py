"""Conversations on which two chat templates are compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["text_conversations", "vision_conversations"]

_ASK = {"role": "user", "content": "What is 2 + 3?"}
_SYSTEM = {"role": "system", "content": "Answer in one word."}
_AGAIN = {"role": "user", "content": "  And in\nFrench? "}
_REPLY = {"role": "assistant", "content": "Five."}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather <today> & tomorrow, in °C",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "clock", "parameters": {}}},
]


def _call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": "1", "function": {"name": name, "arguments": arguments}}


_CALL = {
    "role": "assistant",
    "content": "Let me look.",
    "tool_calls": [_call("weather", city="Köln", days=2, units=["C"]), _call("clock")],
}
_RESULTS = [
    {"role": "tool", "content": '{"celsius": 21}'},
    {"role": "tool", "content": "12:00"},
]
_MESSAGES: dict[str, list[dict[str, Any]]] = {
    "question": [_ASK],
    "system": [_SYSTEM, _ASK],
    "several turns": [_ASK, _REPLY, _AGAIN],
    "several turns with a system message": [_SYSTEM, _ASK, _REPLY, _AGAIN, _REPLY, _ASK],
    "reasoning kept apart": [
        _ASK,
        {**_REPLY, "reasoning_content": "2 + 3 is 5."},
        _AGAIN,
        {**_REPLY, "reasoning_content": "It is cinq."},
    ],
    "reasoning in the answer": [
        _ASK,
        {**_REPLY, "content": "<think>\n2 + 3\n</think>\n\nFive."},
        _AGAIN,
    ],
    "reasoning at the end": [
        _ASK,
        {**_REPLY, "content": "Hm. <think>\n2 + 3\n</think>\n\nFive."},
    ],
    "unfinished answer": [_ASK, {"role": "assistant", "content": "<think>\nWell"}],
    "empty texts": [{"role": "system", "content": ""}, {"role": "user", "content": ""}],
    "text in parts": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "3?"}],
        },
    ],
    "special tokens in a text": [{"role": "user", "content": "<|im_end|> {{ 1 }} <b>&</b>"}],
    "late system message": [_ASK, _REPLY, _SYSTEM, _AGAIN],
    "unknown role": [_ASK, {"role": "critic", "content": "No."}],
    "no message": [],
}
_WITH_TOOLS: dict[str, list[dict[str, Any]]] = {
    "tools": [_ASK],
    "tools and a system message": [_SYSTEM, _ASK],
    "tool called": [_ASK, _CALL],
    "tool answered": [_ASK, _CALL, *_RESULTS],
    "tool answered, then more": [_SYSTEM, _ASK, _CALL, *_RESULTS, _REPLY, _AGAIN],
    "tool called without a word": [_ASK, {**_CALL, "content": ""}, _RESULTS[0]],
    "tool called after reasoning": [_ASK, {**_CALL, "reasoning_content": "I need it."}, *_RESULTS],
}
_IMAGE = {"type": "image", "image": "a.png"}
_VIDEO = {"type": "video", "video": "a.mp4"}
_SEEN: dict[str, list[dict[str, Any]]] = {
    "image": [{"role": "user", "content": [_IMAGE, {"type": "text", "text": "What is it?"}]}],
    "image by address": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}
    ],
    "video": [{"role": "user", "content": [_VIDEO, {"type": "text", "text": "What happens?"}]}],
    "images in several turns": [
        {"role": "user", "content": [_IMAGE, _VIDEO, _IMAGE]},
        _REPLY,
        {"role": "user", "content": [{"type": "text", "text": "And this?"}, _IMAGE]},
    ],
    "image in a system message": [{"role": "system", "content": [_IMAGE]}, _ASK],
}
_THINKING: dict[str, dict[str, Any]] = {
    "": {},
    ", thinking on": {"enable_thinking": True},
    ", thinking off": {"enable_thinking": False},
}


def text_conversations() -> dict[str, dict[str, Any]]:
    """Return variables for a template by the conversation's name; none shows a picture."""
    return dict(_varied(_MESSAGES, {})) | dict(_varied(_WITH_TOOLS, {"tools": _TOOLS}))


def vision_conversations() -> dict[str, dict[str, Any]]:
    """Return conversations with pictures and videos."""
    numbered = dict(_varied(_SEEN, {"add_vision_id": True}))
    return dict(_varied(_SEEN, {})) | {f"{name}, numbered": one for name, one in numbered.items()}


def _varied(
    table: dict[str, list[dict[str, Any]]], more: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each conversation with thinking on, off and unsaid, and without a prompt to answer."""
    more = {"tools": None, "documents": None, **more}  # as transformers does
    for name, messages in table.items():
        for ending, thinking in _THINKING.items():
            prompt = {"add_generation_prompt": True}
            yield name + ending, {"messages": messages, **prompt, **thinking, **more}
        silent = {"add_generation_prompt": False}
        yield f"{name}, no prompt", {"messages": messages, **silent, **more}
