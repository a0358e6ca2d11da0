"""Ask a checkpoint in vLLM, with the artifact's chat template and with pictures."""

from __future__ import annotations

import base64
import io
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qwen35.errors import UsageError
from qwen35.verification.asking_transformers import Question, drawn

__all__ = ["VllmAsker", "check_vllm"]

_CONTEXT = 2048


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
    """

    def __init__(self, folder: Path, *, vision: bool) -> None:
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for data
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM, SamplingParams  # late: it reads these variables when imported

        self._sampling = SamplingParams
        self._llm: Any = LLM(
            model=str(folder),
            max_model_len=_CONTEXT,
            enforce_eager=True,
            limit_mm_per_prompt={"image": int(vision), "video": 0},
        )

    def ask(self, question: Question, *, repetition_penalty: float = 1.0) -> str:
        """Return the model's turn, including the reasoning if it thinks."""
        content: list[dict[str, Any]] = [{"type": "text", "text": question.prompt}]
        if question.image is not None:
            png = io.BytesIO()
            drawn(question.image).save(png, format="PNG")
            url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        [out] = self._llm.chat(
            [{"role": "user", "content": content}],
            self._sampling(
                temperature=0.0,
                max_tokens=question.tokens,
                repetition_penalty=repetition_penalty,
            ),
            use_tqdm=False,
            chat_template_kwargs={"enable_thinking": question.thinking},
        )
        text: str = out.outputs[0].text
        return text
