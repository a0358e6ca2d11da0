"""Reports with made-up figures: what the page and the ranking read of a report.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["ROWS", "candidate", "report_of"]

Row = tuple[str, str, int, float]

ROWS: tuple[Row, ...] = (
    ("m-nf4", "transformers", 700, 0.02),
    ("m-Q8_0", "llama.cpp", 800, 0.0004),
    ("m-Q4_K_M", "llama.cpp", 470, 0.017),
    ("m-fp8", "transformers", 900, 0.0016),
    ("m-Q6_K", "llama.cpp", 600, 0.007),
)


def estimate(value: float, error: float = 1e-5) -> dict[str, float]:
    return {"value": value, "error": error, "block_error": 2 * error}


def candidate(name: str, engine: str, nbytes: int | None, kld: float) -> dict[str, Any]:
    figures = {
        "kld": estimate(kld),
        "maximum": 100 * kld,
        "percentiles": {"50": kld / 2, "90": 2 * kld, "99": 10 * kld, "99.9": 50 * kld},
        "same_top": estimate(1 - kld),
        "ratio": estimate(1 + kld),
    }
    token = {"chunk": 1, "place": 7, "kld": 100 * kld, "base_probability": 0.5, "probability": 0.1}
    words = {"before": "a", "token": " b", "after": "c", "base_top": " b", "top": "d"}
    return {
        "name": name,
        "stored": name.rpartition("-")[2],
        "engine": engine,
        "bytes": nbytes,
        "figures": figures,
        "worst": [token | words],
        "along": [kld, 2 * kld],
        "passage": [kld, 3 * kld],
    }


def report_of(rows: Sequence[Row] = ROWS, **changes: Any) -> dict[str, Any]:
    """The parts of a report.json that are read."""
    names = [row[0] for row in rows]
    return {
        "report": 1,
        "tool": {"qwen35": "0.1.0"},
        "text": {"name": "t.txt", "sha256": "ab"},
        "tokens": {"sha256": "cd", "context": 512, "chunks": 4, "scored": 1020},
        "reference": "run",
        "device": "cpu",
        "passage": {"chunk": 2, "tokens": ["a", " b"]},
        "table": {"columns": ["", *names], "rows": [["Mean KLD", *names]]},
        "base": {
            "name": "m",
            "stored": "BF16",
            "engine": "transformers",
            "perplexity": estimate(9),
        },
        "candidates": [candidate(*row) for row in rows],
    } | changes
