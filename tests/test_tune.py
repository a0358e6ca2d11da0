"""Tuning: the solver is optimal, recipes say what was chosen, measurements are used again."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import ASSET
from gguf_models import make_variant
from imatrices import gguf_file
from qwen35.api.convert_api import convert
from qwen35.checkpoint.open import fetch
from qwen35.checkpoint.source import Reader
from qwen35.cli.main import main
from qwen35.codecs.floats import f32_from
from qwen35.codecs.ggml.quantizers import encode
from qwen35.errors import InputError, UsageError
from qwen35.planning.container import ContainerInputs
from qwen35.planning.gguf_files.gguf_plan import files_of
from qwen35.planning.gguf_files.imatrix import read_imatrix
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.work_order import plan_again
from qwen35.progress import Silent
from qwen35.tuning import solve
from qwen35.tuning.fit import Probe, UnitGroup, fit, group_units, rank_correlation
from qwen35.tuning.measurements import (
    MeasuredTrial,
    MeasurementKey,
    Measurements,
    load_measurements,
)
from qwen35.tuning.probing import ProbeSetting
from qwen35.tuning.recipe_search import TuningBudget
from qwen35.tuning.recipe_search import tune as tune_space
from qwen35.tuning.solve import cheapest, nearest
from qwen35.tuning.space import ChoiceSpace
from qwen35.tuning.units import Unit

Capture = pytest.CaptureFixture[str]

TYPES = ("q3_K", "q4_K", "q6_K", "q8_0", "f16")


@pytest.fixture(scope="module")
def gguf_space() -> ChoiceSpace:
    return ChoiceSpace(fetch(str(ASSET)), "gguf", TYPES)


def packed_space(kind: str) -> ChoiceSpace:
    return ChoiceSpace(fetch(str(ASSET)), kind, (kind, "plain"))


def make_unit(name: str, sizes: dict[str, int]) -> Unit:
    return Unit(name, (name,), 0, 1, sizes)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Unit], dict[str, dict[str, float]]]:
    """Up to five units with up to four choices."""
    units, costs = [], {}
    for i in range(draw(st.integers(1, 5))):
        count = draw(st.integers(1, 4))
        sizes = [32 * draw(st.integers(1, 40)) for _ in range(count)]
        values = [draw(st.floats(0, 1e-3, allow_subnormal=False)) for _ in range(count)]
        units.append(make_unit(f"u{i}", {f"c{j}": size for j, size in enumerate(sizes)}))
        costs[f"u{i}"] = {f"c{j}": value for j, value in enumerate(values)}
    return units, costs


def every(units: Sequence[Unit], costs: dict[str, dict[str, float]]) -> list[tuple[int, float]]:
    """Return bytes and cost of every allocation there is."""
    found = []
    for choices in itertools.product(*(unit.sizes for unit in units)):
        pairs = list(zip(units, choices, strict=True))
        size = sum(unit.sizes[choice] for unit, choice in pairs)
        found.append((size, sum(costs[unit.name][choice] for unit, choice in pairs)))
    return found


@settings(max_examples=60)
@given(problem=problems(), share=st.floats(0, 1.1))
def test_nearest_is_optimal(
    problem: tuple[list[Unit], dict[str, dict[str, float]]], share: float
) -> None:
    """No allocation within the budget costs less, by brute force."""
    units, costs = problem
    all_of_them = every(units, costs)
    smallest, largest = min(all_of_them)[0], max(all_of_them)[0]
    budget = int(smallest + share * (largest - smallest))
    found = nearest(units, costs, budget)
    assert found.nbytes <= budget
    best = min(cost for size, cost in all_of_them if size <= budget)
    assert found.cost <= best + 1e-9 * max(
        map(max, (r.values() for r in costs.values())), default=1
    )


@settings(max_examples=40)
@given(problem=problems(), share=st.floats(0, 1))
def test_cheapest_is_optimal(
    problem: tuple[list[Unit], dict[str, dict[str, float]]], share: float
) -> None:
    """No allocation below the limit takes fewer bytes, by brute force."""
    units, costs = problem
    all_of_them = every(units, costs)
    least, most = min(c for _, c in all_of_them), max(c for _, c in all_of_them)
    limit = least + share * (most - least)
    found = cheapest(units, costs, limit)
    slack = 1e-9 * max(most, 1e-30)
    assert found.cost <= limit + slack
    assert found.nbytes <= min(size for size, cost in all_of_them if cost <= limit)


def test_a_search_without_end_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "SECONDS", 0.0)
    generator = np.random.default_rng(0)
    sizes = [
        {f"c{j}": int(s) for j, s in enumerate(row)} for row in generator.integers(1, 999, (80, 9))
    ]
    units = [make_unit(f"u{i}", row) for i, row in enumerate(sizes)]
    costs = {u.name: dict(zip(u.sizes, generator.random(9).tolist(), strict=True)) for u in units}
    with pytest.raises(UsageError, match="no optimum within 0 s"):
        nearest(units, costs, 20_000)


def test_budgets_that_cannot_be_kept() -> None:
    units = [make_unit("a", {"x": 64, "y": 128})]
    costs = {"a": {"x": 0.5, "y": 0.1}}
    with pytest.raises(UsageError, match="4 bytes too small"):
        nearest(units, costs, 60)
    with pytest.raises(UsageError, match="expected at least 0.1"):
        cheapest(units, costs, 0.01)


@given(count=st.integers(1, 40), kinds=st.integers(1, 5), most=st.integers(1, 100))
def test_groups_cover_every_unit_once(count: int, kinds: int, most: int) -> None:
    units = [
        Unit(f"k{kind}@{layer}", (f"k{kind}",), layer, 1, {"x": 1})
        for layer in range(count)
        for kind in range(kinds)
    ]
    groups = group_units(units, most)
    covered = [name for group in groups for name in group.units]
    assert sorted(covered) == sorted(unit.name for unit in units)
    assert len(groups) <= max(most, kinds)
    assert len({group.name for group in groups}) == len(groups)
    for group in groups:
        assert len({name.partition("@")[0] for name in group.units}) == 1


@given(slope=st.floats(1e-3, 10), offset=st.floats(0, 1e-2))
def test_fit_finds_the_line_that_probes_lie_on(slope: float, offset: float) -> None:
    errors = {"a": {"s": 1e-2, "l": 1e-4, "f": 0.0}, "b": {"s": 2e-2, "l": 3e-4, "f": 0.0}}
    groups = [UnitGroup("ab", ("a", "b"))]
    probes = [Probe("ab", "s", slope * 3e-2 + offset), Probe("ab", "l", slope * 4e-4 + offset)]
    found = fit(groups, probes, errors, {"f": 0.0})
    assert found.slopes["ab"] == pytest.approx(slope, rel=1e-6)
    assert found.offsets["ab"] == pytest.approx(offset, abs=1e-6 * slope + 1e-9)
    total = found.costs["a"]["s"] + found.costs["b"]["s"]
    assert total == pytest.approx(slope * 3e-2 + offset, rel=1e-6)
    assert found.costs["a"]["f"] == 0.0


def test_fit_stays_above_zero_and_knows_unprobed_groups() -> None:
    errors = {"a": {"s": 1e-2, "l": 1e-4}, "b": {"s": 1.0, "l": 0.1}}
    groups = [UnitGroup("a", ("a",)), UnitGroup("b", ("b",))]
    steep = fit(groups, [Probe("a", "s", 1e-2), Probe("a", "l", 1e-9)], errors, {})
    assert steep.offsets["a"] == 0.0
    assert steep.slopes["b"] == steep.slopes["a"] > 0
    falling = fit(groups, [Probe("a", "s", 1e-6), Probe("a", "l", 1e-4)], errors, {})
    assert falling.slopes["a"] == 0.0
    assert falling.offsets["a"] > 0


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 4], [8, 6, 4, 2]) == -1
    assert rank_correlation([1, 1, 2], [3, 3, 9]) == pytest.approx(1)
    assert rank_correlation([1], [1]) == 0


@settings(max_examples=8)
@given(seed=st.randoms(use_true_random=False), explicit=st.booleans())
def test_a_recipe_says_what_was_chosen(
    gguf_space: ChoiceSpace, tmp_path_factory: pytest.TempPathFactory, seed: object, explicit: bool
) -> None:
    """Through TOML and the ordinary plan every tensor gets its type, and the size is exact."""
    import random

    assert isinstance(seed, random.Random)
    chosen = {unit.name: seed.choice(list(unit.sizes)) for unit in gguf_space.units}
    path = tmp_path_factory.mktemp("recipe") / "tuned.toml"
    path.write_text(gguf_space.recipe(chosen, "chosen at random", explicit=explicit))
    recipe = load_recipe(str(path), "gguf")
    plan = make_plan(gguf_space.checkpoint, recipe, types=("Q4_K_M",))
    [file] = files_of(plan)
    for name, steps in gguf_space.members.items():
        assert {file.kinds[step.outputs[0].name] for step in steps} == {chosen[name]}
    assert file.nbytes == gguf_space.size(chosen)
    manifest = json.loads(json.dumps(plan.container.request_json(plan)))
    assert plan_again(plan.checkpoint, manifest, ContainerInputs()).digest == plan.digest


def test_a_recipe_is_short(gguf_space: ChoiceSpace) -> None:
    chosen = {unit.name: "q4_K" for unit in gguf_space.units}
    roles = len({role for unit in gguf_space.units for role in unit.roles})
    text = gguf_space.recipe(chosen, "all alike")
    assert text.count("[[rules]]") == roles
    assert "layers" not in text
    chosen["mlp.down_proj@2"] = chosen["mlp.down_proj@3"] = "q8_0"
    text = gguf_space.recipe(chosen, "two differ")
    assert text.count("[[rules]]") == roles + 1
    assert 'match = "mlp.down_proj"\nlayers = "2-3"\naction = "q8_0"' in text
    explicit = gguf_space.recipe(chosen, "each", explicit=True)
    assert explicit.count("[[rules]]") == len(gguf_space.units)


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_packed_recipes_say_what_was_chosen(kind: str, tmp_path: Path) -> None:
    """What stays as it is, is named by layers; matrices that engines join stay together."""
    space = packed_space(kind)
    for keep in (lambda i: False, lambda i: i % 3 == 0, lambda i: i > 0):
        chosen = {unit.name: "plain" if keep(i) else kind for i, unit in enumerate(space.units)}
        path = tmp_path / "tuned.toml"
        path.write_text(space.recipe(chosen, "some stay"))
        plan = make_plan(space.checkpoint, load_recipe(str(path)))
        packed = {
            step.weight.name for step in plan.steps if step.op == kind and step.role.scope == "text"
        }
        wanted = {
            step.weight.name
            for name, steps in space.members.items()
            for step in steps
            if chosen[name] == kind
        }
        assert packed == wanted
        assert space.size(chosen) == sum(file.nbytes for file in plan.files)


def test_joined_matrices_are_one_unit() -> None:
    units = {unit.kind: unit for unit in packed_space("fp8").units}
    assert units["self_attn.qkv_proj"].roles == (
        "self_attn.k_proj",
        "self_attn.q_proj",
        "self_attn.v_proj",
    )
    assert {"mlp.gate_up_proj", "linear_attn.in_proj_qkvz"} <= units.keys()


def test_errors_fall_with_size(gguf_space: ChoiceSpace) -> None:
    errors = gguf_space.errors(1, Silent())
    assert errors.keys() == {unit.name for unit in gguf_space.units}
    for row in errors.values():
        assert list(row) == list(TYPES)
        values = list(row.values())
        assert values == sorted(values, reverse=True)
        assert 0 <= values[-1] < 1e-6 < values[0] < 0.1


@pytest.mark.parametrize(("kind", "least", "most"), [("nf4", 5e-3, 2e-2), ("fp8", 3e-4, 2e-3)])
def test_errors_of_packing(kind: str, least: float, most: float) -> None:
    """Near what the formats give normal weights: 0.09 for NF4 and 0.026 for FP8, squared."""
    for row in packed_space(kind).errors(1, Silent()).values():
        assert row["plain"] == 0
        assert least < row[kind] < most


def test_mixture_of_experts(tmp_path: Path) -> None:
    """Fused stacks are two tensors of one role, which get one type; all experts are one unit."""
    space = ChoiceSpace(fetch(str(make_variant(tmp_path, "moe"))), "gguf", ("q8_0", "f16"))
    fused = [unit for unit in space.units if unit.kind == "mlp.experts.gate_up_proj"]
    assert fused
    assert {len(space.members[unit.name]) for unit in fused} == {2}
    chosen = {unit.name: "q8_0" for unit in space.units}
    assert space.size(chosen) < space.size(dict.fromkeys(chosen, "f16"))


KEY = MeasurementKey("gguf", "m", "t", 512, 2, "", "0")


def test_measurements_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    found = Measurements(KEY, "tiny", {"a": {"q": 0.5}}, {"a": ["a"]}, [Probe("a", "q", 1e-3)])
    found.trials.append(MeasuredTrial("d", 10, 1e-3, 2e-3))
    found.save(path)
    assert load_measurements(path) == found
    assert [p.name for p in tmp_path.iterdir()] == ["m.json"]


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b'{"version": 1}', b'{"version": 1, "key": {"x": 1}}', b"\xff"]
)
def test_other_files_are_no_measurements(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(content)
    with pytest.raises(InputError):
        load_measurements(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "tune.txt"
    path.write_text((ASSET / "eval.txt").read_text()[:30_000])
    return path


def tune(*arguments: str) -> int:
    return main(["tune", str(ASSET), "--quiet", "--json", *arguments])


def test_a_probe_of_no_group_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    Measurements(KEY, "tiny", {}, {"a": ["u"]}, [Probe("b", "q4_K", 0.1)]).save(path)
    with pytest.raises(InputError, match="a probe of the group 'b', which is not listed"):
        load_measurements(path)


def test_tuning_gguf(text: Path, tmp_path: Path, capsys: Capture) -> None:
    """Kept to the size, better than errors alone, another budget without another probe."""
    recipe = tmp_path / "r.toml"
    common = ("--format", "gguf", "--text", str(text), "--output", str(recipe), "--overwrite")
    few = ("--chunks", "2", "--probes", "13", "--types", "q4_K,q8_0")
    report = ("--report", str(tmp_path / "page"))
    assert tune(*common, *few, *report, "--size", "5.3MB") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] <= 5_300_000
    assert told["probes"] == 26
    assert 0 < told["measured_kld"] < 0.1
    page = (tmp_path / "page" / "tune.html").read_text()
    assert page.count("<svg") == 2
    assert "://" not in page.replace("http://www.w3.org", "")
    measured = load_measurements(tmp_path / "r.json")
    probes = measured.probes

    assert tune(*common, *few, "--size", "6MB") == 0
    larger = json.loads(capsys.readouterr().out)
    assert larger["measured_kld"] < told["measured_kld"]
    assert load_measurements(tmp_path / "r.json").probes == probes

    limit = (told["measured_kld"] + larger["measured_kld"]) / 2
    assert tune(*common, *few, "--max-kld", str(limit)) == 0
    between = json.loads(capsys.readouterr().out)
    assert between["measured_kld"] <= limit
    assert between["bytes"] <= larger["bytes"]

    out = tmp_path / "out"
    asked = ["gguf", str(ASSET), str(out), "--types", "Q4_K_M", "--recipe", str(recipe), "--quiet"]
    assert main(asked) == 0
    [made] = out.glob("*.gguf")
    assert made.stat().st_size == between["bytes"]
    lines = tmp_path / "types.txt"
    assert main([*asked[:2], str(tmp_path / "none"), *asked[3:], "--export", str(lines)]) == 0
    assert lines.read_text().count("=") >= 63

    other = (
        "--measurements",
        str(tmp_path / "other.json"),
        "--start-from",
        str(tmp_path / "r.json"),
    )
    assert tune(*common, "--chunks", "1", *few[2:], *other, "--size", "6MB") == 0
    started = load_measurements(tmp_path / "other.json")
    assert (started.probes, started.key.chunks) == (probes, 1)
    capsys.readouterr()
    assert tune(*common, "--chunks", "1", *few[2:], "--size", "6MB") == 2
    assert "measured with another chunks" in capsys.readouterr().err


class Stopping(Silent):
    """Progress that stops after the first probes, as Ctrl-C does."""

    def advance(self, nbytes: int, item: str) -> None:
        if "@" in item or item == "embed_tokens":
            raise KeyboardInterrupt


def test_an_interrupted_tuning_goes_on(text: Path, tmp_path: Path, gguf_space: ChoiceSpace) -> None:
    """What was probed before is not probed again, and the result is the same."""
    space = replace(gguf_space, choices=("q8_0", "f16"))
    setting = ProbeSetting(text, 512, 1, 1, "cpu")
    budget = TuningBudget(nbytes=9_000_000)
    path = tmp_path / "m.json"
    measured = Measurements(KEY, "tiny")
    options: dict[str, Any] = {
        "probes": 13,
        "save": lambda found: found.save(path),
        "work": tmp_path,
    }
    with pytest.raises(KeyboardInterrupt):
        tune_space(space, budget, setting, measured, progress=lambda _: Stopping(), **options)
    kept = load_measurements(path)
    assert 0 < len(kept.probes) < 13
    assert [p.name for p in tmp_path.iterdir()] == ["m.json"]
    found = tune_space(space, budget, setting, kept, **options)
    assert load_measurements(path).probes[: len(measured.probes)] == measured.probes
    assert found.probes == 13
    assert found.nbytes <= 9_000_000


def test_only_types_that_rows_fit(tmp_path: Path) -> None:
    """Rows that are no multiple of 256 have no k-quants to choose from; no fallback is needed."""
    space = ChoiceSpace(fetch(str(make_variant(tmp_path, "odd-rows"))), "gguf", TYPES)
    for unit in space.units:
        rows = {step.rows.row for step in space.members[unit.name]}
        fits = all(row % 256 == 0 for row in rows)
        assert ("q4_K" in unit.sizes) == fits
        assert "f16" in unit.sizes
    assert any("q4_K" not in unit.sizes for unit in space.units)
    with pytest.raises(UsageError, match="add q8_0 or f16"):
        assert ChoiceSpace(space.checkpoint, "gguf", ("q4_K",)).units


def test_errors_count_by_the_importance_matrix(gguf_space: ChoiceSpace, tmp_path: Path) -> None:
    """Columns that no input reaches may be as wrong as they like."""
    [step] = gguf_space.members["mlp.down_proj@0"]
    name, width = step.outputs[0].name, step.rows.row
    values = np.zeros((1, width), np.float32)
    values[0, :256] = 1.0
    path = gguf_file(tmp_path / "imatrix.gguf_file", {name: (values, np.ones(1, np.float32))})
    space = replace(gguf_space, choices=("q4_K", "f16"), imatrix=read_imatrix(path))
    weighted = space.errors(1, Silent())["mlp.down_proj@0"]["q4_K"]
    with Reader(space.checkpoint) as reader:
        pieces = step.rows.open(reader).pieces(step.rows.chunks())
        rows = np.concatenate([f32_from(piece.values, piece.dtype) for piece in pieces])
    data = np.frombuffer(encode(name, rows, "q4_K", values[0]), np.uint8)
    decoded = dequantize(data.reshape(len(rows), -1), GGMLQuantizationType.Q4_K)
    seen, exact = decoded[:, :256].astype(np.float64), rows[:, :256].astype(np.float64)
    expected = ((seen - exact) ** 2).sum() / (exact**2).sum()
    assert weighted == pytest.approx(expected, rel=1e-5)


def test_errors_alone(text: Path, tmp_path: Path, capsys: Capture) -> None:
    recipe = tmp_path / "r.toml"
    arguments = ("--text", str(text), "--output", str(recipe), "--probes", "0")
    assert tune(*arguments, "--format", "gguf", "--size", "5.0bpw") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["measured_kld"] is None
    assert told["bits_per_weight"] <= 5.0
    assert recipe.exists()


@pytest.mark.parametrize("kind", ["nvfp4", "int4", "int4-gptq", "fp8-channel"])
def test_errors_of_formats_for_servers(
    kind: str, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    recipe = tmp_path / "r.toml"
    asked = ["--text", str(text), "--output", str(recipe), "--probes", "0", "--format", kind]
    assert tune(*asked, "--size", "13MB") == 0
    chosen = json.loads(capsys.readouterr().out)["chosen"]
    assert set(chosen.values()) == {kind, "plain"}
    assert main(["tune", str(ASSET), *asked, "--size", "1MB", "--overwrite", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert f"the smallest that {kind} can be" in said
    assert "--types" not in said


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_tuning_packed(kind: str, text: Path, tmp_path: Path, capsys: Capture) -> None:
    """What stays unpacked buys divergence; the recipe is one of `qwen35 convert`."""
    recipe = tmp_path / "r.toml"
    space = packed_space(kind)
    small = space.size({unit.name: kind for unit in space.units})
    budget = small + 600_000
    arguments = ("--format", kind, "--text", str(text), "--output", str(recipe), "--chunks", "1")
    assert tune(*arguments, "--probes", "1", "--size", str(budget)) == 0
    told = json.loads(capsys.readouterr().out)
    assert small < told["bytes"] <= budget
    assert "plain" in told["chosen"].values()
    out = tmp_path / "out"
    assert main(["convert", str(ASSET), str(out), "--recipe", str(recipe), "--quiet"]) == 0
    assert sum(path.stat().st_size for path in out.glob("*.safetensors")) == told["bytes"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--format", "gguf"), "none or both"),
        (("--format", "gguf", "--size", "1MB", "--max-kld", "1"), "none or both"),
        (("--format", "gguf", "--size", "much"), "expected bits per weight or bytes"),
        (("--format", "gguf", "--size", "1MB", "--types", "q9"), "type 'q9' is unknown"),
        (("--format", "gguf", "--size", "1MB", "--probes", "0"), "too small"),
        (("--format", "gguf", "--size", "1GB", "--probes", "0"), "hold the whole model"),
        (("--format", "fp8", "--size", "1GB", "--probes", "0"), "hold the whole model"),
        (("--format", "gguf", "--size", "1MB", "--probes", "-1"), "a number of groups"),
        (("--format", "gguf", "--max-kld", "0"), "expected nats"),
        (("--format", "gguf", "--max-kld", "1", "--probes", "0"), "nothing would measure"),
        (("--format", "nf4", "--size", "1MB", "--types", "q4_K"), "expected --format gguf"),
        (("--format", "nf4", "--size", "1MB", "--output", "x.json"), "ending with .toml"),
        (("--format", "nf4", "--size", "1MB", "--output", "no/x.toml"), "is not a folder"),
    ],
)
def test_refusals(
    arguments: tuple[str, ...],
    sentence: str,
    text: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["tune", str(ASSET), "--text", str(text), "--output", "r.toml", *arguments]
    assert main(asked) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("*.toml"))


def test_an_existing_recipe_is_kept(text: Path, tmp_path: Path, capsys: Capture) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("mine")
    arguments = ("--format", "gguf", "--size", "5MB", "--text", str(text), "--output", str(recipe))
    assert tune(*arguments) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert recipe.read_text() == "mine"


def test_dry_run(text: Path, capsys: Capture) -> None:
    assert tune("--format", "gguf", "--size", "5MB", "--text", str(text), "--dry-run") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["units"] == told["groups"] == 63
    assert told["smallest"] < 5_000_000 < told["exact"]


@pytest.mark.parametrize("kind", ["gguf", "nf4", "fp8"])
def test_dry_run_needs_no_weights(kind: str, text: Path, capsys: Capture) -> None:
    """A published size by name will do: nothing is downloaded to say what would be measured."""
    asked = ["tune", "Qwen3.5-0.8B", "--format", kind, "--size", "14bpw", "--text", str(text)]
    assert main([*asked, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["smallest"] < told["exact"]
    assert told["probes"] > 0


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_packed_weights_leave_nothing_to_choose(
    kind: str, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    packed = convert(ASSET, tmp_path / "packed", recipe=kind).out
    options = ("--format", kind, "--size", "6bpw", "--text", str(text), "--dry-run")
    assert main(["tune", str(packed), *options]) == 2
    assert "all weights that it packs are packed already" in capsys.readouterr().err


def test_every_format_offered_is_known_to_a_container() -> None:
    from qwen35.tuning.formats import FORMATS
    from qwen35.tuning.tunable import tunable_of

    assert set(FORMATS) == {"gguf", "nf4", "fp8", "fp8-channel", "nvfp4", "int4", "int4-gptq"}
    assert all(tunable_of(kind).base(kind) for kind in FORMATS)
