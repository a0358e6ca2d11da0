"""Where our bytes of a ggml type differ from ggml's, over all distributions of weights."""

from __future__ import annotations

import numpy as np

from ggml_values import DISTRIBUTIONS, IMPORTANCE, weights
from qwen35.array_types import F32, U8
from qwen35.codecs.ggml.kernels import quantize
from qwen35.codecs.ggml.library import open_library
from qwen35.codecs.ggml.quantizers import Quantize
from qwen35.codecs.ggml.types import GGML_TYPES

ROW = 1280
"""Five super-blocks: tiles of 16 begin within rows, and the last is not full."""


def importance(name: str, row: int = ROW) -> F32 | None:
    draw = IMPORTANCE[name]
    return None if draw is None else draw(np.random.default_rng(1), row).astype(np.float32)


def encoded(encode: Quantize, rows: F32, kind: str, weighed: F32 | None) -> U8 | None:
    """Return bytes, a block in each row; None where a scale is not finite."""
    try:
        return encode(rows, kind, weighed).reshape(-1, GGML_TYPES[kind].nbytes)
    except ValueError:
        return None


def difference(rows: F32, kind: str, weighed: F32 | None) -> str:
    """Return how our bytes and ggml's differ; nothing if they do not."""
    ours = encoded(quantize, rows, kind, weighed)
    theirs = encoded(open_library().quantize, rows, kind, weighed)
    if ours is None or theirs is None:
        return "" if ours is theirs else "one is finite, the other is not"
    wrong = np.flatnonzero((ours != theirs).any(axis=1))
    return f"{wrong.size} of {len(ours)} blocks, first {wrong[0]}" if wrong.size else ""


def differences(kind: str, count: int) -> dict[tuple[str, str], str]:
    """Return where our bytes and ggml's differ, over all distributions."""
    found = {
        (values, name): difference(weights(values, (count, ROW), count), kind, importance(name))
        for values in DISTRIBUTIONS
        for name in IMPORTANCE
    }
    return {key: said for key, said in found.items() if said}
