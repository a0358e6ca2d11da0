"""Checks of tool calls over the OpenAI API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwen35.serving.chat_replies import ChatReply
from qwen35.verification.asking_server import said
from qwen35.verification.server_interview import SUM, Interview, ServerCheck, holds, quoted

__all__ = ["TOOL_CHECKS", "WEATHER", "WEATHER_IN", "calls_text"]

_CALL_MARKS = ("<tool_call>", "</tool_call>", "<function=", "<parameter=")

WEATHER_IN = "What is the weather in {}? Use the tool."


def _tool(name: str, description: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


_TEXT = {"type": "string"}
WEATHER = _tool("weather", "The weather in a city.", city=_TEXT)
_TRIP = _tool(
    "book_trip",
    "Book a trip.",
    trip={
        "type": "object",
        "properties": {
            "start": _TEXT,
            "end": _TEXT,
            "stops": {"type": "array", "items": _TEXT},
        },
        "required": ["start", "end", "stops"],
    },
    seats={"type": "integer"},
)


def calls_text(reply: ChatReply) -> str:
    """Return the calls of a turn as text."""
    return ", ".join(f"{call.name}({call.arguments})" for call in reply.calls)


def _called(reply: ChatReply, name: str) -> Iterator[str]:
    """Yield what is wrong with the form of calls of one tool."""
    marks = [mark for mark in _CALL_MARKS if mark in reply.content]
    if marks:
        yield f"the answer holds {marks[0]}: a tool call was not recognized"
    elif not reply.calls:
        yield f"no tool call, but {quoted(reply.content)}"
    elif reply.finish != "tool_calls":
        yield f"finish_reason {quoted(reply.finish)}, expected 'tool_calls'"
    for call in reply.calls:
        if call.name != name:
            yield f"a call of {quoted(call.name)}, expected {name!r}"
        elif call.values is None:
            yield f"arguments {quoted(call.arguments)}, expected a JSON object"


def _quoted(value: Any) -> str:
    """Name a value of JSON: one with parts may be nested too deeply to print."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return quoted(str(value))


def _cities(reply: ChatReply) -> list[str]:
    cities = ((call.values or {}).get("city") for call in reply.calls)
    return sorted(city.casefold() if isinstance(city, str) else "" for city in cities)


def _one_call(interview: Interview) -> Iterator[str]:
    messages = [said(WEATHER_IN.format("Paris"))]
    reply = interview.asker.chat(messages, tokens=256, tools=[WEATHER])
    faults = list(_called(reply, "weather"))
    if not faults and _cities(reply) != ["paris"]:
        faults = [f"called with {quoted(calls_text(reply))}, expected the city Paris, once"]
    yield from faults


def _several_calls(interview: Interview) -> Iterator[str]:
    ask = "What is the weather in Paris, and what in Rome? Call the tool once for each city."
    reply = interview.asker.chat([said(ask)], tokens=512, tools=[WEATHER])
    faults = list(_called(reply, "weather"))
    if not faults and _cities(reply) != ["paris", "rome"]:
        faults = [f"called with {quoted(calls_text(reply))}, expected Paris and Rome, once each"]
    yield from faults


def _nested_call(interview: Interview) -> Iterator[str]:
    ask = "Book a trip for 2 from Paris to Rome with stops in Lyon and Turin. Use the tool."
    reply = interview.asker.chat([said(ask)], tokens=512, tools=[_TRIP])
    faults = list(_called(reply, "book_trip"))
    values = reply.calls[0].values if reply.calls and not faults else None
    for name, kind, called in (("trip", dict, "an object"), ("seats", int, "a whole number")):
        value = (values or {}).get(name)
        if values is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            faults.append(f"{name} is {_quoted(value)}, expected {called}")
    if values is not None and not faults and not isinstance(values["trip"].get("stops"), list):
        faults.append(f"stops are {_quoted(values['trip'].get('stops'))}, expected a list")
    yield from faults


def _no_call(interview: Interview) -> Iterator[str]:
    messages, tools = [said(SUM.prompt)], [WEATHER, _TRIP]
    reply = interview.asker.chat(messages, tokens=SUM.tokens, tools=tools)
    if reply.calls:
        yield f"called {quoted(calls_text(reply))} for a sum"
    elif not (holds(reply, "4") or holds(reply, "four")):
        yield f"{quoted(reply.content)}, expected '4 four'"


def _tool_result(interview: Interview) -> Iterator[str]:
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    call = {"id": "call_1", "type": "function", "function": function}
    messages = [
        said("How many degrees is it in Paris?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"degrees": 23, "sky": "clear"}'},
    ]
    reply = interview.asker.chat(messages, tokens=128, tools=[WEATHER])
    if not holds(reply, "23"):
        yield f"{quoted(reply.content)}, expected the tool's result, 23"


TOOL_CHECKS = (
    ServerCheck("tools", "one call", _one_call),
    ServerCheck("tools", "several calls", _several_calls),
    ServerCheck("tools", "nested arguments", _nested_call),
    ServerCheck("tools", "no call wanted", _no_call),
    ServerCheck("tools", "a tool's result", _tool_result),
)
