"""What it takes to measure models layer by layer, from headers and token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qwen35.checkpoint.reconciled import take
from qwen35.display import size, size_rounded_up
from qwen35.errors import UsageError
from qwen35.evaluation.models import Engine, EvaluatedModel
from qwen35.evaluation.runners import PYTORCH_MEMORY
from qwen35.evaluation.text_chunks import TokenChunks
from qwen35.forward.batch_size import PassSizes, pass_sizes
from qwen35.forward.blocks import MTP, blocks
from qwen35.forward.head import PIECE

__all__ = ["LLAMA_INPUTS", "STREAMED", "StreamPlan", "plan_stream", "simulations", "streamed_model"]

STREAMED: Engine = "transformers (streamed)"
"""The engine of models that are run layer by layer, as reports name it."""

LLAMA_INPUTS = "8 bits in blocks of 32 or 256, as in llama.cpp on CPUs"

_ITEMSIZE = 4
"""Bytes of float32, in which all is computed."""


@dataclass(frozen=True)
class StreamPlan:
    """How models are run layer by layer.

    Args:
        sizes: what is in memory at a time while chunks go through layers.
        group: chunks whose logits are in memory, of every model.
        logits: bytes of those.
        states: bytes of hidden states on disk.
        why: why it was chosen, unless that was asked for.
    """

    sizes: PassSizes
    group: int
    logits: int
    states: int
    why: str = ""

    @property
    def memory(self) -> int:
        """Peak memory in bytes, on top of the interpreter and the results."""
        return PYTORCH_MEMORY + max(self.sizes.nbytes, self.logits + PIECE * _ITEMSIZE)


def plan_stream(
    base: EvaluatedModel,
    chunks: TokenChunks,
    running: int,
    *,
    fixed: int,
    memory: int,
    threads: int = 1,
    why: str = "",
) -> StreamPlan:
    """Plan a streamed evaluation; read only headers.

    Args:
        base: the base; candidates have its sizes.
        chunks: the text.
        running: number of models, and of simulations of them.
        fixed: bytes that all else takes.
        memory: limit in bytes; 0 for none.
        threads: chunks that are computed at a time, if memory allows.
        why: why it was chosen.

    Raises:
        TensorError: weights are missing.
        UsageError: a layer and one chunk exceed the limit.
    """
    checkpoint, items = take(base.checkpoint(), tower=False)
    config, length = checkpoint.config, chunks.context - 1
    parts = [block for block in blocks(items) if block.name != MTP]
    one = running * chunks.scored * base.width * _ITEMSIZE
    fixed += PYTORCH_MEMORY
    least = fixed + one + PIECE * _ITEMSIZE
    sizes = pass_sizes(
        parts,
        config,
        length=length,
        count=chunks.count,
        itemsize=_ITEMSIZE,
        memory=memory or None,
        fixed=fixed,
        besides=least,
    )
    if memory and memory < least:
        raise UsageError(
            f"--memory {size(memory)}",
            "too little",
            expected=f"at least {size_rounded_up(least)}",
            hint="give fewer candidates at a time, with --cache",
        )
    # Each group of chunks reads the heads once: as many as take no more memory than the layers.
    group = min(chunks.count, max(1, (sizes.nbytes - PIECE * _ITEMSIZE) // one))
    states = 2 * running * chunks.count * length * config.dims["hidden"] * _ITEMSIZE
    sizes = sizes.side_by_side(threads, chunks.count, memory - fixed if memory else None)
    return StreamPlan(sizes, group, group * one, states, why)


def streamed_model(model: EvaluatedModel) -> EvaluatedModel:
    """Return a model as it is run layer by layer: in float32, whatever its container."""
    inputs = LLAMA_INPUTS if model.single else model.served_inputs
    return replace(model, engine=STREAMED, served_inputs=inputs)


def simulations(
    candidates: Sequence[EvaluatedModel], *, servers: bool, llama: bool
) -> tuple[EvaluatedModel, ...]:
    """Return the candidates that are also run with the inputs of layers quantized.

    Args:
        candidates: all of them.
        servers: whether as servers do.
        llama: whether GGUF files as llama.cpp does.
    """
    return tuple(
        model.simulation
        for model in candidates
        if model.simulable and (llama if model.single else servers)
    )
