"""Loaded models: from a chunk's token ids to the logits of its scored positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Protocol

from qwen35.array_types import F32
from qwen35.engines.llama import Llama
from qwen35.engines.torch_model import TorchModel
from qwen35.errors import InputError
from qwen35.evaluation.models import EvaluatedModel
from qwen35.evaluation.text_chunks import TokenChunks

__all__ = ["PYTORCH_MEMORY", "LogitsRunner", "loaded_models", "runner_of", "running_memory"]


PYTORCH_MEMORY = 700_000_000
_LLAMA_MEMORY = 150_000_000
"""Bytes each engine takes besides weights and logits, measured on the embedded checkpoint."""


class LogitsRunner(Protocol):
    """A loaded model."""

    def logits(self, chunks: TokenChunks, index: int, *, simulated: bool = False) -> F32:
        """Return the logits of a chunk's scored positions, [scored, v]; valid until next call.

        With `simulated`, the inputs of packed layers are quantized as servers do.
        """

    def close(self) -> None:
        """Free the model."""


class _Llama:
    def __init__(self, model: EvaluatedModel, context: int, threads: int) -> None:
        self._llama = Llama(model.path, context=context, threads=threads)

    def logits(self, chunks: TokenChunks, index: int, *, simulated: bool = False) -> F32:
        assert not simulated  # llama.cpp quantizes inputs itself
        return self._llama.lend_logits(chunks.inputs(index), chunks.first)

    def close(self) -> None:
        self._llama.close()


class _Torch:
    """transformers in float32, so that candidates differ only by their weights.

    bf16 arithmetic alone costs 7e-5 nats on the embedded checkpoint, a fifth of Q8_0.
    """

    def __init__(self, model: EvaluatedModel, device: str) -> None:
        self._torch: TorchModel | None = TorchModel(
            model.path, adapters=model.adapters, exact=True, device=device
        )
        if self._torch.missing:
            raise InputError(
                model.name,
                f"transformers reports {self._torch.missing[0]} as missing or unexpected",
                hint="qwen35 verify it first",
            )

    def logits(self, chunks: TokenChunks, index: int, *, simulated: bool = False) -> F32:
        assert self._torch is not None
        run = self._torch.simulated_logits if simulated else self._torch.logits
        return run(chunks.inputs(index), chunks.first)

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


def loaded_models(
    stack: ExitStack, *, context: int, threads: int, device: str
) -> Callable[[EvaluatedModel], LogitsRunner]:
    """Return what loads a model, or returns it loaded: a model and its simulation share one."""
    runners: dict[object, LogitsRunner] = {}

    def loaded(model: EvaluatedModel) -> LogitsRunner:
        if model.loaded_as not in runners:
            runner = runner_of(model, context=context, threads=threads, device=device)
            runners[model.loaded_as] = stack.enter_context(closing(runner))
        return runners[model.loaded_as]

    return loaded


def running_memory(models: Sequence[EvaluatedModel], scored: int) -> int:
    """Return an upper estimate of the bytes that models running side by side need.

    Counts loaded weights (llama.cpp maps its files, so the system may evict them), twice a chunk's
    logits per model, and the engines themselves.
    """
    logits = sum(2 * (scored + 1) * model.width * 4 for model in models)
    pytorch = any(model.engine == "transformers" for model in models)
    engines = PYTORCH_MEMORY * pytorch + _LLAMA_MEMORY * len(models)
    return sum(model.loaded for model in models) + logits + engines
