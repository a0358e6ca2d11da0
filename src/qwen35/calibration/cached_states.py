"""The largest keys and values that a decoder layer puts into a KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qwen35.calibration.hooks import BlockSums
from qwen35.calibration.inputs import CACHED

__all__ = ["record_cache", "recording_attention"]

_NAME = "qwen35_recording"
_SUMS = "cache_sums"


def recording_attention(implementation: str) -> str:
    """Return the name, for a config of transformers, of an attention that `record_cache` sees into.

    It gets what a KV cache would hold: keys after their norm and the rotary embedding.

    Args:
        implementation: the name of the one that computes.
    """
    from transformers.modeling_utils import AttentionInterface

    compute = AttentionInterface()[implementation]

    def forward(module: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> Any:
        """Take keys and values [rows, heads, length, width]."""
        block_sums = getattr(module, _SUMS, None)
        if block_sums is not None:
            for name, states in zip(CACHED.values(), (key, value), strict=True):
                block_sums.add(name, states)
        return compute(module, query, key, value, *rest, **named)

    AttentionInterface.register(_NAME, forward)
    return _NAME


@contextmanager
def record_cache(layer: Any, block_sums: BlockSums) -> Iterator[None]:
    """Record what a decoder layer with `recording_attention` caches while the context is open."""
    attention = getattr(layer, "self_attn", None)
    if attention is not None:
        setattr(attention, _SUMS, block_sums)
    try:
        yield
    finally:
        if attention is not None:
            delattr(attention, _SUMS)
