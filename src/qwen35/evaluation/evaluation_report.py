"""What an evaluation found, as values: for tables, report.json and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qwen35.evaluation.columns import table
from qwen35.evaluation.divergence import Estimate
from qwen35.evaluation.measured import EDGES, ModelMeasurement
from qwen35.evaluation.models import EvaluatedModel
from qwen35.evaluation.text_chunks import EvaluationText, TokenChunks

__all__ = ["EvaluationReport"]

REPORT_VERSION = 1


@dataclass(frozen=True)
class EvaluationReport:
    """An evaluation.

    Args:
        base: the unquantized model.
        base_perplexity: its perplexity.
        candidates: in the order they were given.
        floors: the unquantized model in the other engine: what engines alone make of difference.
        chunks: what was measured on.
        text: where it came from, if that was given.
        reference: where the base's figures came from: ``run``, or a file's kind.
        device: what transformers ran on, if it ran.
        versions: of everything that a figure passed through.
    """

    base: EvaluatedModel
    base_perplexity: Estimate
    candidates: Sequence[ModelMeasurement]
    floors: Sequence[ModelMeasurement]
    chunks: TokenChunks
    text: EvaluationText | None
    reference: str
    device: str
    versions: Mapping[str, str]

    @property
    def floor(self) -> float:
        """The largest mean divergence that the engines alone make, in nats."""
        return max((row.comparison.kld.value for row in self.floors), default=0.0)

    @property
    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows, a column for each candidate; of the base alone without any."""
        return table(self.base, self.base_perplexity, self.candidates)

    def to_json(self) -> dict[str, Any]:
        """Return report.json: the same for the same inputs on the same machine, speed apart."""
        columns, rows = self.table
        text = self.text
        return {
            "report": REPORT_VERSION,
            "tool": dict(self.versions),
            "text": text and {"name": text.name, "bytes": text.nbytes, "sha256": text.sha256},
            "tokens": {
                "sha256": self.chunks.sha256,
                "context": self.chunks.context,
                "chunks": self.chunks.count,
                "scored": self.chunks.count * self.chunks.scored,
            },
            "reference": self.reference,
            "device": self.device,
            "table": {"columns": columns, "rows": rows},
            "base": {**_facts(self.base), "perplexity": asdict(self.base_perplexity)},
            "noise_floor": [_measured(row) for row in self.floors],
            "candidates": [_measured(row) for row in self.candidates],
            "bins": list(EDGES),
        }


def _facts(model: EvaluatedModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "stored": model.stored,
        "engine": model.engine,
        "bytes": model.nbytes,
        "plan": model.plan,
        "sha256": model.sha256,
    }


def _measured(row: ModelMeasurement) -> dict[str, Any]:
    figures = asdict(row.comparison)
    figures["percentiles"] = {f"{p:g}": v for p, v in row.comparison.percentiles.items()}
    return {
        **_facts(row.model),
        "front": row.front,
        "figures": figures,
        "distribution": list(row.distribution),
        "worst": [asdict(wrong) for wrong in row.worst],
        "speed": row.speed and asdict(row.speed),
    }
