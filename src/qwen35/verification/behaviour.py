"""Behaviour: the questions for every artifact, and the findings on its answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from qwen35.errors import Finding
from qwen35.serving.hidden_keys import hidden
from qwen35.verification.questions import IMAGE, TASKS, Question, is_right

__all__ = [
    "IMAGE",
    "NOT_ASKED",
    "REPETITION_PENALTY",
    "TASKS",
    "Answer",
    "AnsweringModel",
    "BehaviourResult",
    "ask",
    "asked",
    "behaviour_findings",
]

REPETITION_PENALTY = 1.15
"""As in the earlier commands."""

_REASONED = 512
"""Tokens for reasoning and a short answer."""

_RECORDED = 2**16
"""Characters of a turn in records: no sound answer has as many."""

NOT_ASKED = "no questions asked: fix the findings first"
"""The note on an artifact with findings at a lower depth."""


class AnsweringModel(Protocol):
    """A model in some engine that answers questions."""

    @property
    def thinking(self) -> tuple[bool, ...]:
        """Whether questions can be asked without thinking, and with."""
        ...

    def ask(self, question: Question, *, repetition_penalty: float = 1.0) -> str:
        """Return the model's turn, including the reasoning if it thinks."""
        ...


@dataclass(frozen=True)
class Answer:
    """A question and the model's answer.

    Args:
        question: the question.
        turn: the model's whole turn.
        file: the file that was asked, if there are several.
    """

    question: Question
    turn: str
    file: str = ""

    @property
    def right(self) -> bool:
        """Whether it is right, and reasons if and only if thinking is on."""
        return is_right(self.question, self.turn)

    @property
    def fault(self) -> str:
        """What is wrong with it, in a few words."""
        thinking, turn = self.question.thinking, self.turn
        if thinking and "</think>" not in turn:
            return "thinking ON: the reasoning does not end"
        if thinking and not turn.partition("</think>")[0].strip():
            return "thinking ON: no reasoning"
        if not thinking and "<think>" in turn:
            return "thinking OFF: there is a reasoning block"
        said = hidden(turn.rpartition("</think>")[2].strip()[:_RECORDED])[:80]
        return f"{said!r}, expected {self.question.expect!r}"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        said = hidden(self.turn[:_RECORDED])
        values = {**asdict(self.question), "said": said, "right": self.right}
        return {"file": self.file, **values} if self.file else values


@dataclass(frozen=True)
class BehaviourResult:
    """The result of asking an artifact all questions.

    Args:
        answers: its answers.
        findings: wrong answers and loading errors.
        notes: how it was asked.
    """

    answers: tuple[Answer, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()


def ask(
    engine: AnsweringModel, *, image: bool, thinking: tuple[bool, ...] = (False, True)
) -> Iterator[Answer]:
    """Ask all questions in turn, the picture first if the model sees.

    Without thinking, with it, or both, as far as the chat template can switch it.
    """
    if image:
        yield _ask(engine, asked(engine, IMAGE))
    for on in thinking:
        if on in engine.thinking:
            for task in TASKS:
                yield _ask(engine, replace(task, thinking=on))


def asked(engine: AnsweringModel, question: Question) -> Question:
    """Return a question with thinking on if the template always asks for reasoning."""
    if question.thinking in engine.thinking:
        return question
    on = engine.thinking[0]
    return replace(question, thinking=on, tokens=max(question.tokens, _REASONED))


def _ask(engine: AnsweringModel, question: Question) -> Answer:
    return Answer(question, engine.ask(question, repetition_penalty=REPETITION_PENALTY))


def behaviour_findings(answers: Iterable[Answer]) -> Iterator[Finding]:
    """Yield a finding for each wrong answer."""
    for answer in answers:
        if not answer.right:
            yield Finding("behaviour", answer.question.prompt, answer.fault)
