"""The columns of an evaluation's table, in the words of llama-perplexity."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwen35.evaluation.divergence import PERCENTILES, Comparison, Estimate
from qwen35.evaluation.measured import ModelMeasurement
from qwen35.evaluation.models import EvaluatedModel

__all__ = ["table"]

Cell = Callable[[Comparison], str]


def _plain(value: float) -> str:
    return f"{value:.6f}"


def _with_errors(found: Estimate, unit: float = 1.0, digits: int = 6) -> str:
    """Write a figure, its error by tokens and, in brackets, by chunks."""
    text = f"{found.value * unit:.{digits}f} ± {found.error * unit:.{digits}f}"
    if found.block_error is not None:
        text += f" ({found.block_error * unit:.{digits}f})"
    return text


def _percentile(percent: float) -> tuple[str, Cell]:
    name = "Median KLD" if percent == 50 else f"{percent:.1f}% KLD"
    return name, lambda c: _plain(c.percentiles[percent])


_ROWS: tuple[tuple[str, Cell], ...] = (
    ("Mean KLD", lambda c: _with_errors(c.kld)),
    ("Maximum KLD", lambda c: _plain(c.maximum)),
    *(_percentile(percent) for percent in PERCENTILES),
    ("PPL", lambda c: _with_errors(c.perplexity, digits=4)),
    ("PPL of base", lambda c: _with_errors(c.base_perplexity, digits=4)),
    ("PPL ratio", lambda c: _with_errors(c.ratio)),
    ("Mean Δp, %", lambda c: _with_errors(c.change, 100, 3)),
    ("RMS Δp, %", lambda c: _with_errors(c.change_rms, 100, 3)),
    ("Same top p, %", lambda c: _with_errors(c.same_top, 100, 3)),
)
_FASTER: tuple[tuple[str, Callable[[ModelMeasurement], str]], ...] = (
    (
        "Prompt, tokens/s",
        lambda m: f"{m.speed.prompt:.1f} (x{m.speed.prompt_ratio:.2f})" if m.speed else "-",
    ),
    (
        "Generation, tokens/s",
        lambda m: f"{m.speed.generation:.1f} (x{m.speed.generation_ratio:.2f})" if m.speed else "-",
    ),
)


def table(
    base: EvaluatedModel, perplexity: Estimate, every: Sequence[ModelMeasurement]
) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows, a column for each candidate; of the base alone without any.

    Args:
        base: the unquantized model.
        perplexity: of the base.
        every: the candidates.
    """
    if not every:
        cell = _with_errors(perplexity, digits=4)
        return ["", base.name], [["PPL", cell], ["Bytes", f"{base.nbytes:,}"]]
    rows = [[name, *(cell(m.comparison) for m in every)] for name, cell in _ROWS]
    if any(m.comparison.bound for m in every):
        cells = [f"{m.comparison.bound:.6f}" for m in every]
        rows.insert(1, ["Mean KLD, higher by at most", *cells])
    rows.append(["Bytes", *(f"{m.model.nbytes:,}" for m in every)])
    if any(m.speed for m in every):
        rows += [[name, *(cell(m) for m in every)] for name, cell in _FASTER]
    return ["KLD metric", *(m.model.name for m in every)], rows
