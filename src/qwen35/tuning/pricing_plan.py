"""What pricing takes, from headers: memory, disk, and the blocks of both passes."""

from __future__ import annotations

from dataclasses import dataclass

from qwen35.checkpoint.inventory import InventoryItem
from qwen35.checkpoint.reconciled import take
from qwen35.checkpoint.source import Checkpoint
from qwen35.evaluation.runners import PYTORCH_MEMORY
from qwen35.forward.batch_size import PassSizes, pass_sizes
from qwen35.forward.blocks import HEAD, MTP, Block, blocks
from qwen35.forward.head import PIECE
from qwen35.model.model_config import ModelConfig

__all__ = ["PricingPlan", "plan_pricing"]

_ITEMSIZE = 4
"""Bytes of float32, in which all is computed."""

_KEPT = 4
"""Workspaces of a window that computing back takes, as measured: what forward frees is kept."""


@dataclass(frozen=True)
class PricingPlan:
    """How prices are measured.

    Args:
        checkpoint: the model.
        items: its weights.
        blocks: of both passes, in order.
        sizes: what is in memory at a time while text goes forward.
        group: windows whose logits are in memory.
        length: tokens of a window that the model reads.
        windows: number of windows, or the most there may be.
    """

    checkpoint: Checkpoint
    items: tuple[InventoryItem, ...]
    blocks: tuple[Block, ...]
    sizes: PassSizes
    group: int
    length: int
    windows: int

    @property
    def first(self) -> int:
        """The first scored position: every prediction sees half a chunk."""
        return (self.length + 1) // 2

    @property
    def scored(self) -> int:
        """Scored positions of all windows."""
        return self.windows * (self.length - self.first)

    @property
    def memory(self) -> int:
        """Peak memory in bytes: libraries, the largest block, windows of it on their way back."""
        back = self.sizes.layer + self.sizes.at_once * _KEPT * self.sizes.window
        logits = self.group * _logits(self.checkpoint.config, self.length - self.first)
        return PYTORCH_MEMORY + max(back, self.sizes.nbytes, logits + PIECE * _ITEMSIZE)

    @property
    def disk(self) -> int:
        """Bytes of hidden states, and of the products of the largest block."""
        hidden = self.windows * self.length * self.checkpoint.config.dims["hidden"] * _ITEMSIZE
        return (len(self.blocks) + 2) * hidden + max(map(self._products, self.blocks))

    def _products(self, block: Block) -> int:
        """Return the bytes of the inputs and gradients of a block's products."""
        config, tokens = self.checkpoint.config, self.windows * self.length
        if block.name == HEAD:
            return self.scored * (config.dims["vocab"] + config.dims["hidden"]) * _ITEMSIZE
        numbers = sum(
            sum(item.spec.shape) for item in block.items if item.role.info.kind == "linear"
        )
        if config.moe:
            ffn, hidden = config.dims["expert_ffn"], config.dims["hidden"]
            numbers += config.experts_per_token * (2 * hidden + 3 * ffn)
        return tokens * numbers * _ITEMSIZE

    @property
    def read_bytes(self) -> int:
        """Bytes read by both passes."""
        return 2 * sum(block.nbytes for block in self.blocks)


def _logits(config: ModelConfig, scored: int) -> int:
    return scored * config.dims["vocab"] * _ITEMSIZE


def plan_pricing(
    source: Checkpoint,
    *,
    context: int,
    windows: int,
    memory: int | None,
    shares: int = 1,
    threads: int = 1,
) -> PricingPlan:
    """Plan both passes; read only headers.

    Args:
        source: the model.
        context: tokens of a chunk, of which a window has all but the last.
        windows: number of windows.
        memory: limit in bytes; None for none.
        shares: workers that share windows out, and the memory.
        threads: windows that each of them computes at a time, if memory allows.

    Raises:
        TensorError: weights are missing.
        UsageError: a layer and one window exceed the limit.
    """
    checkpoint, items = take(source, tower=False)
    parts = tuple(block for block in blocks(items) if block.name != MTP)
    length = context - 1

    def sizes(memory: int | None, fixed: int) -> PassSizes:
        return pass_sizes(
            parts,
            checkpoint.config,
            length=length,
            count=windows,
            itemsize=_ITEMSIZE,
            memory=memory,
            fixed=fixed,
            shares=shares,
        )

    found = sizes(None, 0)
    if memory is not None:
        memory //= shares
        found = sizes(memory, PYTORCH_MEMORY + (_KEPT - 1) * found.window)
    one = _logits(checkpoint.config, length - context // 2)
    # Each group of windows reads the head once: as many as take no more memory than a layer.
    group = min(windows, max(1, found.nbytes // one))
    room = None if memory is None else memory - PYTORCH_MEMORY
    found = found.side_by_side(threads, windows, room, _KEPT)
    return PricingPlan(checkpoint, items, parts, found, group, length, windows)
