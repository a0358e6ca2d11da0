"""Candidates of one or more reports by their loss, and which of them to pick."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from math import hypot
from typing import Any

from qwen35.display import counted, cut, size
from qwen35.errors import InputError
from qwen35.evaluation.measured import front
from qwen35.reporting.reported import ReadReport, ReportedModel
from qwen35.table import html_table

__all__ = [
    "LOSS",
    "Advice",
    "RankedModel",
    "Ranking",
    "error_of",
    "nats",
    "perplexity_change",
    "rank",
    "short_names",
]

LOSS = 0.01
"""Mean divergence to accept, in nats: about Q5_K_M of an 8B model.

Source: the table of Llama 3 8B in ``tools/perplexity/README.md`` of ggml-org/llama.cpp at 0c1e570:
Q6_K 0.0055, Q5_K_M 0.0108, Q4_K_M 0.0313.
"""

_APART = 2.0
"""Standard errors between two means that can be told apart."""

_SAME_BASE = 1e-3
"""Largest relative difference of one model's perplexity between engines and machines."""


@dataclass(frozen=True)
class RankedModel:
    """A candidate.

    Args:
        place: 1 for the closest.
        model: its figures.
        label: a short name, for charts.
        front: no other candidate is both smaller and closer.
    """

    place: int
    model: ReportedModel
    label: str
    front: bool

    @property
    def cells(self) -> list[str]:
        """Place and name, size, mean divergence, its error, same top tokens, and perplexity."""
        model = self.model
        report = f" [{model.report}]" if model.report and not self.label.endswith(")") else ""
        return [
            f"{self.place}. {self.label}{report}",
            "-" if model.nbytes is None else size(model.nbytes),
            nats(model.kld.value),
            error_of(model.kld.value, model.error),
            "-" if model.same_top is None else f"{100 * model.same_top:.1f} %",
            "-" if model.ratio is None else perplexity_change(model.ratio),
        ]


@dataclass(frozen=True)
class Advice:
    """A line of the verdict.

    Args:
        title: the question that it answers.
        name: the short name of the answer; empty if there is none.
        reason: a sentence about it.
    """

    title: str
    name: str
    reason: str


@dataclass(frozen=True)
class Ranking:
    """All candidates, closest first.

    Args:
        reports: name of each report, or an empty one, and the report.
        models: the candidates.
        loss: mean divergence to accept, in nats.
    """

    reports: Sequence[tuple[str, ReadReport]]
    models: Sequence[RankedModel]
    loss: float

    def __repr__(self) -> str:
        found = "; ".join(f"{one.title}: {one.name or one.reason}" for one in self.advice)
        return f"<Ranking {self.base.base}: {found or 'no candidates'}>"

    def _repr_html_(self) -> str:
        verdict = html_table(("", "", ""), [(a.title, a.name, a.reason) for a in self.advice])
        columns = ("", "size", "mean KLD", "±", "same top", "perplexity")
        return verdict + html_table(columns, [row.cells for row in self.models])

    @property
    def base(self) -> ReadReport:
        """The first report, for what all have in common."""
        return self.reports[0][1]

    @property
    def advice(self) -> list[Advice]:
        """The verdict: the closest, the smallest within the loss, and what to pick."""
        return list(_advice(self)) if self.models else []

    @property
    def notes(self) -> list[str]:
        """Sentences on how to read the figures, each once."""
        return list(dict.fromkeys(note for _, report in self.reports for note in _notes(report)))

    def to_json(self) -> dict[str, Any]:
        """Return the ranking as JSON values."""
        base = self.base
        return {
            "base": base.base,
            "text": base.text[0],
            "tokens": base.tokens,
            "scored": base.scored,
            "loss": self.loss,
            "verdict": [
                {"title": one.title, "name": one.name, "reason": one.reason} for one in self.advice
            ],
            "candidates": [_row_json(row) for row in self.models],
        }


def perplexity_change(ratio: float) -> str:
    """Return how far a perplexity is from the base's; nothing is neither more nor less.

    >>> perplexity_change(1.0308), perplexity_change(0.99998)
    ('+3.08 %', '0.00 %')
    """
    text = f"{100 * ratio - 100:+.2f} %"
    return text if text.strip("+-0. %") else text[1:]


def _notes(report: ReadReport) -> Iterator[str]:
    alike: dict[str, list[ReportedModel]] = {}
    for row in report.simulations:
        alike.setdefault(row.inputs, []).append(row)
    for inputs, rows in alike.items():
        found = ", ".join(f"{row.name} {nats(row.kld.value)}" for row in rows)
        found = found.replace(" (inputs quantized)", "")
        yield (
            f"As run by servers, which quantize the inputs of packed layers too ({inputs}): "
            f"{found} nats. Ranks and charts are of weights alone."
        )
    for row in report.floors:
        yield (
            f"Noise floor: the unquantized model in {row.engine} ({row.stored}) is "
            f"{nats(row.kld.value)} nats from itself in {report.engine}. A candidate in "
            f"{row.engine} that is not well above it differs by engine, not by quantization."
        )


def _row_json(row: RankedModel) -> dict[str, Any]:
    model = row.model
    return {
        "place": row.place,
        "name": model.name,
        "label": row.label,
        "report": model.report,
        "stored": model.stored,
        "codes": model.codes,
        "engine": model.engine,
        "bytes": model.nbytes,
        "front": row.front,
        "kld": model.kld.value,
        "kld_error": model.error,
        "same_top": model.same_top,
        "perplexity_ratio": model.ratio,
    }


def rank(reports: Sequence[tuple[str, ReadReport]], loss: float = LOSS) -> Ranking:
    """Rank the candidates of reports.

    Args:
        reports: each with its name, which may be empty if it is the only one.
        loss: mean divergence to accept, in nats.

    Raises:
        InputError: the reports are not of the same tokens or of the same base.
    """
    (first, reference), *others = reports
    for name, report in others:
        _check_comparable(name, report, first, reference)
    models = list(_distinct(reports)) if others else list(reference.candidates)
    models.sort(key=lambda model: model.kld.value)  # stable: equal ones as they were given
    sized = [model for model in models if model.nbytes is not None]
    on_front = dict(
        zip(
            map(id, sized),
            front([model.nbytes or 0 for model in sized], [model.kld.value for model in sized]),
            strict=True,
        )
    )
    ranked = [
        RankedModel(place, model, label, on_front.get(id(model), False))
        for place, (model, label) in enumerate(
            zip(models, _labels(models, reference.base), strict=True), 1
        )
    ]
    return Ranking(reports, ranked, loss)


def _distinct(reports: Sequence[tuple[str, ReadReport]]) -> Iterator[ReportedModel]:
    """Yield candidates with their reports; one that was measured twice with one result is once."""
    found: dict[object, ReportedModel] = {}
    for name, report in reports:
        for model in report.candidates:
            key = (model.name, model.plan, model.engine, model.nbytes, model.kld)
            known = found.get(key)
            found[key] = replace(model, report=f"{known.report}, {name}" if known else name)
    yield from found.values()


def _check_comparable(name: str, report: ReadReport, first: str, reference: ReadReport) -> None:
    if (report.tokens, report.scored) != (reference.tokens, reference.scored):
        raise InputError(
            name,
            f"measured on other tokens ({_measured_on(report)})",
            expected=f"those of {first} ({_measured_on(reference)})",
            hint="evaluate both on the same text with the same --chunks and --context",
        )
    base, expected = cut(report.base, 80), cut(reference.base, 80)
    if abs(report.perplexity - reference.perplexity) > _SAME_BASE * abs(reference.perplexity):
        raise InputError(
            name,
            f"its base {base} has perplexity {report.perplexity:.4f}",
            expected=f"{reference.perplexity:.4f}, that of {expected} in {first}",
            hint="divergences from different models cannot be compared",
        )


def _measured_on(report: ReadReport) -> str:
    text = f"{cut(report.text[0], 80)}, " if report.text[0] else ""
    return f"{text}{counted(report.chunks, 'chunk')} of {report.context}"


def _labels(models: Sequence[ReportedModel], base: str) -> list[str]:
    """Return short names, with the report's where one name is in several reports."""
    short = short_names([model.name for model in models], base)
    return [
        f"{label} ({model.report})" if model.report and short.count(label) > 1 else label
        for label, model in zip(short, models, strict=True)
    ]


def short_names(names: Sequence[str], base: str) -> list[str]:
    """Remove the base's name, and the common prefix of all names up to its last hyphen.

    >>> short_names(["Qwen3.5-4B-Q8_0", "Qwen3.5-4B-FP8"], "Qwen3.5-4B-F16")
    ['Q8_0', 'FP8']
    >>> short_names(["nf4", "tiny-Q8_0"], "tiny")
    ['nf4', 'Q8_0']
    """
    names = [name.removeprefix(f"{base}-") or name for name in names]
    if len(set(names)) < 2:
        return names
    common = len(list(takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))))
    start = names[0][:common].rfind("-") + 1
    return [name[start:] or name for name in names]


def nats(value: float) -> str:
    """Format a divergence with three digits.

    >>> nats(0.0158213), nats(1.234), nats(0.00000412), nats(0.0)
    ('0.0158', '1.23', '4.12e-06', '0')
    """
    return f"{value:#.3g}" if value else "0"


def error_of(value: float, error: float) -> str:
    """Format a standard error with the decimals that `nats` gives the value.

    >>> error_of(0.000385, 0.00001), error_of(0.0522, 0.0021), error_of(1.19e-05, 3.8e-07)
    ('0.000010', '0.0021', '3.8e-07')
    >>> error_of(0.1, 0.00002)
    '2e-05'
    """
    decimals = len(nats(value).partition(".")[2])
    text = f"{error:.{decimals}f}"
    plain = decimals and "e" not in nats(value) and (float(text) or not error)
    return text if plain else f"{error:.2g}"


def _advice(ranking: Ranking) -> Iterator[Advice]:
    models, within = ranking.models, f"within {ranking.loss:g} nats"
    closest = models[0]
    if len(models) == 1:
        is_near = "Yes" if closest.model.kld.value <= ranking.loss else "No"
        yield Advice("Loss", closest.label, _about(closest))
        yield Advice(within.capitalize(), "", f"{is_near}.")
        return
    yield Advice("Closest", closest.label, _about(closest) + _not_told_apart(models))
    sized = [row for row in models if row.model.nbytes is not None]
    title = f"Smallest {within}"
    if not (near := _within(sized, ranking.loss)):
        least = nats(closest.model.kld.value)
        yield Advice(title, "", f"None: the closest is {least} nats from the base.")
    else:
        yield Advice(title, near[0].label, _about(near[0]))
    engines = sorted({row.model.engine for row in sized})
    for engine in engines:
        of_engine = [row for row in sized if row.model.engine == engine]
        where = f" for {engine}" if len(engines) > 1 else ""
        pick = (_within(of_engine, ranking.loss) or of_engine)[0]
        yield Advice(f"Pick{where}", pick.label, _why(pick, of_engine, ranking.loss))


def _within(rows: Sequence[RankedModel], loss: float) -> list[RankedModel]:
    """Return the candidates within a loss, smallest first."""
    near = [row for row in rows if row.model.kld.value <= loss]
    return sorted(near, key=lambda row: row.model.nbytes or 0)


def _about(row: RankedModel) -> str:
    model = row.model
    parts = [f"{nats(model.kld.value)} nats per token"]
    if model.same_top is not None:
        parts.append(f"the same most likely token in {100 * model.same_top:.1f} %")
    if model.nbytes is not None:
        parts.append(size(model.nbytes))
    return f"{', '.join(parts)}."


def _not_told_apart(models: Sequence[RankedModel]) -> str:
    first, *others = (row.model for row in models)
    near = [
        row.label
        for row, model in zip(models[1:], others, strict=True)
        if model.kld.value - first.kld.value <= _APART * hypot(model.error, first.error)
    ]
    return f" On this text it cannot be told from {', '.join(near)}." if near else ""


def _why(pick: RankedModel, rows: Sequence[RankedModel], loss: float) -> str:
    """Say why it is picked, and what the next smaller one costs."""
    inside = pick.model.kld.value <= loss
    limit = f"{loss:g}"
    if len(rows) == 1:
        return f"The only one, {'within' if inside else 'not within'} {limit} nats."
    reason = f"The smallest within {limit} nats" if inside else f"None is within {limit} nats"
    closest = rows[0]
    if inside and closest is not pick:
        reason += f", {_smaller(pick, closest)} than {closest.label}, the closest"
    if not inside:
        reason += "; this one is the closest"
    smaller = [r for r in rows if (r.model.nbytes or 0) < (pick.model.nbytes or 0)]
    if not smaller:
        return f"{reason}."
    after = smaller[0]  # rows are closest first: the least loss below this size
    other = f"{after.label}, {_smaller(after, pick)}{_times(after, pick)}"
    return f"{reason}. If it is too large: {other}."


def _smaller(one: RankedModel, other: RankedModel) -> str:
    share = 1 - (one.model.nbytes or 0) / max(1, other.model.nbytes or 0)
    return f"{100 * share:.0f} % smaller"


def _times(one: RankedModel, other: RankedModel) -> str:
    if other.model.kld.value <= 0:
        return f", {nats(one.model.kld.value)} nats"
    return f" with {one.model.kld.value / other.model.kld.value:.1f} times the loss"
