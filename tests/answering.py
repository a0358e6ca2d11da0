"""What answers the questions of depth behaviour as a test wants them answered."""

from __future__ import annotations

from collections.abc import Callable

from qwen35.verification.behaviour import IMAGE
from qwen35.verification.questions import Question

__all__ = ["RIGHT", "Scripted"]

RIGHT = {
    "What is 2 + 2? Answer in one word.": "Four",
    "Translate to French: 'The sky is blue.'": "**Le ciel est bleu.**",
    "Write a Python function that returns the sum of two numbers.": (
        "Sure:\n```python\ndef add(x: int, y: int) -> int:\n    z = y + x\n    return z\n```"
    ),
    "What is the capital of France?": "The capital of France is **Paris**.",
    IMAGE.prompt: "Red.",
}


class Scripted:
    """Answers every question rightly but for what `change` does to it."""

    def __init__(self, change: Callable[[Question, str], str] = lambda _, said: said) -> None:
        self.change = change
        self.penalties: set[float] = set()
        self.thinking = (False, True)
        self.notes: tuple[str, ...] = ()

    def ask(self, question: Question, *, repetition_penalty: float = 1.0) -> str:
        self.penalties.add(repetition_penalty)
        said = RIGHT.get(question.prompt, "A fox jumps over a dog by the river.")
        return self.change(
            question, f"Let me see.\n</think>\n\n{said}" if question.thinking else said
        )
