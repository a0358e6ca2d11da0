"""Loaded models: from a chunk's token ids to the logits of its scored positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from qwen35.array_types import F32
from qwen35.engines.llama import Llama
from qwen35.engines.torch_model import TorchModel
from qwen35.errors import InputError
from qwen35.evaluation.models import EvaluatedModel

__all__ = ["LogitsRunner", "runner_of", "running_memory"]


_PYTORCH_MEMORY = 700_000_000
_LLAMA_MEMORY = 150_000_000
"""Bytes each engine takes besides weights and logits, measured on the embedded checkpoint."""


class LogitsRunner(Protocol):
    """A loaded model."""

    def logits(self, ids: Sequence[int], first: int, *, simulated: bool = False) -> F32:
        """Return logits from position `first` on, [len(ids) - first, v]; valid until next call.

        With `simulated`, the inputs of packed layers are quantized as servers do.
        """

    def close(self) -> None:
        """Free the model."""


class _Llama:
    def __init__(self, model: EvaluatedModel, context: int, threads: int) -> None:
        self._llama = Llama(model.path, context=context, threads=threads)

    def logits(self, ids: Sequence[int], first: int, *, simulated: bool = False) -> F32:
        assert not simulated  # llama.cpp quantizes inputs itself
        return self._llama.lend_logits(ids, first)

    def close(self) -> None:
        self._llama.close()


class _Torch:
    """transformers in float32, so that candidates differ only by their weights.

    bf16 arithmetic alone costs 7e-5 nats on the embedded checkpoint, a fifth of Q8_0.
    """

    def __init__(self, model: EvaluatedModel, device: str) -> None:
        self._torch: TorchModel | None = TorchModel(model.path, exact=True, device=device)
        if self._torch.missing:
            raise InputError(
                model.name,
                f"transformers reports {self._torch.missing[0]} as missing or unexpected",
                hint="qwen35 verify it first",
            )

    def logits(self, ids: Sequence[int], first: int, *, simulated: bool = False) -> F32:
        assert self._torch is not None
        run = self._torch.simulated_logits if simulated else self._torch.logits
        return run(ids, first)

    def close(self) -> None:
        self._torch = None  # drops the last reference to the weights


def runner_of(model: EvaluatedModel, *, context: int, threads: int, device: str) -> LogitsRunner:
    """Load a model.

    Raises:
        InputError: the engine cannot load it.
        UsageError: the engine is not installed.
    """
    if model.engine == "llama.cpp":
        return _Llama(model, context, threads)
    return _Torch(model, device)


def running_memory(models: Sequence[EvaluatedModel], scored: int) -> int:
    """Return an upper estimate of the bytes that models running side by side need.

    Counts loaded weights (llama.cpp maps its files, so the system may evict them), twice a chunk's
    logits per model, and the engines themselves.
    """
    logits = sum(2 * (scored + 1) * model.width * 4 for model in models)
    pytorch = any(model.engine == "transformers" for model in models)
    engines = _PYTORCH_MEMORY * pytorch + _LLAMA_MEMORY * len(models)
    return sum(model.loaded for model in models) + logits + engines
