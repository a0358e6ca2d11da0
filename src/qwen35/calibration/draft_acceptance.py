"""How often the tokens that the multi-token-prediction layer drafts are the model's own choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwen35.forward.forward_stream import ForwardStream, Track
from qwen35.forward.head import Head

__all__ = ["DraftAcceptance", "acceptance"]


@dataclass(frozen=True)
class DraftAcceptance:
    """How often drafted tokens are those that the model itself would choose, both greedily.

    Args:
        tokens: drafted tokens, one for each token of the text but the first of a window.
        accepted: those that the model would choose, too.
    """

    tokens: int
    accepted: int

    @property
    def rate(self) -> float:
        """The share of accepted tokens."""
        return self.accepted / self.tokens

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"tokens": self.tokens, "accepted": self.accepted, "rate": self.rate}


def acceptance(stream: ForwardStream) -> DraftAcceptance:
    """Return the acceptance in a complete pass whose last block is the MTP part.

    Raises:
        TensorError: the head cannot be read or decoded.
    """
    skipped, drafted = stream.builder.weights.config.mtp_layers, stream.current
    with stream.torch.inference_mode():
        # What the MTP part read is the model's state after its final norm.
        own, other = (_chosen(stream, Track().file(n))[:, skipped:] for n in (1 - drafted, drafted))
    return DraftAcceptance(int(own.numel()), int((own == other).sum()))


def _chosen(stream: ForwardStream, file: str) -> Any:
    """Return the tokens with the largest logits after states in a file, [windows, length]."""
    torch = stream.torch
    best: dict[int, tuple[Any, Any]] = {}  # by the first window of a batch: logits, tokens
    for first, rows in Head(stream.builder).pieces():
        piece = rows.float()
        for start, ids in stream.batches():
            states = stream.load(file, start, len(ids)).float()
            values, tokens = (states @ piece.T).max(-1)
            tokens += first
            if start in best:
                before, earlier = best[start]
                tokens = torch.where(values > before, tokens, earlier)
                values = torch.maximum(values, before)
            best[start] = values, tokens
    return torch.cat([tokens for _, tokens in best.values()])
