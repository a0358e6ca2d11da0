"""Benchmarks: what is computed from the rounds, what is kept, and where the figures are shown."""

from __future__ import annotations

import doctest
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pages import ROOT

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "docs"))
from benchmarks.__main__ import SCRIPTS, kept
from benchmarks.measuring import Comparison, Cost, environment, ratio_lines, summary
from generating import benchmarks as tables
from generating import marked

ROUNDS = [
    {"ours": Cost(wall=1, cpu=2, memory=50), "theirs": Cost(wall=4, cpu=2, memory=500)},
    {"ours": Cost(wall=2, cpu=2, memory=50), "theirs": Cost(wall=4, cpu=1, memory=500)},
    {"ours": Cost(wall=4, cpu=2, memory=100), "theirs": Cost(wall=12, cpu=6, memory=500)},
]


def measured() -> dict[str, Any]:
    comparisons = [Comparison("ours", "theirs", headline=True), Comparison("ours", "not measured")]
    result = summary("A title", ROUNDS, comparisons)
    return result | {"settings": {"size": "tiny", "rounds": 3}, "seconds": 1}


def test_a_ratio_is_taken_within_a_round() -> None:
    (row,) = measured()["ratios"]
    assert row["wall"] == {"median": 3, "low": 2, "high": 4}  # of medians: 4 / 2
    assert row["cpu"] == {"median": 1, "low": 0.5, "high": 3}
    assert row["memory"] == {"median": 10, "low": 5, "high": 10}
    assert row["rounds"] == 3


def test_the_cost_of_every_round_is_kept() -> None:
    assert measured()["costs"]["theirs"]["wall"] == [4, 4, 12]


def test_a_figure_below_the_start_up_is_left_out() -> None:
    start = Cost(wall=2, cpu=1, memory=10)
    rounds = [{"ours": one["ours"].beyond(start), "theirs": one["theirs"]} for one in ROUNDS]
    assert set(Comparison("ours", "theirs").row(rounds)) >= {"cpu", "memory"}
    assert "wall" not in Comparison("ours", "theirs").row(rounds)


def test_costs_of_consecutive_processes() -> None:
    first, second = Cost(1, 2, 30), Cost(3, 4, 20)
    assert first.then(second) == Cost(4, 6, 30)
    assert second.repeated(16, Cost(1, 1, 10)) == Cost(1 + 16 * 2, 1 + 16 * 3, 20)


def test_the_table_of_a_run_shows_the_spread() -> None:
    assert "    wall time        3.00  (2.00 to 4.00)" in ratio_lines([measured()])


def test_the_peak_memory_of_a_process_is_its_own() -> None:
    code = "from benchmarks.measuring import measure; print(measure(['true']).memory)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 40  # a large parent would show here


def test_an_interrupted_run_keeps_results_of_this_machine_and_these_settings(
    tmp_path: Path,
) -> None:
    path, result = tmp_path / "nf4.json", measured()
    assert kept(path, result["settings"]) is None
    path.write_text(json.dumps(result))
    assert kept(path, {"size": "tiny", "rounds": 3}) == result
    assert kept(path, {"size": "0.8B", "rounds": 3}) is None
    path.write_text(json.dumps(result | {"environment": environment() | {"numba": "0.1"}}))
    assert kept(path, {"size": "tiny", "rounds": 3}) is None


# --- pages


def test_examples_in_the_generator_are_true() -> None:
    assert doctest.testmod(tables) == (0, 2)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a page whose tables come from results made here."""
    (tmp_path / "benchmarks.json").write_text(json.dumps({"nf4": measured()}))
    (tmp_path / "tune.json").write_bytes((ROOT / "docs" / "tune.json").read_bytes())
    monkeypatch.setattr(tables, "_DOCS", tmp_path)
    return tmp_path / "page.md"


def rebuilt(page: Path, name: str) -> str:
    page.write_text(f"before\n<!-- {name} -->\nold<!-- /{name} -->\nafter")
    text = marked.with_tables(page)
    assert text.startswith("before\n")
    assert text.endswith("\nafter")
    assert "old" not in text
    return text


def test_tables_are_made_from_the_results(page: Path) -> None:
    spread = "| ours | theirs | 3.00 (2.00 to 4.00) | 1.00 (0.50 to 3.00) | 10.0 (5.00 to 10.0) |"
    assert spread in rebuilt(page, "benchmarks.json: ratios")
    assert "| ours | theirs | 3.00 | 1.00 | 10.0 |" in rebuilt(page, "benchmarks.json: headlines")
    assert "| A title: median of 3 rounds |" in rebuilt(page, "benchmarks.json: nf4")
    assert "| ours | 2.00 | 2.00 | 50 |" in rebuilt(page, "benchmarks.json: nf4")
    assert environment()["numpy"] in rebuilt(page, "benchmarks.json: environment")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<!-- benchmarks.json: fast -->\n<!-- /benchmarks.json: fast -->", "no such table"),
        ("<!-- benchmarks.json: nf4 -->\n", "without its other end"),
        ("<!-- tune.json -->\n<!-- /results.json -->", "without its other end"),
    ],
)
def test_a_wrong_mark_is_refused(page: Path, text: str, told: str) -> None:
    page.write_text(text)
    with pytest.raises(SystemExit, match=told):
        marked.with_tables(page)


def test_every_benchmark_of_the_run_has_its_table() -> None:
    results = json.loads((ROOT / "docs" / "benchmarks.json").read_text("utf-8"))
    assert tuple(results) == SCRIPTS
    text = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    shown = re.findall(r"<!-- benchmarks\.json: (\w+) -->", text)
    assert shown == ["environment", "ratios", *SCRIPTS]


def test_no_speed_in_the_readme_is_typed() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    section = text.partition("## Speed")[2].partition("\n## ")[0]
    name = "benchmarks.json: headlines"
    before, _, rest = section.partition(f"<!-- {name} -->")
    assert rest.count("\n| ") >= 5
    assert not re.search(r"\d", before + rest.partition(f"<!-- /{name} -->")[2])


# --- the scripts themselves


@pytest.mark.heavy
def test_every_benchmark_runs_on_the_embedded_checkpoint(tmp_path: Path) -> None:
    output = tmp_path / "benchmarks.json"
    command = [sys.executable, "-m", "benchmarks", "--size", "tiny", "--rounds", "1"]
    command += ["--work", str(tmp_path / "work"), "--output", str(output)]
    subprocess.run(command, cwd=ROOT, check=True)
    results = json.loads(output.read_text("utf-8"))
    assert tuple(results) == SCRIPTS
    for result in results.values():
        assert all(cost["wall"] for cost in result["costs"].values())
