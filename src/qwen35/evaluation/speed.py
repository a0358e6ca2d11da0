"""How fast llama.cpp runs a file on this machine."""

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
    """Tokens a second, medians of several rounds.

    Args:
        prompt: reading a prompt of 512 tokens.
        generation: writing after it, one token at a time.
        prompt_ratio: to that of the unquantized file.
        generation_ratio: the same.
    """

    prompt: float
    generation: float
    prompt_ratio: float
    generation_ratio: float


def measure_speed(
    models: Sequence[EvaluatedModel], unquantized: EvaluatedModel, threads: int
) -> Mapping[str, Speed]:
    """Measure GGUF files in turn, round by round, against the unquantized one; by name."""
    every = [unquantized, *models]
    seconds: list[list[tuple[float, float]]] = [[] for _ in every]
    loaded = [Llama(m.path, context=_PROMPT + _GENERATED, threads=threads) for m in every]
    try:
        for llama in loaded:
            llama.seconds(_PROMPT, 1)
        for _ in range(_ROUNDS):
            for llama, taken in zip(loaded, seconds, strict=True):
                taken.append(llama.seconds(_PROMPT, _GENERATED))
    finally:
        for llama in loaded:
            llama.close()
    prompt = [_PROMPT / median(p for p, _ in taken) for taken in seconds]
    written = [_GENERATED / median(g for _, g in taken) for taken in seconds]
    return {
        model.name: Speed(prompt[i], written[i], prompt[i] / prompt[0], written[i] / written[0])
        for i, model in enumerate(every)
    }
