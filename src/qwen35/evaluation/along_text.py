"""Where in a text a model diverges: means of windows, and every token of one passage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen35.evaluation.divergence import Series
from qwen35.evaluation.text_chunks import Decode, TokenChunks

__all__ = ["Passage", "along", "passage_klds", "typical_passage"]

_WINDOWS = 96
"""Most windows that a text is cut into: as many as a chart on a phone can show."""

_LONGEST = 256
"""Most tokens of a passage."""

_INCOMPLETE = "\ufffd"
"""What a decoder gives for the beginning of a character."""


@dataclass(frozen=True)
class Passage:
    """The scored tokens of one chunk, or the first of them.

    Args:
        chunk: counted from 1.
        tokens: their text; a character of several tokens is in the last of them.
    """

    chunk: int
    tokens: Sequence[str]


def along(series: Series) -> list[float]:
    """Return the mean divergence of each window of the text, in nats.

    Empty if a window has no divergence: NaN marks tokens that were not compared.
    """
    assert series.kld is not None
    values = series.kld.reshape(-1)
    windows = np.array_split(values, min(_WINDOWS, values.size))
    if any(np.isnan(window).all() for window in windows):
        return []
    return [_short(float(np.nanmean(window))) for window in windows]


def typical_passage(base: Series, chunks: TokenChunks, decode: Decode) -> Passage:
    """Return the chunk whose perplexity for the base is the median of all."""
    order = np.argsort(base.nll.mean(axis=1), kind="stable")
    chunk = int(order[(len(order) - 1) // 2])
    ids = [int(i) for i in chunks.ids[chunk, : chunks.first + 1 + _LONGEST]]
    return Passage(chunk + 1, _pieces(ids, chunks.first + 1, decode))


def passage_klds(series: Series, passage: Passage) -> list[float | None]:
    """Return the divergence of each token of a passage, in nats; None where not compared."""
    assert series.kld is not None
    values = series.kld[passage.chunk - 1, :_LONGEST]
    return [None if np.isnan(kld) else _short(float(kld)) for kld in values]


def _pieces(ids: Sequence[int], first: int, decode: Decode) -> list[str]:
    """Return the text of each token from place `first` on."""
    pieces, shown = [], decode(ids[:first]).rstrip(_INCOMPLETE)
    for end in range(first + 1, len(ids) + 1):
        whole = decode(ids[:end])
        waits = whole.endswith(_INCOMPLETE) and end < len(ids)
        pieces.append("" if waits else whole[len(shown) :])
        shown = shown if waits else whole
    return pieces


def _short(value: float) -> float:
    """Round to what a reader can use, as there are many of them."""
    return float(f"{value:.4g}")
