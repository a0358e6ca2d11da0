"""Speed of GGUF files in llama.cpp on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from qwen35.engines.llama import Llama
from qwen35.evaluation.models import EvaluatedModel

__all__ = ["Speed", "measure_speed"]

_PROMPT, _GENERATED, _ROUNDS = 512, 32, 3


@dataclass(frozen=True)
class Speed:
    """Tokens per second, medians of several rounds.

    Args:
        prompt: processing a prompt of 512 tokens.
        generation: generating after it, one token at a time.
        prompt_ratio: relative to the unquantized file.
        generation_ratio: relative to the unquantized file.
    """

    prompt: float
    generation: float
    prompt_ratio: float
    generation_ratio: float


def measure_speed(
    models: Sequence[EvaluatedModel], unquantized: EvaluatedModel, threads: int
) -> Mapping[str, Speed]:
    """Measure GGUF files and the unquantized one; return speeds by name."""
    files = [unquantized, *models]
    timings: list[list[tuple[float, float]]] = [[] for _ in files]
    loaded = [Llama(m.path, context=_PROMPT + _GENERATED, threads=threads) for m in files]
    try:
        for llama in loaded:  # warm-up: pages in the mapped file
            llama.seconds(_PROMPT, 1)
        # Round by round rather than file by file, so that drift of the machine hits all alike.
        for _ in range(_ROUNDS):
            for llama, rounds in zip(loaded, timings, strict=True):
                rounds.append(llama.seconds(_PROMPT, _GENERATED))
    finally:
        for llama in loaded:
            llama.close()
    prompt = [_PROMPT / median(p for p, _ in rounds) for rounds in timings]
    generation = [_GENERATED / median(g for _, g in rounds) for rounds in timings]
    return {
        model.name: Speed(
            prompt[i], generation[i], prompt[i] / prompt[0], generation[i] / generation[0]
        )
        for i, model in enumerate(files)
    }
