"""What the checks of a server share: whom they ask, about what, and what they saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from qwen35.display import cut
from qwen35.serving.chat_replies import ChatReply
from qwen35.serving.hidden_keys import hidden
from qwen35.verification.asking_server import ServerAsker
from qwen35.verification.questions import TASKS
from qwen35.verification.template_switches import TemplateText

__all__ = [
    "CAPITAL",
    "FUNCTION",
    "SUM",
    "SUMMARY",
    "CheckFunction",
    "Interview",
    "ServerCheck",
    "holds",
    "quoted",
]

_LOOKED = 1000
"""Characters of a text in which a key may be, to be blanked before the text is cut."""

SUM, _FRENCH, FUNCTION, SUMMARY, CAPITAL = TASKS


@dataclass
class Interview:
    """What the checks of a server share.

    Args:
        asker: asks it.
        template: the chat template that it should use, if known.
        context: tokens of the long input; 0 for none.

    Attributes:
        notes: what was seen that is no fault.
    """

    asker: ServerAsker
    template: TemplateText | None = None
    context: int = 0
    notes: list[str] = field(default_factory=list)


CheckFunction = Callable[[Interview], Iterator[str]]


@dataclass(frozen=True)
class ServerCheck:
    """A check of a server.

    Args:
        name: in findings, for programs.
        subject: what it asks, for people.
        run: asks, and yields what is wrong.
        applies: whether there is anything to ask.
    """

    name: str
    subject: str
    run: CheckFunction
    applies: Callable[[Interview], bool] = lambda _: True


def quoted(text: str) -> str:
    """Return a text between quotes, cut, without keys and control characters."""
    return repr(cut(hidden(text[:_LOOKED]), 60))


def holds(reply: ChatReply, word: str) -> bool:
    """Whether the answer after any reasoning holds a word."""
    return word.casefold() in reply.content.rpartition("</think>")[2].casefold()
