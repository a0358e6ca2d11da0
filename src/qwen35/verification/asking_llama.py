"""Ask a GGUF file in llama.cpp, with the chat template and the tokens of the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen35.array_types import F32
from qwen35.checkpoint.gguf_header import GgufHeader
from qwen35.closing import Closing
from qwen35.engines.llama import Llama
from qwen35.errors import InputError
from qwen35.verification.asking_prompts import ModelTurn
from qwen35.verification.chat_prompts import ChatPrompts
from qwen35.verification.gguf_sense import TEMPLATE, token_texts
from qwen35.verification.questions import Question

__all__ = ["LlamaAsker"]

_AT_ONCE = 512


class LlamaAsker(Closing):
    """A GGUF file that answers questions, greedily.

    Args:
        container: the file's header.
        threads: threads of llama.cpp.
        context: tokens of a prompt and its turn; by default, enough for the questions.

    Attributes:
        thinking: whether questions can be asked without thinking, and with.
        notes: what is special about asking it.

    Raises:
        InputError: llama.cpp cannot load it, or its chat template refuses questions.
        UsageError: llama-cpp-python is not installed.
    """

    def __init__(self, container: GgufHeader, threads: int = 1, context: int | None = None) -> None:
        keys = container.keys
        self.prompts = ChatPrompts(container.path.name, keys.get(TEMPLATE), token_texts(keys))
        self.thinking, self.notes = self.prompts.thinking, self.prompts.notes
        self.defaults = self.prompts.defaults
        self._file = container.path.name
        pieces: dict[str, Any] = {} if context is None else {"at_once": _AT_ONCE}
        self._llama = Llama(
            container.path, context=context or self.prompts.context, threads=threads, **pieces
        )

    def close(self) -> None:
        """Free the model; may be called twice."""
        self._llama.close()

    def turn(self, prompt: str, tokens: int) -> ModelTurn:
        """Return what the model writes after a prompt, greedily.

        Raises:
            InputError: the prompt is too long.
        """
        ids = self._llama.encode(prompt)
        most = self._llama.context - tokens
        if len(ids) > most:
            found = f"a prompt of {len(ids)} tokens"
            raise InputError(self._file, found, expected=f"at most {most}")
        turn = self._llama.answer(ids, tokens)
        return ModelTurn(self._llama.decode(turn), len(turn) < tokens)

    def ask(self, question: Question, *, repetition_penalty: float = 1.0) -> str:
        """Return the model's turn, including the reasoning if it thinks."""

        def penalized(row: F32, seen: Sequence[int]) -> F32:
            """Penalize the logits of tokens seen, as transformers does (Keskar 2019)."""
            changed = row.copy()
            places = np.unique(np.array(seen))
            values = changed[places]
            changed[places] = np.where(
                values > 0, values / repetition_penalty, values * repetition_penalty
            )
            return changed

        prompt = self._llama.encode(self.prompts.write(question))
        turn = self._llama.decode(self._llama.answer(prompt, question.tokens, penalized))
        return self.prompts.answer(question, turn)
