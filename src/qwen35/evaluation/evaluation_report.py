"""The results of an evaluation as values, for the table, report.json and the HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qwen35.errors import Finding
from qwen35.evaluation.abnormal import noise_findings
from qwen35.evaluation.along_text import Passage
from qwen35.evaluation.columns import table
from qwen35.evaluation.divergence import Estimate
from qwen35.evaluation.measured import EDGES, ModelMeasurement
from qwen35.evaluation.models import EvaluatedModel
from qwen35.evaluation.stream_plan import StreamPlan
from qwen35.evaluation.text_chunks import EvaluationText, TokenChunks
from qwen35.table import html_table

__all__ = ["EvaluationReport"]

REPORT_VERSION = 1


@dataclass(frozen=True)
class EvaluationReport:
    """The results of an evaluation.

    Args:
        base: the unquantized model.
        base_perplexity: its perplexity.
        candidates: in the order of the request.
        simulations: those of them whose inputs servers quantize, measured with that.
        floors: the unquantized model in the other engine, for the noise floor.
        chunks: the evaluation tokens.
        text: their text; None if the tokens came from a file of log probabilities.
        passage: a chunk whose every token is shown.
        reference: source of the base's log probabilities: ``run``, or the kind of file.
        device: the device transformers ran on; empty if it did not run.
        versions: of all software that affects the results.
        served: name of a candidate that a server runs, to what that tells about it.
        stream: how models ran layer by layer, if they did.
    """

    base: EvaluatedModel
    base_perplexity: Estimate
    candidates: Sequence[ModelMeasurement]
    simulations: Sequence[ModelMeasurement]
    floors: Sequence[ModelMeasurement]
    chunks: TokenChunks
    text: EvaluationText | None
    passage: Passage
    reference: str
    device: str
    versions: Mapping[str, str]
    served: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stream: StreamPlan | None = None

    def __repr__(self) -> str:
        klds = (f"{row.model.name} {row.comparison.kld.value:.3g}" for row in self.candidates)
        found = ", ".join(klds) or f"perplexity {self.base_perplexity.value:.4f}"
        return f"<EvaluationReport {self.base.name}: {found}>"

    def _repr_html_(self) -> str:
        scored = self.chunks.count * self.chunks.scored
        return html_table(*self.table, f"{self.base.name}: {scored:,} tokens, KLD in nats")

    @property
    def floor(self) -> float:
        """The noise floor: the largest mean divergence between engines alone, in nats."""
        return max((row.comparison.kld.value for row in self.floors), default=0.0)

    @property
    def findings(self) -> list[Finding]:
        """Unquantized models that differ between engines by more than rounding."""
        return list(noise_findings(self.base, self.floors, self.candidates))

    @property
    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows with a column per candidate, or of the base if there are none.

        The simulation of a candidate is the column after it.
        """
        simulated = {row.model.path: row for row in self.simulations}
        pairs = ((row, simulated.get(row.model.path)) for row in self.candidates)
        columns = [row for pair in pairs for row in pair if row is not None]
        return table(self.base, self.base_perplexity, columns)

    def to_json(self) -> dict[str, Any]:
        """Return report.json; apart from speed, the same inputs on one machine give equal bytes."""
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
            "passage": {"chunk": self.passage.chunk, "tokens": list(self.passage.tokens)},
            "reference": self.reference,
            "device": self.device,
            "table": {"columns": columns, "rows": rows},
            "base": {**_model_json(self.base), "perplexity": asdict(self.base_perplexity)},
            "noise_floor": [_row_json(row) for row in self.floors],
            "candidates": [{**_row_json(row), **self._served_json(row)} for row in self.candidates],
            "simulations": [_row_json(row) for row in self.simulations],
            "findings": [finding.to_json() for finding in self.findings],
            "bins": list(EDGES),
        }

    def _served_json(self, row: ModelMeasurement) -> dict[str, Any]:
        """Return what only candidates that a server runs have."""
        if row.model.name not in self.served:
            return {}
        return {
            "served": dict(self.served[row.model.name]),
            "scored": row.scored,
            "served_speed": [asdict(speed) for speed in row.served_speed],
        }


def _model_json(model: EvaluatedModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "stored": model.stored,
        "codes": model.codes,
        "engine": model.engine,
        "bytes": model.nbytes,
        "plan": model.plan,
        "sha256": model.sha256,
    }


def _row_json(row: ModelMeasurement) -> dict[str, Any]:
    figures = asdict(row.comparison)
    figures["percentiles"] = {f"{p:g}": v for p, v in row.comparison.percentiles.items()}
    return {
        **_model_json(row.model),
        "inputs": row.model.served_inputs if row.model.simulated else "",
        "front": row.front,
        "figures": figures,
        "distribution": list(row.distribution),
        "worst": [asdict(token) for token in row.worst],
        "along": list(row.along),
        "passage": list(row.passage),
        "speed": row.speed and asdict(row.speed),
    }
