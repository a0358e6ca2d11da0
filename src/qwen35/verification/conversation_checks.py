"""Checks of chat template, roles, several turns and long input, over the OpenAI API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwen35.errors import EndpointError
from qwen35.serving.chat_replies import ChatReply
from qwen35.verification.asking_server import said
from qwen35.verification.server_interview import (
    CAPITAL,
    CheckFunction,
    Interview,
    ServerCheck,
    holds,
    quoted,
)

__all__ = ["CONVERSATION_CHECKS"]

_LEAST_KEPT = 20
"""Tokens by which a prompt must grow to hold the earlier reasoning, which has about 60."""


def _efforts(interview: Interview) -> Iterator[str]:
    documented = interview.template.efforts if interview.template else None
    for level in documented or ("low", "medium", "high"):
        options: dict[str, Any] = {"reasoning_effort": level}
        if documented:
            options["template"] = {"reasoning_effort": level}
        try:
            reply = interview.asker.chat(
                [said(CAPITAL.prompt)], tokens=2 * CAPITAL.tokens, thinking=True, **options
            )
        except EndpointError as error:
            if not error.status:
                raise
            if documented or not error.refused:
                yield f"reasoning_effort {level!r}: {error.message}"
            else:
                interview.notes.append(f"reasoning_effort {level!r}: refused")
            continue
        if not holds(reply, CAPITAL.expect):
            yield f"reasoning_effort {level!r}: {quoted(reply.turn)}, expected 'Paris'"


def _has_efforts(interview: Interview) -> bool:
    return interview.template is None or bool(interview.template.efforts)


def _has_switches(interview: Interview) -> bool:
    return interview.template is not None and bool(interview.template.switches)


def _switches(interview: Interview) -> Iterator[str]:
    for name, value in interview.template.switches if interview.template else ():
        try:
            reply = interview.asker.chat(
                [said(CAPITAL.prompt)],
                tokens=2 * CAPITAL.tokens,
                thinking=False,
                template={name: value},
            )
        except EndpointError as error:
            if not error.status:
                raise
            yield f"{name} {value}: {error.message}"
            continue
        if not holds(reply, CAPITAL.expect):
            yield f"{name} {value}: {quoted(reply.turn)}, expected 'Paris'"


def _instructed(role: str) -> CheckFunction:
    def check(interview: Interview) -> Iterator[str]:
        rule = "Whatever is asked, answer with this one word: banana."
        messages = [{"role": role, "content": rule}, said(CAPITAL.prompt)]
        reply = interview.asker.chat(messages, tokens=64)
        if not holds(reply, "banana"):
            yield f"{quoted(reply.content)}, expected 'banana', as the message says"

    return check


# --- several turns

_REASONED = " ".join(["The user tells me a number and I keep it in mind."] * 5)


def _remembered(interview: Interview) -> Iterator[str]:
    messages = [
        said("My number is 41. Remember it."),
        {"role": "assistant", "content": "I will."},
        said("What is my number?"),
    ]
    reply = interview.asker.chat(messages, tokens=64)
    if not holds(reply, "41"):
        yield f"{quoted(reply.content)}, expected '41' from an earlier turn"


def _turns(*, reasoned: bool) -> list[dict[str, Any]]:
    turn = {"role": "assistant", "content": "I will."}
    if reasoned:
        turn |= {"reasoning_content": _REASONED, "reasoning": _REASONED}
    return [said("My number is 41. Remember it."), turn, said("What is my number?")]


def _growth(interview: Interview, **template: Any) -> int | None:
    """Return by how many tokens the earlier reasoning makes a prompt longer; None if untold."""
    counts = [
        interview.asker.chat(_turns(reasoned=one), tokens=1, template=template).prompt_tokens
        for one in (False, True)
    ]
    without, within = counts
    return None if without is None or within is None else within - without


def _earlier_reasoning(interview: Interview) -> Iterator[str]:
    """Compare what the prompt holds of earlier reasoning with what the template says."""
    template = interview.template
    modes: list[dict[str, Any]] = [{}]
    if template and ("preserve_thinking", True) in template.switches:
        modes.append({"preserve_thinking": True})
    for mode in modes:
        grown = _growth(interview, **mode)
        if grown is None:
            return
        kept = grown >= _LEAST_KEPT
        when = "with preserve_thinking" if mode else "by default"
        wanted = template.keeps_reasoning(_turns, mode) if template else None
        if wanted is None:
            word = "kept in" if kept else "dropped from"
            interview.notes.append(f"reasoning of earlier turns is {word} the prompt {when}")
        elif kept != wanted:
            word, other = ("in", "dropped") if kept else ("not in", "kept")
            yield f"{when}, earlier reasoning is {word} the prompt, the template has it {other}"


# --- long input

_SENTENCE = "The sky is blue today. "
_ROOM = 96


def _long_input(interview: Interview) -> Iterator[str]:

    def ask(count: int) -> ChatReply:
        text = f"The password is marigold. {_SENTENCE * count}What is the password?"
        return interview.asker.chat([said(text)], tokens=32)

    one, many = ask(1).prompt_tokens, ask(101).prompt_tokens
    each = (many - one) / 100 if many and one and many > one + 100 else 6.0
    count = max(1, int((interview.context - _ROOM - (one or 32)) / each))
    reply, wanted = ask(count), (one or 32) + int(each * (count - 1))
    if reply.prompt_tokens is not None and reply.prompt_tokens < 0.9 * wanted:
        yield f"{reply.prompt_tokens} of {wanted} prompt tokens arrive: the server cuts the input"
    elif not holds(reply, "marigold"):
        yield f"{quoted(reply.content)}, expected 'marigold', the first word of the input"


CONVERSATION_CHECKS = (
    ServerCheck("effort", "levels of effort", _efforts, _has_efforts),
    ServerCheck("switches", "switches of the template", _switches, _has_switches),
    ServerCheck("roles", "a system message", _instructed("system")),
    ServerCheck("roles", "a developer message", _instructed("developer")),
    ServerCheck("turns", "an earlier turn", _remembered),
    ServerCheck("turns", "earlier reasoning", _earlier_reasoning),
    ServerCheck("context", "a long input", _long_input, lambda one: one.context > 0),
)
