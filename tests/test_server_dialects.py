"""SGLang, Ollama and TGI, in the shapes of answers that their documentation and sources show.

- SGLang: ``python/sglang/srt/entrypoints/openai/protocol.py``, ``/server_info`` of its native API.
- Ollama: ``docs/openai.md``, ``docs/api.md`` (``/api/show``); reasoning is in ``reasoning``, each
  streamed tool call comes whole, and ``reasoning_effort`` "none" switches thinking off.
- TGI: ``docs/openapi.json`` (``/info``, ``ChatCompletion``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import qwen35
from fake_server import Asked, FakeServer, Turn, right_turn, serving

_CHAT = "/v1/chat/completions"
_Message = Callable[[Turn], dict[str, Any]]


def _calls(turn: Turn, **more: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"call_{n}", "type": "function", **more, "function": {"name": n, "arguments": a}}
        for n, a in turn.calls
    ]


def _sglang(turn: Turn) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": turn.content or None,
        "reasoning_content": turn.reasoning or None,
        "tool_calls": [{**one, "index": i} for i, one in enumerate(_calls(turn))] or None,
    }


def _ollama(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": turn.content}
    if turn.reasoning:
        message["reasoning"] = turn.reasoning
    if turn.calls:
        message["tool_calls"] = [{**one, "index": i} for i, one in enumerate(_calls(turn))]
    return message


def _tgi(turn: Turn) -> dict[str, Any]:
    """TGI parses no reasoning: it stands in the content."""
    thought = f"<think>\n{turn.reasoning}\n</think>\n\n" if turn.reasoning else ""
    if turn.calls:
        return {"role": "assistant", "tool_calls": _calls(turn)}
    return {"role": "assistant", "content": f"{thought}{turn.content}"}


def _answering(message: _Message, **choice: Any) -> Callable[[Any], Any]:
    """Return turns as a server of this kind sends them, whole or as a stream."""

    def answer(body: Any) -> Any:
        asked = Asked(body)
        turn = right_turn(asked)
        usage = {"prompt_tokens": turn.prompt, "completion_tokens": 3}
        if not asked.streamed:
            row = {"index": 0, "message": message(turn), "finish_reason": turn.finish, **choice}
            return {"id": "x", "object": "chat.completion", "choices": [row], "usage": usage}
        return b"".join(_events(message(turn), turn.finish, usage, choice))

    return answer


def _events(
    message: dict[str, Any], finish: str, usage: dict[str, Any], choice: dict[str, Any]
) -> Iterator[bytes]:
    deltas: list[dict[str, Any]] = []
    for name, value in message.items():
        if isinstance(value, str) and name != "role":
            middle = len(value) // 2
            deltas += [
                {"role": "assistant", name: part} for part in (value[:middle], value[middle:])
            ]
        elif isinstance(value, list):
            deltas += [{"tool_calls": [{"index": i, **one}]} for i, one in enumerate(value)]
    rows = [({"delta": delta, "finish_reason": None}, None) for delta in deltas]
    for row, _ in [*rows, ({"delta": {"content": ""}, "finish_reason": finish, **choice}, None)]:
        yield _event({"choices": [{"index": 0, **row}], "usage": None})
    yield _event({"choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return (
        f"data: {json.dumps({'id': 'x', 'object': 'chat.completion.chunk', **body})}\n\n".encode()
    )


_ROUTES: dict[str, tuple[str, dict[str, Any], str, Callable[[Any], Any]]] = {
    "sglang": (
        "sglang",
        {
            "/server_info": {
                "model_path": "/models/x",
                "context_length": 8192,
                "quantization": "fp8",
                "dtype": "auto",
                "speculative_algorithm": "EAGLE",
                "version": "0.5.9",
                "internal_states": [{"avg_spec_accept_length": 2.4}],
            },
        },
        "SGLang 0.5.9, context 4096, fp8, speculative decoding: EAGLE",
        _answering(_sglang, matched_stop=248046),
    ),
    "ollama": (
        "library",
        {
            "/api/version": {"version": "0.40.12"},
            "/api/show": {
                "license": "Apache",
                "template": "{{ .Prompt }}",
                "details": {
                    "parent_model": "",
                    "format": "gguf",
                    "family": "qwen35",
                    "families": ["qwen35"],
                    "parameter_size": "0.8B",
                    "quantization_level": "Q8_0",
                },
                "model_info": {"general.architecture": "qwen35", "qwen35.context_length": 262144},
                "capabilities": ["completion", "vision", "tools", "thinking"],
            },
        },
        "Ollama 0.40.12, context 4096, Q8_0",
        _answering(_ollama),
    ),
    "tgi": (
        "Qwen/Qwen3.5-0.8B",
        {
            "/info": {
                "model_id": "Qwen/Qwen3.5-0.8B",
                "model_sha": None,
                "model_pipeline_tag": "text-generation",
                "max_concurrent_requests": 128,
                "max_best_of": 2,
                "max_stop_sequences": 4,
                "max_input_tokens": 4095,
                "max_total_tokens": 8192,
                "validation_workers": 2,
                "max_client_batch_size": 4,
                "router": "text-generation-router",
                "version": "3.3.7",
            },
        },
        "TGI 3.3.7, context 8192",
        _answering(_tgi),
    ),
}


def _telling(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


@pytest.mark.parametrize("dialect", _ROUTES)
def test_a_sound_server_of_each_kind_passes(dialect: str) -> None:
    owner, told, described, answer = _ROUTES[dialect]
    routes = {path: _telling(value) for path, value in told.items()}
    routes[_CHAT] = answer
    with serving(FakeServer(routes=routes, owner=owner)) as fake:
        verdict = qwen35.verify(endpoint=fake.url, context=700)
    assert verdict.findings == ()
    assert verdict.served is not None
    assert (verdict.served.model.dialect, verdict.served.model.described) == (dialect, described)
    assert {answer.question.thinking for answer in verdict.answers} == {False, True}
    assert len(verdict.served.asked) == 20
