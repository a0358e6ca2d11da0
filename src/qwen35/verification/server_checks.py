"""What only a served model shows: streams, tool calls, template switches, limits, empty answers.

Each check is a row of `SERVER_CHECKS`: its name in findings, what it asks, and a function that asks
and yields what is wrong. A server that refuses a request cannot do it, which is a note; one that
fails at it has a finding.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Any

from qwen35.serving.chat_replies import ChatReply
from qwen35.threads import detached_map
from qwen35.verification.asking_server import said
from qwen35.verification.conversation_checks import CONVERSATION_CHECKS
from qwen35.verification.server_interview import (
    CAPITAL,
    FUNCTION,
    SUM,
    SUMMARY,
    Interview,
    ServerCheck,
    holds,
    quoted,
)
from qwen35.verification.tool_checks import TOOL_CHECKS, WEATHER, WEATHER_IN, calls_text

__all__ = ["SERVER_CHECKS"]

_SPECIAL = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
_REPEATED = 16
"""Of answers of which a sixth is empty, as reports have it, 16 are all full once in 18 times."""

_AT_ONCE = 4
_STRANGE = "Größe naïve 数学 Привет 🙂"
_LOST = "\ufffd"


# --- streams


def _difference(streamed: ChatReply, whole: ChatReply) -> str | None:
    """Return in what two replies differ."""
    pairs = (
        ("", streamed.content, whole.content),
        ("reasoning ", streamed.reasoning, whole.reasoning),
        ("finish_reason ", streamed.finish, whole.finish),
        ("tool calls ", calls_text(streamed), calls_text(whole)),
    )
    for what, one, other in pairs:
        if one.strip() != other.strip():
            return f"streamed {what}{quoted(one)}, expected as in one piece {quoted(other)}"
    return None


def _compared(interview: Interview, messages: list[Any], **options: Any) -> Iterator[str]:
    """Yield in what the streamed answer differs from the whole one, if that is always the same."""
    asker = interview.asker
    whole = asker.chat(messages, **options)
    streamed = asker.streamed(messages, **options)
    if whole.finish and not streamed.reply.finish:
        yield "the stream ends without a finish_reason"
        return
    different = _difference(streamed.reply, whole)
    if different is None:
        return
    if _difference(asker.chat(messages, **options), whole):
        interview.notes.append(
            "the same question has several answers at temperature 0: a stream was not compared"
        )
        return
    yield different


def _stream(interview: Interview) -> Iterator[str]:
    yield from _compared(interview, [said(SUMMARY.prompt)], tokens=SUMMARY.tokens)


def _stream_reasoning(interview: Interview) -> Iterator[str]:
    messages = [said(CAPITAL.prompt)]
    yield from _compared(interview, messages, tokens=CAPITAL.tokens, thinking=True)


def _thinks(interview: Interview) -> bool:
    return True in interview.asker.thinking


def _stream_call(interview: Interview) -> Iterator[str]:
    messages = [said(WEATHER_IN.format("Paris"))]
    yield from _compared(interview, messages, tokens=256, tools=[WEATHER])


# --- the end of an answer


def _ends(interview: Interview) -> Iterator[str]:
    reply = interview.asker.chat([said(CAPITAL.prompt)], tokens=CAPITAL.tokens)
    if reply.finish != "stop":
        yield f"finish_reason {quoted(reply.finish)}, expected 'stop'"
    for token in _SPECIAL:
        if token in reply.turn:
            yield f"the answer holds {token}: it is not taken for the end of the turn"


def _stop_string(interview: Interview) -> Iterator[str]:
    reply = interview.asker.chat([said(CAPITAL.prompt)], tokens=CAPITAL.tokens, stop=["Paris"])
    if holds(reply, "Paris"):
        yield f"{quoted(reply.content)}, expected an answer that stops before 'Paris'"


def _limit(interview: Interview) -> Iterator[str]:
    most = 4
    reply = interview.asker.chat([said(FUNCTION.prompt)], tokens=most)
    if (reply.completion_tokens or 0) > most or len(reply.turn) > 32 * most:
        told = reply.completion_tokens or 0
        count = told if told > most else f"{len(reply.turn)} characters"
        yield f"max_tokens {most}, but the answer has {count}"
    elif reply.finish != "length":
        yield f"finish_reason {quoted(reply.finish)} of a cut answer, expected 'length'"


def _counted(interview: Interview) -> Iterator[str]:
    short = interview.asker.chat([said(SUM.prompt)], tokens=SUM.tokens)
    words = " ".join(["The sky is blue."] * 20)
    long = interview.asker.chat([said(f"{words} {SUM.prompt}")], tokens=SUM.tokens)
    if short.prompt_tokens is None or long.prompt_tokens is None:
        interview.notes.append("the server does not count tokens (usage)")
    elif long.prompt_tokens - short.prompt_tokens < 80:
        yield (
            f"{short.prompt_tokens} prompt tokens for a short question, {long.prompt_tokens} with "
            "80 words more"
        )


def _empty(interview: Interview) -> Iterator[str]:
    asker = interview.asker

    def ask(_: int) -> bool:
        options = {"tokens": CAPITAL.tokens, "temperature": None}
        reply = asker.chat([said(CAPITAL.prompt)], **options)
        return not reply.content.rpartition("</think>")[2].strip()

    count = sum(detached_map(ask, range(_REPEATED), _AT_ONCE))
    if count:
        yield f"{count} of {_REPEATED} answers are empty"


# --- text


def _strange_signs(interview: Interview) -> Iterator[str]:
    messages = [said(f"Repeat this text exactly, and nothing else: {_STRANGE}")]
    whole = interview.asker.chat(messages, tokens=64)
    streamed = interview.asker.streamed(messages, tokens=64)
    for how, reply in (("", whole), ("streamed ", streamed.reply)):
        text = unicodedata.normalize("NFC", reply.content)
        if _LOST in text:
            yield f"{how}{quoted(text)} holds U+FFFD: characters were cut in pieces"
        elif not all(word in text for word in _STRANGE.split()):
            yield f"{how}{quoted(text)}, expected {_STRANGE!r}"


SERVER_CHECKS = (
    ServerCheck("streaming", "a stream", _stream),
    ServerCheck("streaming", "a stream with reasoning", _stream_reasoning, _thinks),
    ServerCheck("streaming", "a streamed tool call", _stream_call),
    ServerCheck("stop", "the end of an answer", _ends),
    ServerCheck("stop", "a stop string", _stop_string),
    ServerCheck("stop", "a limit of tokens", _limit),
    ServerCheck("usage", "counts of tokens", _counted),
    ServerCheck("empty", "a repeated question", _empty),
    ServerCheck("unicode", "a text beyond ASCII", _strange_signs),
    *TOOL_CHECKS,
    *CONVERSATION_CHECKS,
)
