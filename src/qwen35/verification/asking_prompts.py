"""Ask an artifact one's own questions, with its chat template as it is by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from qwen35.errors import InputError
from qwen35.verification.bounded_rendering import Rendered, render

__all__ = ["ModelTurn", "PromptedArtifact", "PromptedModel", "TemplateDefaults", "turns"]

_AT_ONCE = 64
"""Prompts of a process that renders them, which may take three seconds."""


@dataclass(frozen=True)
class ModelTurn:
    """What a model wrote after a prompt.

    Args:
        text: the turn, with what the template has begun of the reasoning.
        ended: whether the model ended it, rather than a limit.
    """

    text: str
    ended: bool


@dataclass(frozen=True)
class TemplateDefaults:
    """A chat template, with none of its switches set.

    Args:
        subject: where it is.
        template: the template.
        tokens: special tokens by name.
    """

    subject: str
    template: str
    tokens: dict[str, str]

    def prompts(self, questions: Sequence[str]) -> Iterator[str]:
        """Yield the prompt for each question.

        Raises:
            InputError: the template refuses one, or goes beyond limits.
        """
        for start in range(0, len(questions), _AT_ONCE):
            for one in self._rendered(questions[start : start + _AT_ONCE]):
                if one.failed:
                    raise InputError(self.subject, f"refuses a task ({one.text:.200})")
                yield one.text

    def _rendered(self, questions: Sequence[str]) -> list[Rendered]:
        asked = [
            {
                **self.tokens,
                "messages": [{"role": "user", "content": question}],
                "add_generation_prompt": True,
            }
            for question in questions
        ]
        return render([self.template], asked)[0]


class PromptedModel(Protocol):
    """A model in some engine that continues prompts."""

    @property
    def defaults(self) -> TemplateDefaults:
        """Its chat template."""
        ...

    def turn(self, prompt: str, tokens: int) -> ModelTurn:
        """Return what it writes, greedily: at most `tokens` tokens."""
        ...


@dataclass(frozen=True)
class PromptedArtifact:
    """A model of an artifact that can be loaded for prompts.

    Args:
        name: of the folder or file.
        engine: that runs it.
        loaded: loads it until the end of a ``with`` block.
    """

    name: str
    engine: str
    loaded: Callable[[], AbstractContextManager[PromptedModel]]


def turns(model: PromptedModel, questions: Sequence[str], tokens: int) -> Iterator[ModelTurn]:
    """Yield the model's turn after each question, of at most `tokens` tokens.

    Raises:
        InputError: the chat template refuses a question, or the engine cannot answer it.
    """
    for prompt in model.defaults.prompts(questions):
        turn = model.turn(prompt, tokens)
        begun = prompt.rfind("<think>") > prompt.rfind("</think>")
        yield ModelTurn(f"<think>{turn.text}", turn.ended) if begun else turn
