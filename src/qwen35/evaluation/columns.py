"""The table of an evaluation, with llama-perplexity's row names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwen35.evaluation.divergence import PERCENTILES, Comparison, Estimate
from qwen35.evaluation.measured import ModelMeasurement
from qwen35.evaluation.models import EvaluatedModel
from qwen35.evaluation.served_speed import ServedSpeed

__all__ = ["table"]

Cell = Callable[[Comparison], str]


def _plain(value: float) -> str:
    return f"{value:.6f}"


def _with_errors(estimate: Estimate, unit: float = 1.0, digits: int = 6) -> str:
    """Format a figure with its error by tokens and, in brackets, by chunks."""
    text = f"{estimate.value * unit:.{digits}f} ± {estimate.error * unit:.{digits}f}"
    if estimate.block_error is not None:
        text += f" ({estimate.block_error * unit:.{digits}f})"
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
_SPEED_ROWS: tuple[tuple[str, Callable[[ModelMeasurement], str]], ...] = (
    (
        "Prompt, tokens/s",
        lambda m: f"{m.speed.prompt:.1f} (x{m.speed.prompt_ratio:.2f})" if m.speed else "-",
    ),
    (
        "Generation, tokens/s",
        lambda m: f"{m.speed.generation:.1f} (x{m.speed.generation_ratio:.2f})" if m.speed else "-",
    ),
)


_SERVED_ROWS: tuple[tuple[str, Callable[[ServedSpeed], str]], ...] = (
    ("First token, s: 50, 90, 99 %", lambda s: " / ".join(f"{v:.3f}" for v in s.first)),
    ("Prompt, tokens/s", lambda s: f"{s.prompt:.1f}"),
    ("Generation, tokens/s", lambda s: f"{s.generation:.1f}"),
)


def table(
    base: EvaluatedModel, perplexity: Estimate, candidates: Sequence[ModelMeasurement]
) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows with a column per candidate, or of the base if there are none.

    Args:
        base: the unquantized model.
        perplexity: of the base.
        candidates: the candidates' results.
    """
    if not candidates:
        cell = _with_errors(perplexity, digits=4)
        return ["", base.name], [["PPL", cell], ["Bytes", f"{base.nbytes:,}"]]
    rows = [[name, *(cell(m.comparison) for m in candidates)] for name, cell in _ROWS]
    if any(m.comparison.bound for m in candidates):
        cells = [f"{m.comparison.bound:.6f}" for m in candidates]
        rows.insert(1, ["Mean KLD, higher by at most", *cells])
    rows.append(["Bytes", *(f"{m.model.nbytes:,}" if m.model.nbytes else "-" for m in candidates)])
    if any(m.model.codes for m in candidates):
        rows.append(["Codes", *(m.model.codes or "plain" for m in candidates)])
    if any(m.speed for m in candidates):
        rows += [[name, *(cell(m) for m in candidates)] for name, cell in _SPEED_ROWS]
    rows += _served_rows(candidates)
    return ["KLD metric", *(m.model.name for m in candidates)], rows


def _served_rows(candidates: Sequence[ModelMeasurement]) -> list[list[str]]:
    """Return a row for each figure of speed and each number of requests at once."""
    counts = sorted({speed.at_once for m in candidates for speed in m.served_speed})
    rows = []
    for count in counts:
        found = [{s.at_once: s for s in m.served_speed}.get(count) for m in candidates]
        many = f"{count} at once" if count > 1 else "one request"
        for name, cell in _SERVED_ROWS:
            rows.append([f"{name} ({many})", *(cell(s) if s else "-" for s in found)])
    return rows
