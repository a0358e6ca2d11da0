"""Ask a checkpoint in vLLM, with prompts that a bounded child renders, and with pictures."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qwen35.engines.torch_model import torch_and_transformers
from qwen35.errors import UsageError
from qwen35.verification.asking_transformers import UNSEEN, as_sentence, drawn, prompts_of
from qwen35.verification.questions import Question

__all__ = ["VllmAsker", "check_vllm"]


def check_vllm() -> None:
    """Check that vLLM is installed, without importing it.

    Raises:
        UsageError: it is not.
    """
    if find_spec("vllm") is None:
        raise UsageError(
            "--engine vllm",
            "vllm is not installed",
            hint="run qwen35 in the environment of your vLLM",
        )


class VllmAsker:
    """An artifact that answers questions in vLLM, greedily, on the device vLLM was built for.

    Args:
        folder: the artifact.
        vision: whether it sees pictures.

    Attributes:
        vision: whether it can be shown pictures.
        thinking: whether questions can be asked without thinking, and with.
        notes: what is special about asking it.

    Raises:
        InputError: there is no tokenizer, or the chat template refuses questions.
    """

    def __init__(self, folder: Path, *, vision: bool) -> None:
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for data
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM, SamplingParams  # late: it reads these variables when imported

        _, transformers = torch_and_transformers("asking the model")
        _, self.prompts = prompts_of(folder, transformers)
        self.thinking, self.notes = self.prompts.thinking, self.prompts.notes
        self.vision = vision and self.prompts.sees
        if vision and not self.vision:
            self.notes += (UNSEEN,)
        self._sampling = SamplingParams
        with as_sentence(folder.name, "vLLM cannot load it"):
            self._llm: Any = LLM(
                model=str(folder),
                max_model_len=self.prompts.context,
                enforce_eager=True,
                limit_mm_per_prompt={"image": int(self.vision), "video": 0},
            )

    def ask(self, question: Question, *, repetition_penalty: float = 1.0) -> str:
        """Return the model's turn, including the reasoning if it thinks."""
        # Not `chat`: that would render the template here, in this process.
        given: dict[str, Any] = {"prompt": self.prompts.write(question)}
        if question.image is not None:
            given["multi_modal_data"] = {"image": drawn(question.image)}
        sampling = self._sampling(
            temperature=0.0,
            max_tokens=question.tokens,
            repetition_penalty=repetition_penalty,
        )
        with as_sentence(question.prompt, "vLLM cannot answer it"):
            [out] = self._llm.generate([given], sampling, use_tqdm=False)
        return self.prompts.answer(question, str(out.outputs[0].text))
