"""Ask a GGUF file in llama.cpp, with the chat template and the tokens of the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen35.array_types import F32
from qwen35.checkpoint.gguf_header import GgufHeader
from qwen35.closing import Closing
from qwen35.engines.llama import Llama
from qwen35.errors import InputError
from qwen35.verification.asking_transformers import Question

__all__ = ["LlamaAsker"]

_CONTEXT = 2048


class LlamaAsker(Closing):
    """A GGUF file that answers questions, greedily.

    Args:
        container: the file's header.
        threads: threads of llama.cpp.

    Raises:
        InputError: llama.cpp cannot load it, or its chat template does not compile.
        UsageError: llama-cpp-python is not installed.
    """

    def __init__(self, container: GgufHeader, threads: int = 1) -> None:
        self._template = compile_template(container.path, container.keys["tokenizer.chat_template"])
        self._llama = Llama(container.path, context=_CONTEXT, threads=threads)

    def close(self) -> None:
        """Free the model; may be called twice."""
        self._llama.close()

    def ask(self, question: Question, *, repetition_penalty: float = 1.0) -> str:
        """Return the model's turn, including the reasoning if it thinks."""
        text = self._template.render(
            messages=[{"role": "user", "content": question.prompt}],
            add_generation_prompt=True,
            enable_thinking=question.thinking,
        )

        def penalized(row: F32, seen: Sequence[int]) -> F32:
            """Penalize the logits of tokens seen, as transformers does (Keskar 2019)."""
            changed = row.copy()
            places = np.unique(np.array(seen))
            values = changed[places]
            changed[places] = np.where(
                values > 0, values / repetition_penalty, values * repetition_penalty
            )
            return changed

        prompt = self._llama.encode(text)
        return self._llama.decode(self._llama.answer(prompt, question.tokens, penalized))


def compile_template(path: Path, source: str) -> Any:
    """Compile a chat template with the settings of transformers, in a sandbox."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )

    def refuse(message: str) -> None:
        raise InputError(path.name, f"its chat template refuses the question ({message})")

    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source)
    except TemplateError as error:
        found = f"its chat template does not compile ({error})"
        raise InputError(path.name, found) from error
