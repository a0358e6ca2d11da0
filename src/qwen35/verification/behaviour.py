"""Behaviour: what every artifact is asked, and what a right answer is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from qwen35.errors import Finding
from qwen35.verification.asking_transformers import Halves, Question, is_right

__all__ = [
    "IMAGE",
    "NOT_ASKED",
    "TASKS",
    "Answer",
    "AnsweringModel",
    "BehaviourResult",
    "ask",
    "behaviour_findings",
]

REPETITION_PENALTY = 1.15
"""What the commands before us decode with."""

IMAGE = Question(
    "What color is the left half of this image? Answer with one word.",
    "red",
    "any",
    image=Halves("red", "blue"),
    tokens=16,
)

TASKS = (
    Question("What is 2 + 2? Answer in one word.", "4 four", "any", tokens=256),
    Question("Translate to French: 'The sky is blue.'", "ciel bleu", "all", tokens=512),
    Question(
        "Write a Python function that returns the sum of two numbers.",
        "a function that returns a + b",
        "sum",
        tokens=1024,
    ),
    Question(
        "Summarize in one sentence: The quick brown fox jumps over the lazy dog near the river "
        "bank on a sunny day.",
        "fox dog",
        "words",
        tokens=512,
    ),
    Question("What is the capital of France?", "Paris", "contains", tokens=512),
)
"""Asked with thinking off and on."""

NOT_ASKED = "not asked anything: what was found must be repaired first"
"""A note on an artifact with other findings."""


class AnsweringModel(Protocol):
    """What answers questions: a model in some engine."""

    def ask(self, question: Question, *, repetition_penalty: float = 1.0) -> str:
        """Return the model's turn; with thinking it holds the reasoning too."""
        ...


@dataclass(frozen=True)
class Answer:
    """A question with what the model said.

    Args:
        question: what was asked.
        said: the whole turn.
        file: which of several was asked.
    """

    question: Question
    said: str
    file: str = ""

    @property
    def right(self) -> bool:
        """Whether it is right, with a finished reasoning block if and only if one was asked for."""
        return is_right(self.question, self.said)

    @property
    def fault(self) -> str:
        """What is wrong, in a few words."""
        thinking, said = self.question.thinking, self.said
        if thinking and "</think>" not in said:
            return "thinking ON: the reasoning does not end"
        if thinking and not said.partition("</think>")[0].strip():
            return "thinking ON: no reasoning"
        if not thinking and "<think>" in said:
            return "thinking OFF: there is a reasoning block"
        return f"{said.rpartition('</think>')[2].strip()[:80]!r}, expected {self.question.expect!r}"

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        asked = {**asdict(self.question), "said": self.said, "right": self.right}
        return {"file": self.file, **asked} if self.file else asked


@dataclass(frozen=True)
class BehaviourResult:
    """What came of asking an artifact everything.

    Args:
        answers: what it said.
        findings: what is wrong with that.
        notes: how it was asked.
    """

    answers: tuple[Answer, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()


def ask(
    engine: AnsweringModel, *, image: bool, thinking: tuple[bool, ...] = (False, True)
) -> Iterator[Answer]:
    """Ask everything, one after the other: the picture first, if the model sees."""
    if image:
        yield _ask(engine, IMAGE)
    for on in thinking:
        for task in TASKS:
            yield _ask(engine, replace(task, thinking=on))


def _ask(engine: AnsweringModel, question: Question) -> Answer:
    return Answer(question, engine.ask(question, repetition_penalty=REPETITION_PENALTY))


def behaviour_findings(answers: Iterable[Answer]) -> Iterator[Finding]:
    """Yield a finding for each wrong answer."""
    for answer in answers:
        if not answer.right:
            yield Finding("behaviour", answer.question.prompt, answer.fault)
