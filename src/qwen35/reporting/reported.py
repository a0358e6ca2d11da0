"""report.json read back: what the page and comparisons need of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen35.errors import InputError
from qwen35.evaluation.divergence import Estimate
from qwen35.evaluation.measured import WrongToken
from qwen35.reporting.checked_json import CheckedTable

__all__ = ["FiguresTable", "ReadReport", "ReportedModel", "parse_report"]

_VERSION = 1


@dataclass(frozen=True)
class ReportedModel:
    """A model of a report.

    Args:
        name: in the report's tables.
        stored: format of its weights.
        engine: what ran it.
        nbytes: of its weight files; None if that is not known.
        plan: digest of its plan, or empty.
        inputs: how layers' inputs were quantized, in a simulation; else empty.
        kld: mean divergence, in nats.
        same_top: share of tokens with the same most likely one; None if not measured, as below.
        ratio: perplexity divided by the base's.
        maximum: largest divergence.
        percentiles: divergence by percent.
        along: mean divergence of each window of the text.
        passage: text and divergence of each token of a typical passage, None if not compared.
        chunk: the number of the passage's chunk.
        worst: the tokens that diverge most.
        codes: how they were chosen, such as ``refined``; empty if they are the nearest.
        report: the name of its report, where several are compared.
    """

    name: str
    stored: str
    engine: str
    nbytes: int | None
    plan: str
    inputs: str
    kld: Estimate
    same_top: float | None
    ratio: float | None
    maximum: float | None
    percentiles: Mapping[float, float]
    along: Sequence[float]
    passage: Sequence[tuple[str, float | None]]
    chunk: int
    worst: Sequence[WrongToken]
    codes: str = ""
    report: str = ""

    @property
    def error(self) -> float:
        """Standard error of the mean divergence, by chunks if there are several."""
        return self.kld.error if self.kld.block_error is None else self.kld.block_error


@dataclass(frozen=True)
class FiguresTable:
    """The table of all figures.

    Args:
        title: the report's name, where several are compared.
        columns: headings.
        rows: as many cells as there are headings in each.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class ReadReport:
    """A report.

    Args:
        base: name of the unquantized model.
        stored: its format.
        engine: what ran it.
        perplexity: its perplexity.
        text: name and SHA-256 of the text; empty if the tokens came from a file.
        tokens: SHA-256 of the tokens.
        context: tokens in a chunk.
        chunks: number of chunks.
        scored: number of scored tokens.
        candidates: the models compared with the base.
        simulations: of them, with quantized inputs.
        floors: the unquantized model in other engines.
        findings: subject and sentence of each.
        table: all figures.
        details: names and values of how it was measured.
    """

    base: str
    stored: str
    engine: str
    perplexity: float
    text: tuple[str, str]
    tokens: str
    context: int
    chunks: int
    scored: int
    candidates: Sequence[ReportedModel]
    simulations: Sequence[ReportedModel]
    floors: Sequence[ReportedModel]
    findings: Sequence[tuple[str, str]]
    table: FiguresTable
    details: Sequence[tuple[str, str]]


def parse_report(value: Any, subject: str) -> ReadReport:
    """Return what report.json holds.

    Args:
        value: the parsed JSON, of any form.
        subject: its file, for error messages.

    Raises:
        InputError: it is not a report of `evaluate`.
    """
    if not isinstance(value, dict) or "report" not in value:
        expected = "the report.json that qwen35 evaluate --report wrote"
        raise InputError(subject, "not a report of an evaluation", expected=expected)
    top = CheckedTable(value, subject)
    if (version := top.count("report")) != _VERSION:
        raise InputError(subject, f"a report of version {version}", expected=str(_VERSION))
    base, tokens = top.table("base"), top.table("tokens")
    chunk, pieces = 0, list[str]()
    if top.has("passage"):
        passage = top.table("passage")
        chunk, pieces = passage.count("chunk"), passage.texts("tokens")
    rows = {
        key: [_model(row, chunk, pieces) for row in top.tables(key)]
        for key in ("candidates", "simulations", "noise_floor")
    }
    return ReadReport(
        base=base.text("name"),
        stored=base.text("stored"),
        engine=base.text("engine"),
        perplexity=base.table("perplexity").number("value"),
        text=_text(top),
        tokens=tokens.text("sha256"),
        context=tokens.count("context"),
        chunks=tokens.count("chunks"),
        scored=tokens.count("scored"),
        candidates=rows["candidates"],
        simulations=rows["simulations"],
        floors=rows["noise_floor"],
        findings=[(row.text("subject"), row.text("message")) for row in top.tables("findings")],
        table=_figures_table(top.table("table")),
        details=_details(top, base, tokens, rows["candidates"]),
    )


def _text(top: CheckedTable) -> tuple[str, str]:
    if not top.has("text"):
        return "", ""
    text = top.table("text")
    return text.text("name"), text.text("sha256")


def _figures_table(table: CheckedTable) -> FiguresTable:
    columns = table.texts("columns")
    return FiguresTable("", columns, table.rows("rows", len(columns)))


def _details(
    top: CheckedTable,
    base: CheckedTable,
    tokens: CheckedTable,
    candidates: Sequence[ReportedModel],
) -> list[tuple[str, str]]:
    _, text = _text(top)
    device = top.text("device")
    plans = [(base.text("name"), base.text("plan") if base.has("plan") else "")]
    plans += [(model.name, model.plan) for model in candidates]
    return [
        *([("text", f"SHA-256 {text}")] if text else []),
        ("tokens", f"SHA-256 {tokens.text('sha256')}"),
        ("reference", top.text("reference")),
        *([("transformers", f"float32 arithmetic on {device}")] if device else []),
        *top.table("tool").items(),
        *((name, f"plan {plan}") for name, plan in plans if plan),
    ]


def _model(row: CheckedTable, chunk: int, pieces: Sequence[str]) -> ReportedModel:
    figures, passage = row.table("figures"), row.numbers_or_none("passage")
    percentiles = (
        dict(figures.table("percentiles").numbered()) if figures.has("percentiles") else {}
    )
    return ReportedModel(
        name=row.text("name"),
        stored=row.text("stored"),
        engine=row.text("engine"),
        nbytes=(row.count("bytes") if row.has("bytes") else 0) or None,  # 0: not known either
        plan=row.text("plan") if row.has("plan") else "",
        inputs=row.text("inputs") if row.has("inputs") else "",
        kld=_estimate(figures.table("kld")),
        same_top=_value(figures, "same_top"),
        ratio=_value(figures, "ratio"),
        maximum=figures.number("maximum") if figures.has("maximum") else None,
        percentiles=percentiles,
        along=row.numbers("along"),
        passage=list(zip(pieces, passage, strict=False)),
        chunk=chunk,
        worst=[_token(token) for token in row.tables("worst")],
        codes=row.text("codes") if row.has("codes") else "",
    )


def _estimate(table: CheckedTable) -> Estimate:
    block = table.number("block_error") if table.has("block_error") else None
    return Estimate(table.number("value"), table.number("error"), block)


def _value(figures: CheckedTable, key: str) -> float | None:
    return figures.table(key).number("value") if figures.has(key) else None


def _token(table: CheckedTable) -> WrongToken:
    return WrongToken(
        chunk=table.count("chunk"),
        place=table.count("place"),
        kld=table.number("kld"),
        before=table.text("before"),
        token=table.text("token"),
        after=table.text("after"),
        base_top=table.text("base_top"),
        top=table.text("top"),
        base_probability=table.number("base_probability"),
        probability=table.number("probability"),
    )
