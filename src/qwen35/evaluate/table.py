"""The table of an evaluation, in the words of llama-perplexity."""

from __future__ import annotations

from collections.abc import Callable

from qwen35.evaluate.result import Measured, Report
from qwen35.evaluate.statistics import PERCENTILES, Comparison, Estimate
from qwen35.table import table_lines

__all__ = ["notes", "report_text", "table"]

_NEAR = 3.0
"""Up to so many times the noise floor, a divergence says little."""

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
_FASTER: tuple[tuple[str, Callable[[Measured], str]], ...] = (
    (
        "Prompt, tokens/s",
        lambda m: f"{m.speed.prompt:.1f} (x{m.speed.prompt_ratio:.2f})" if m.speed else "-",
    ),
    (
        "Generation, tokens/s",
        lambda m: f"{m.speed.generation:.1f} (x{m.speed.generation_ratio:.2f})" if m.speed else "-",
    ),
)


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows, a column for each candidate; of the base alone without any."""
    base = report.base
    if not report.candidates:
        cell = _with_errors(report.base_perplexity, digits=4)
        return ["", base.name], [["PPL", cell], ["Bytes", f"{base.nbytes:,}"]]
    every = report.candidates
    rows = [[name, *(cell(m.comparison) for m in every)] for name, cell in _ROWS]
    if any(m.comparison.bound for m in every):
        cells = [f"{m.comparison.bound:.6f}" for m in every]
        rows.insert(1, ["Mean KLD, higher by at most", *cells])
    rows.append(["Bytes", *(f"{m.model.nbytes:,}" for m in every)])
    if any(m.speed for m in every):
        rows += [[name, *(cell(m) for m in every)] for name, cell in _FASTER]
    return ["KLD metric", *(m.model.name for m in every)], rows


def report_text(report: Report, width: int | None = None) -> str:
    """Render a report for a terminal of so many columns, or for none."""
    chunks = report.chunks
    lines = [
        f"{report.base.name}, {report.base.stored} in {report.base.engine}: {chunks.count} chunks "
        f"of {chunks.context} tokens, {chunks.count * chunks.scored} scored",
        "",
        *table_lines(*table(report), width),
        "",
        "± takes tokens as independent, as llama-perplexity does; (in brackets) takes chunks",
        *notes(report),
    ]
    return "\n".join(lines)


def notes(report: Report) -> list[str]:
    """Return what a reader of the table must know, a sentence each."""
    said = [
        f"noise floor: the unquantized model in {row.model.engine} ({row.model.stored}) is "
        f"{row.comparison.kld.value:.3g} nats from itself in {report.base.engine} "
        f"(99.9%: {row.comparison.percentiles[99.9]:.3g}, same top p "
        f"{row.comparison.same_top.value:.3%})"
        for row in report.floors
    ]
    if report.candidates and not report.floors:
        said.append(f"noise floor: none between engines, all run in {report.base.engine}")
    for row in report.candidates:
        same = row.model.engine == report.base.engine
        if not same and row.comparison.kld.value < _NEAR * report.floor:
            said.append(f"{row.model.name}: within {_NEAR:g} times the noise floor")
    if report.reference == "16-bit file":
        said.append(
            "the base's log probabilities come from a 16-bit file: steps of up to 2.4e-4 nats, "
            "so that small percentiles are noise"
        )
    return said
