"""Tables of speed and of tuning, built from the figures that benchmarks/ measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from textwrap import wrap
from typing import Any

from generating.markdown import table

__all__ = ["benchmark_tables", "tuned_lines"]

_DOCS = Path(__file__).parents[1]
_FIGURES = {"wall": "wall time", "cpu": "CPU time", "memory": "peak memory"}
_Results = Mapping[str, Mapping[str, Any]]


def benchmark_tables() -> Mapping[str, Callable[[], Iterable[str]]]:
    """Return what yields the lines of each table; a benchmark's name is that of its costs."""
    results: _Results = json.loads((_DOCS / "benchmarks.json").read_text("utf-8"))
    return {
        "environment": partial(_environment_lines, results),
        "ratios": partial(_ratio_lines, results),
        "headlines": partial(_headline_lines, results),
        **{name: partial(_cost_lines, result) for name, result in results.items()},
    }


def _environment_lines(results: _Results) -> Iterator[str]:
    """Yield each machine with its libraries, once, and when it measured."""
    days: dict[str, set[str]] = {}
    for result in results.values():
        found = dict(result["environment"])
        machine, processor, count = (
            found.pop(name) for name in ("machine", "processor", "processors")
        )
        libraries = ", ".join(f"{name} {version}" for name, version in found.items())
        processors = f"{count} processors of {processor or 'unknown kind'}"
        days.setdefault(f"{machine}, {processors}; {libraries}", set()).add(result["date"])
    for words, seen in days.items():
        yield from wrap(f"{words}; {', '.join(sorted(seen))}.", 128)
    yield ""


def _ratio_lines(results: _Results) -> Iterator[str]:
    rows = [
        [row["ours"], row["alternative"], *(_spread(row.get(figure)) for figure in _FIGURES)]
        for result in results.values()
        for row in result["ratios"]
    ]
    yield from table(("ours", "alternative", *_FIGURES.values()), rows)


def _headline_lines(results: _Results) -> Iterator[str]:
    """Yield the README's sentences, and the ratios that it shows."""
    means = {
        row["recipe"]: (row["hand_made"]["mean_kld"], row["tuned"]["mean_kld"])
        for row in _tuned_rows()
        if row["type"] == "Q4_K_M"
    }
    less = [f"{_less(*pair)} less than `{recipe}`" for recipe, pair in means.items()]
    words = (
        "Cost of each alternative divided by ours, random weights with the shapes of 0.8B "
        "([benchmarks](docs/benchmarks.md)). At the size of Q4_K_M, a tuned file's mean KLD is "
        f"{' and '.join(less)} (embedded checkpoint)."
    )
    yield from wrap(words, 128)
    yield ""
    rows = [
        [row["ours"], row["alternative"], *(_middle(row.get(figure)) for figure in _FIGURES)]
        for result in results.values()
        for row in result["ratios"]
        if row["headline"]
    ]
    yield from table(("", "compared with", *_FIGURES.values()), rows)


def _cost_lines(result: Mapping[str, Any]) -> Iterator[str]:
    rounds = result["settings"]["rounds"]
    title = f"{result['title']}: median of {rounds} rounds" if rounds > 1 else result["title"]
    rows = [
        [name, *(f"{median(cost[figure]):,.{digits}f}" for figure, digits in _DIGITS.items())]
        for name, cost in result["costs"].items()
    ]
    yield from table((title, "wall s", "CPU s", "peak MB"), rows) if rows else ["Not measured yet."]


_DIGITS = {"wall": 2, "cpu": 2, "memory": 0}


def _spread(ratio: Mapping[str, float] | None) -> str:
    """Return a ratio with its range over the rounds.

    >>> _spread({"median": 10.24, "low": 9.21, "high": 10.6}), _spread(None)
    ('10.2 (9.21 to 10.6)', '')
    """
    if ratio is None or ratio["low"] == ratio["high"]:
        return _middle(ratio)
    return f"{_middle(ratio)} ({_number(ratio['low'])} to {_number(ratio['high'])})"


def _middle(ratio: Mapping[str, float] | None) -> str:
    return "" if ratio is None else _number(ratio["median"])


def _number(value: float) -> str:
    """Return a ratio with two digits or more.

    >>> _number(75.4), _number(10.24), _number(1.847), _number(0.042)
    ('75', '10.2', '1.85', '0.042')
    """
    digits = 0 if value >= 20 else 1 if value >= 10 else 2 if value >= 0.1 else 3
    return f"{value:.{digits}f}"


def tuned_lines() -> Iterator[str]:
    """Yield the table of tuned files at the size of hand-made ones."""
    rows = []
    probes = _tuned_results()["probes"]
    for row in _tuned_rows():
        hand, tuned = (row[name] for name in ("hand_made", "tuned"))
        label = f"`{row['recipe']}`, {row['type']}"
        means, tails = ([f"{one[key]:.6f}" for one in (hand, tuned)] for key in _TUNED)
        before = probes["mean_kld"][f"{row['recipe']}, {row['type']}"]
        less = _less(hand["mean_kld"], tuned["mean_kld"])
        ratio = f"{row['predicted'] / tuned['mean_kld']:.2f}"
        middle = [means[0], f"{before:.6f}", means[1], less, ratio]
        rows.append([label, f"{tuned['bytes']:,}", *middle, *tails])
    named = ("mean KLD, hand-made", f"{probes['count']} probes", "prices", "less", "predicted")
    heads = (*named, "99.9 %, hand-made", "prices")
    yield from table(("at the size of", "bytes", *heads), rows)
    results = _tuned_results()
    shares = [100 * row["inputs"] / row["predicted"] for row in _tuned_rows()]
    words = (
        f"Measuring and choosing took {results['cpu_seconds']} CPU seconds with prices, of "
        f"{results['chunks']} chunks, against {probes['cpu_seconds']} with probes on "
        f"{probes['chunks']}. The column predicted is the sum of prices over the mean KLD; "
        f"{min(shares):.0f} to {max(shares):.0f} % of the prices are of rounding inputs."
    )
    yield from wrap(words, 128)
    yield ""


_TUNED = ("mean_kld", "kld_99.9")


def _tuned_rows() -> Sequence[Mapping[str, Any]]:
    rows: Sequence[Mapping[str, Any]] = _tuned_results()["rows"]
    return rows


def _tuned_results() -> Mapping[str, Any]:
    results: Mapping[str, Any] = json.loads((_DOCS / "tune.json").read_text("utf-8"))
    return results


def _less(before: float, after: float) -> str:
    return f"{100 * (1 - after / before):.0f} %"
