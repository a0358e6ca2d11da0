"""Ranking reports: which candidate is closest, which to pick, and what cannot be compared."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qwen35
from made_reports import ROWS, candidate, report_of
from qwen35.cli.main import main
from qwen35.errors import InputError, UsageError
from qwen35.reporting.chart_labels import Box, place_labels
from qwen35.reporting.evaluation_page import page
from qwen35.reporting.marks import mark
from qwen35.reporting.ranking import Ranking, rank
from qwen35.reporting.reported import parse_report

Capture = pytest.CaptureFixture[str]


def ranked(*reports: dict[str, Any], loss: float = 0.01) -> Ranking:
    named = [(f"r{i}", parse_report(value, f"r{i}")) for i, value in enumerate(reports)]
    return rank(named, loss)


def verdict(ranking: Ranking) -> list[tuple[str, str]]:
    return [(line.title, line.name) for line in ranking.advice]


def test_closest_smallest_and_a_pick_for_each_engine() -> None:
    ranking = ranked(report_of())
    assert [row.label for row in ranking.models] == ["Q8_0", "fp8", "Q6_K", "Q4_K_M", "nf4"]
    assert [row.front for row in ranking.models] == [True, False, True, True, False]
    assert verdict(ranking) == [
        ("Closest", "Q8_0"),
        ("Smallest within 0.01 nats", "Q6_K"),
        ("Pick for llama.cpp", "Q6_K"),
        ("Pick for transformers", "fp8"),
    ]
    assert ranking.advice[2].reason == (
        "The smallest within 0.01 nats, 25 % smaller than Q8_0, the closest. "
        "If it is too large: Q4_K_M, 22 % smaller with 2.4 times the loss."
    )


def test_another_loss_is_another_pick() -> None:
    assert verdict(ranked(report_of(), loss=0.02))[1:] == [
        ("Smallest within 0.02 nats", "Q4_K_M"),
        ("Pick for llama.cpp", "Q4_K_M"),
        ("Pick for transformers", "nf4"),
    ]
    none = ranked(report_of(), loss=1e-4).advice
    assert (none[1].name, none[2].name) == ("", "Q8_0")
    assert none[1].reason == "None: the closest is 0.000400 nats from the base."
    assert none[2].reason.startswith("None is within 0.0001 nats; this one is the closest.")


def test_what_the_error_hides_is_said() -> None:
    rows = (("a", "x", 9, 0.00100), ("b", "x", 8, 0.00103), ("c", "x", 7, 0.002))
    reason = ranked(report_of(rows)).advice[0].reason
    assert reason.endswith("On this text it cannot be told from b.")


def test_one_candidate_and_none() -> None:
    assert verdict(ranked(report_of(ROWS[:1]))) == [("Loss", "nf4"), ("Within 0.01 nats", "")]
    assert verdict(ranked(report_of(()))) == []


@pytest.mark.parametrize("nbytes", [None, 0])
def test_a_candidate_without_size_is_ranked_and_never_picked(nbytes: int | None) -> None:
    value = report_of(ROWS[:2])
    value["candidates"].append(candidate("m-served", "server", nbytes, 1e-5))
    value["candidates"][2]["passage"] = [None, 0.5]
    ranking = ranked(value)
    assert verdict(ranking)[0] == ("Closest", "served")
    assert "served" not in [line.name for line in ranking.advice[1:]]
    html = page(value)
    assert html.count('id="point-') == 2
    assert html.count('<td data-value="">–</td>') == 1
    assert 'title="0.500 nats"' in html


def test_figures_that_were_not_measured_are_left_out() -> None:
    value = report_of(ROWS[:2])
    for row in value["candidates"]:
        row["figures"] = {"kld": row["figures"]["kld"]}
        del row["worst"], row["along"], row["passage"]
    html = page(value)
    assert '<figure id="size"' in html
    assert html.count("<figure") == 1


def test_reports_are_ranked_together() -> None:
    twice = report_of(
        (*ROWS[3:], ("m-Q8_0", "llama.cpp", 800, 0.0004), ("m-nf4", "llama.cpp", 650, 0.03))
    )
    ranking = ranked(report_of(ROWS[:3]), twice)
    found = [(row.label, row.model.report) for row in ranking.models]
    assert found == [
        ("Q8_0", "r0, r1"),  # with the same figures: once
        ("fp8", "r1"),
        ("Q6_K", "r1"),
        ("Q4_K_M", "r0"),
        ("nf4 (r0)", "r0"),
        ("nf4 (r1)", "r1"),
    ]


def test_what_cannot_be_compared_is_refused() -> None:
    tokens = report_of(tokens={"sha256": "ef", "context": 512, "chunks": 5, "scored": 1275})
    expected = (
        r"^r1: measured on other tokens \(t.txt, 5 chunks of 512\), expected those of r0 "
        r"\(t.txt, 4 chunks of 512\); evaluate both on the same text"
    )
    with pytest.raises(InputError, match=expected):
        ranked(report_of(), tokens)
    base = copy.deepcopy(report_of())
    base["base"]["perplexity"]["value"] = 9.1
    with pytest.raises(InputError, match=r"^r1: its base m has perplexity 9.1000, expected 9.0000"):
        ranked(report_of(), base)
    base["base"]["perplexity"]["value"] = 9.001  # another engine
    assert ranked(report_of(), base).models


# --- the verb


def written(folder: Path, value: object) -> str:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(value))
    return str(folder)


def test_the_verb_prints_a_verdict_and_writes_a_page(tmp_path: Path, capsys: Capture) -> None:
    places = [
        written(tmp_path / name, report_of(rows))
        for name, rows in (("a", ROWS[:2]), ("b", ROWS[2:]))
    ]
    out = tmp_path / "out"
    assert main(["report", *places, "--output", str(out)]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0] == "m, BF16 in transformers: 4 chunks of 512 tokens, 1020 scored"
    assert lines[1].startswith(
        "Closest: Q8_0. 0.000400 nats per token, the same most likely token in"
    )
    assert [line.split("  ")[0] for line in lines[-5:]] == [
        "1. Q8_0 [a]", "2. fp8 [b]", "3. Q6_K [b]", "4. Q4_K_M [b]", "5. nf4 [a]"
    ]  # fmt: skip
    assert said.err == f"{out}/report.html: written\n"
    html = (out / "report.html").read_text()
    assert "Compares 2 reports: a, b." in html
    assert html.count('class="printed"') == 4
    assert main(["report", *places, "--output", str(out)]) == 2
    assert "exists already; give --overwrite" in capsys.readouterr().err
    assert main(["report", *places, "--output", str(out), "--overwrite", "--loss", "0.02"]) == 0
    assert "Smallest within 0.02 nats" in (out / "report.html").read_text()
    assert not list(tmp_path.rglob("report.html"))[1:]


def test_a_report_is_found_where_people_look_for_it(tmp_path: Path, capsys: Capture) -> None:
    folder = written(tmp_path / "run" / "report", report_of())
    for place in (folder, f"{folder}/report.json", f"{folder}/report.html"):
        assert len(qwen35.report([place]).models) == 5
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/run: no report.json in it, expected a folder that qwen35 evaluate "
        f"--report wrote; did you mean {folder}?\n"
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "not a report of an evaluation"),
        ({"model": "m"}, "not a report of an evaluation"),
        (report_of(report=2), "a report of version 2, expected 1"),
        (report_of(base=7), "base is 7, expected an object"),
        (
            report_of(candidates=[{"figures": {}}]),
            "candidates[0].name is missing, expected a string",
        ),
        (report_of(candidates=[1] * 20_000), "candidates has 20000 entries, expected at most"),
        (report_of(tool={"a": 1}), "tool.a is 1, expected a string"),
        (report_of(table={"columns": ["a"], "rows": [["b", "c"]]}), "expected rows of 1 strings"),
        (report_of([("a", "x", True, 1.0)]), "candidates[0].bytes is True, expected a count"),
        (report_of([("a", "x", 1, 1e200)]), "candidates[0].passage is 1e+200, expected a number"),
        (report_of([("a", "x", 1, 1.0)] * 300), "300 candidates, expected at most 256"),
    ],
)
def test_what_is_no_report_is_a_sentence(
    value: object, message: str, tmp_path: Path, capsys: Capture
) -> None:
    place, out = written(tmp_path / "a", value), tmp_path / "out"
    assert main(["report", place, "--output", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"report": NaN}'])
def test_what_is_no_json_is_a_sentence(content: bytes, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert main(["report", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: not valid JSON")


def test_arguments(tmp_path: Path) -> None:
    place = written(tmp_path / "a", report_of())
    for loss in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="--loss: .*, expected a positive number of nats"):
            qwen35.report([place], loss=loss)
    with pytest.raises(
        UsageError, match="reports: none given, expected folders that evaluate wrote"
    ):
        qwen35.report([])
    assert len(qwen35.report(place).models) == 5
    with pytest.raises(InputError, match="given twice"):
        qwen35.report([place, tmp_path / "a" / "report.json"])


# --- marks and labels


def test_marks_are_all_different() -> None:
    marks = [mark(place) for place in range(64)]
    assert len({(one.colour, one.shape) for one in marks}) == 64
    assert len({one.shape for one in marks[:8]}) == len({one.colour for one in marks[:8]}) == 8


@given(
    st.lists(st.tuples(st.floats(0, 300), st.floats(0, 200)), min_size=1, max_size=14),
    st.lists(st.floats(5, 120), min_size=14, max_size=14),
)
def test_labels_meet_neither_labels_nor_marks(
    points: list[tuple[float, float]], widths: list[float]
) -> None:
    area = Box(-5, -5, 320, 210)
    texts = [[("name", width), ("1", 6.0)] for width in widths[: len(points)]]
    labels = place_labels(points, texts, 11.0, area, 6.0)
    boxes = []
    for label, choices in zip(labels, texts, strict=True):
        if label is not None:
            (x, y), half = label.centre, dict(choices)[label.text] / 2
            boxes.append(Box(x - half, y - 5.5, x + half, y + 5.5))
    assert all(area.holds(box) for box in boxes)
    assert not any(a.meets(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.has(point) for box in boxes for point in points)


def test_few_points_all_have_their_names() -> None:
    points = [(50.0 + 40 * i, 100.0) for i in range(5)]
    labels = place_labels(points, [[("name", 60.0)]] * 5, 11.0, Box(0, 0, 300, 200), 6.0)
    assert all(label and label.text == "name" for label in labels)
