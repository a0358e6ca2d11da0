"""How much memory a streamed pass takes, and how many windows it computes together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qwen35.display import size, size_rounded_up
from qwen35.errors import UsageError
from qwen35.forward.blocks import Block
from qwen35.forward.side_by_side import MOST
from qwen35.model.model_config import ModelConfig

__all__ = ["PassSizes", "pass_sizes"]

_BATCH_TOKENS = 2048
"""Most tokens per batch, unless one window is longer."""


@dataclass(frozen=True)
class PassSizes:
    """What is in memory at a time.

    Args:
        layer: bytes of the largest block, without experts if they are read one by one.
        window: bytes of one window within it.
        batch: windows that are computed together.
        wide: windows that experts compute together if they are read one by one, else 0.
        at_once: batches that are computed at a time, of each its own thread.
    """

    layer: int
    window: int
    batch: int
    wide: int = 0
    at_once: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of all that."""
        return self.layer + max(self.at_once * self.batch, self.wide) * self.window

    def side_by_side(self, threads: int, count: int, room: int | None, least: int = 1) -> PassSizes:
        """Return the sizes with as many batches at a time as there are threads and memory for.

        What is computed does not depend on it: batches remain what they are.

        Args:
            threads: most batches.
            count: number of windows.
            room: bytes for the layer and all batches; None for no limit.
            least: workspaces of a window that a batch takes at least.
        """
        if self.wide:  # as much memory as there is goes to experts
            return self
        at_once = min(threads, MOST, -(-count // self.batch))
        if room is not None:
            at_once = min(at_once, (room - self.layer) // (max(self.batch, least) * self.window))
        return replace(self, at_once=max(1, at_once))


def pass_sizes(
    parts: Sequence[Block],
    config: ModelConfig,
    *,
    length: int,
    count: int,
    itemsize: int,
    memory: int | None,
    fixed: int = 0,
    besides: int = 0,
    shares: int = 1,
) -> PassSizes:
    """Return what fits into memory; experts are read with their layer if that does.

    Args:
        parts: the blocks of the model.
        config: its geometry.
        length: tokens of a window.
        count: number of windows.
        itemsize: bytes of a number.
        memory: limit in bytes; None for none.
        fixed: bytes of it that all else takes.
        besides: bytes that are needed after the pass, which a refusal then counts too.
        shares: workers that windows are shared out to, if they are; each has that limit.

    Raises:
        UsageError: a layer, or what is left of it without experts, and one window exceed the limit.
    """
    layer = max(block.numel for block in parts) * itemsize
    window = _workspace(config, length, itemsize)
    # A batch takes at most half a layer's bytes, so that memory stays close to one layer.
    batch = min(max(1, _BATCH_TOKENS // length), max(1, layer // 2 // window), count)
    if memory is None or layer + window + fixed <= memory:
        fitting = count if memory is None else (memory - fixed - layer) // window
        return PassSizes(layer, window, min(batch, fitting))
    if config.moe:
        layer = max(map(_without_experts, parts)) * itemsize
        layer += 3 * config.dims["hidden"] * config.dims["expert_ffn"] * itemsize
        window += length * config.dims["experts"] * _ROUTED
    least = layer + window + fixed
    if least > memory:
        expected = f"at least {size_rounded_up(max(least, besides) * shares)}"
        raise UsageError(f"--memory {size(memory * shares)}", "too little", expected=expected)
    wide = min(-(-count // shares), (memory - fixed - layer) // window)
    batch = min(batch, wide)
    if wide < count:  # a share of workers begins where a batch does
        wide -= wide % batch
    return PassSizes(layer, window, batch, wide if config.moe else 0)


_ROUTED = 16
"""Bytes of a token for each expert: its probability, and what sorts it."""


def _without_experts(block: Block) -> int:
    return sum(item.spec.numel for item in block.items if item.role.info.kind != "experts")


def _workspace(config: ModelConfig, context: int, itemsize: int) -> int:
    """Return an upper bound on the bytes of one window within a layer.

    Linear attention keeps about sixteen float32 copies of its value heads (transformers'
    ``torch_chunk_gated_delta_rule``); a feed-forward layer keeps three inner vectors, one of them
    in float32 for squaring.
    """
    dims = config.dims
    heads = 16 * 4 * max(dims["linear_value"], dims["attention"])
    inner = dims.get("ffn") or dims["expert_ffn"] + dims["shared_ffn"]
    return context * (heads + inner * (3 * itemsize + 8) + dims["hidden"] * (6 * itemsize + 8))
