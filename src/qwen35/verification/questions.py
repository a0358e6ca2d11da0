"""The questions for every artifact, and the judgement of answers."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from qwen35.errors import UsageError

__all__ = ["IMAGE", "TASKS", "Halves", "Question", "is_right"]

MAX_NEW_TOKENS = 96


@dataclass(frozen=True)
class Halves:
    """A picture: its left half of one colour, its right half of another."""

    left: str
    right: str
    width: int = 448
    height: int = 224


@dataclass(frozen=True)
class Question:
    """A question and its right answer.

    Args:
        prompt: the user's turn.
        expect: what the answer must be or hold.
        match: ``word``: the answer is this word; ``any``: it holds one of these words; ``all``: all
            of them; ``words``: one sentence with all of these; ``contains``: it holds this text;
            ``code``: a Python function that holds this text; ``sum``: a Python function that
            returns the sum of its two arguments.
        thinking: the model must reason first, and finish its reasoning.
        image: a picture shown with the question.
        tokens: maximum length of the model's turn.
    """

    prompt: str
    expect: str
    match: str = "word"
    thinking: bool = False
    image: Halves | None = None
    tokens: int = MAX_NEW_TOKENS

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """Read a row of a questions.json."""
        shown = row.get("image")
        image = Halves(shown["left"], shown["right"], *shown["size"]) if shown else None
        return cls(row["prompt"], row["expect"], row["match"], bool(row["thinking"]), image)


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
"""Asked with thinking off, then on."""


def is_right(question: Question, turn: str) -> bool:
    """Judge the model's turn.

    >>> is_right(Question("2 + 2?", "4"), "4."), is_right(Question("2 + 2?", "4"), "It is 5")
    (True, False)
    """
    if question.thinking:
        thought, closed, turn = turn.partition("</think>")
        if not closed or not thought.strip():
            return False
    elif "<think>" in turn:
        return False
    return _matches(question, turn.strip())


def _matches(question: Question, answer: str) -> bool:
    expect = question.expect.casefold()
    words = re.findall(r"\w+", answer.casefold())
    if question.match == "word":
        return words == [expect]
    if question.match == "any":
        return not set(expect.split()).isdisjoint(words)
    if question.match == "all":
        return set(expect.split()) <= set(words)
    if question.match == "words":
        return set(expect.split()) <= set(words) and answer.count(".") == 1
    if question.match == "contains":
        return expect in answer.casefold()
    if question.match == "code":
        block = re.fullmatch(r"```python\n(.*)\n```", answer, flags=re.DOTALL)
        return block is not None and "def " in answer and expect in answer.casefold()
    if question.match == "sum":
        return _sums(answer)
    raise UsageError(question.prompt, f"match {question.match!r}", expected="word, words, ...")


def _sums(answer: str) -> bool:
    """Return whether an answer defines a Python function that adds its two arguments."""
    # parsed, never run: a model wrote it
    block = re.search(r"```(?:python|py)?\n(.*?)```", answer, flags=re.DOTALL)
    try:
        tree = ast.parse(block[1] if block else answer)
    except (SyntaxError, ValueError, RecursionError):
        return False
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        names = {argument.arg for argument in function.args.args}
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
                added = {side.id for side in (node.left, node.right) if isinstance(side, ast.Name)}
                if len(names) == 2 and added == names:
                    return True
    return False
