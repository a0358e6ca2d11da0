"""Tuning: the solver is optimal, recipes say what was chosen, measurements are used again."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen35
from calibrating import source
from checkpoints import ASSET, random_tensors, tiny_config, write_checkpoint
from gguf_models import make_variant, sidecars
from qwen35.api.convert_api import convert
from qwen35.checkpoint.open import fetch
from qwen35.cli.main import main
from qwen35.errors import InputError, UsageError
from qwen35.planning.container import ContainerInputs
from qwen35.planning.gguf_files.gguf_plan import files_of
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.work_order import plan_again
from qwen35.tuning import solve
from qwen35.tuning.measurements import MeasurementKey, Measurements, Probe, load_measurements
from qwen35.tuning.prices import ExpertPrices, Prices
from qwen35.tuning.probing import ProbeSetting
from qwen35.tuning.recipe_search import TuningBudget
from qwen35.tuning.recipe_search import tune as tune_space
from qwen35.tuning.solve import cheapest, nearest
from qwen35.tuning.space import ChoiceSpace
from qwen35.tuning.tunable import tunable_of
from qwen35.tuning.tuning_display import price_notes
from qwen35.tuning.tuning_job import prepare, run
from qwen35.tuning.tuning_request import TuningRequest
from qwen35.tuning.unit_groups import group_units, rank_correlation
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


def test_types_of_one_size_have_an_order() -> None:
    """Sets of names have another order in each process, and an interrupted run must know itself."""
    names = ("q5_K", "q8_0", "q4_K", "iq4_nl", "q5_0", "q4_0")
    expected = ("iq4_nl", "q4_0", "q4_K", "q5_0", "q5_K", "q8_0", "f16")
    for order in itertools.permutations(names):
        assert tunable_of("gguf").choices("gguf", order) == expected


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


@pytest.mark.parametrize("kind", ["fp8", "fp8-channel", "nvfp4", "int4"])
@pytest.mark.parametrize("per_expert", [False, True])
def test_experts_that_stay_unpacked(kind: str, *, per_expert: bool, tmp_path: Path) -> None:
    """Published checkpoints store them in stacks: rules name these, not what is written."""
    folder = source(tmp_path, moe=True, tied=False, per_expert=per_expert)
    space = ChoiceSpace(fetch(str(folder)), kind, (kind, "plain"))
    chosen = {unit.name: "plain" if unit.layer == 1 else kind for unit in space.units}
    path = tmp_path / "tuned.toml"
    path.write_text(space.recipe(chosen, "one layer stays"))
    plan = make_plan(space.checkpoint, load_recipe(str(path)))
    experts = [s for s in plan.steps if s.role.scope == "text" and "mlp.experts." in s.role.name]
    packed = {step.role.layer for step in experts if step.packing}
    assert packed == {0, 2, 3}
    assert {step.role.layer for step in experts if not step.packing} == {1}
    assert space.size(chosen) == sum(file.nbytes for file in plan.files)


def test_mixture_of_experts(tmp_path: Path) -> None:
    """Fused stacks are two tensors of one role, which get one type; all experts are one unit."""
    space = ChoiceSpace(fetch(str(make_variant(tmp_path, "moe"))), "gguf", ("q8_0", "f16"))
    fused = [unit for unit in space.units if unit.kind == "mlp.experts.gate_up_proj"]
    assert fused
    assert {len(space.members[unit.name]) for unit in fused} == {2}
    chosen = {unit.name: "q8_0" for unit in space.units}
    assert space.size(chosen) < space.size(dict.fromkeys(chosen, "f16"))


KEY = MeasurementKey("gguf", "m", "t", 512, 2, "", 1, "0")


def found_before() -> Measurements:
    experts = {"a": ExpertPrices([3, 4], {"q": [1e-3, 2e-3]})}
    prices = Prices({"a": {"q": 3e-3}}, {"a": {"q": 1e-4}}, experts)
    return Measurements(KEY, "tiny", prices, "base", [Probe("", "d", 2e-3)])


def test_measurements_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    found_before().save(path)
    assert load_measurements(path) == found_before()
    assert [p.name for p in tmp_path.iterdir()] == ["m.json"]


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b'{"version": 1}', b'{"version": 3, "key": {"x": 1}}', b"\xff"]
)
def test_other_files_are_no_measurements(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(content)
    with pytest.raises(InputError):
        load_measurements(path)


def test_measurements_by_probes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text('{"version": 2, "key": {}, "probes": []}')
    with pytest.raises(InputError, match="measured by probes, with an earlier qwen35"):
        load_measurements(path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("prices",), []),
        (("prices", "weights"), {"a": {"q": -1}}),
        (("prices", "weights"), {"a": {"q": True}}),
        (("prices", "weights"), {"a": {"q": 10**200}}),
        (("prices", "weights"), {"b": {"q": 1}}),
        (("prices", "inputs"), {"a": "q"}),
        (("prices", "experts"), {"a": {"tokens": [1], "prices": {"q": [1, 2]}}}),
        (("prices", "experts"), {"a": {"tokens": None, "prices": {}}}),
        (("prices", "experts"), {"z": {"tokens": [], "prices": {"q": []}}}),
        (("key", "chunks"), [2]),
        (("key", "other"), 1),
        (("probes",), [{"name": "", "digest": "d", "kld": "1"}]),
        (("origin",), None),
        (("origin",), "\ud800"),
        (("name",), "\udfff"),
        (("name",), 1),
        (("prices", "weights"), {"\ud800": {"q": 1}}),
    ],
)
def test_damaged_measurements_are_a_sentence(
    place: tuple[str, ...], value: object, tmp_path: Path
) -> None:
    path = tmp_path / "m.json"
    found_before().save(path)
    content = json.loads(path.read_text())
    inner = content
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="malformed measurements"):
        load_measurements(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "tune.txt"
    path.write_text((ASSET / "eval.txt").read_text()[:30_000])
    return path


def tune(*arguments: str) -> int:
    return main(["tune", str(ASSET), "--quiet", "--json", *arguments])


def test_tuning_gguf(text: Path, tmp_path: Path, capsys: Capture) -> None:
    """Kept to the size; another budget, engine or check takes no other pass."""
    recipe = tmp_path / "r.toml"
    common = ("--format", "gguf", "--text", str(text), "--output", str(recipe), "--overwrite")
    few = ("--chunks", "2", "--context", "256", "--types", "q4_K,q8_0")
    report = ("--report", str(tmp_path / "page"))
    probes = ("--probes", "3")
    assert tune(*common, *few, *report, *probes, "--size", "5.3MB") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] <= 5_300_000
    assert (told["engine"], told["active"]) == ("llama.cpp", False)
    assert [probe["group"] is None for probe in told["probes"]] == [True, False, False]
    for probe in told["probes"]:
        assert 0.4 < probe["predicted_kld"] / probe["measured_kld"] < 2.5
    assert told["probes"][0]["measured_kld"] == told["measured_kld"]
    page = (tmp_path / "page" / "tune.html").read_text()
    assert page.count("<svg") == 2
    assert "Prices checked" in page
    assert "://" not in page.replace("http://www.w3.org", "")
    measured = load_measurements(tmp_path / "r.json")
    assert {p.name for p in tmp_path.iterdir()} == {"r.json", "r.toml", "page"}

    assert tune(*common, *few, "--size", "6MB", "--for", "weights") == 0
    larger = json.loads(capsys.readouterr().out)
    assert larger["predicted_kld"] < told["predicted_kld"]
    assert larger["measured_kld"] is None
    assert load_measurements(tmp_path / "r.json") == measured

    limit = (told["predicted_kld"] + larger["predicted_kld"]) / 2
    assert tune(*common, *few, "--max-kld", str(limit)) == 0
    between = json.loads(capsys.readouterr().out)
    assert between["predicted_kld"] <= limit

    out = tmp_path / "out"
    asked = ["gguf", str(ASSET), str(out), "--types", "Q4_K_M", "--recipe", str(recipe), "--quiet"]
    assert main(asked) == 0
    [made] = out.glob("*.gguf")
    assert made.stat().st_size == between["bytes"]
    lines = tmp_path / "types.txt"
    assert main([*asked[:2], str(tmp_path / "none"), *asked[3:], "--export", str(lines)]) == 0
    assert lines.read_text().count("=") >= 63

    capsys.readouterr()
    assert tune(*common, *few[2:], "--chunks", "1", "--size", "6MB") == 2
    assert "measured with another chunks" in capsys.readouterr().err
    base = ("--start-from", str(tmp_path / "r.json"), "--measurements", str(tmp_path / "o.json"))
    assert tune(*common, *few[2:], "--chunks", "1", *base, "--size", "6MB") == 0
    assert json.loads(capsys.readouterr().out)["priced_as"] == ASSET.name
    assert load_measurements(tmp_path / "o.json").prices == measured.prices
    more = ("--types", "q3_K,q4_K", "--measurements", str(tmp_path / "p.json"), *base[:2])
    assert tune(*common, *few[2:4], *more, "--size", "6MB") == 2
    assert "no price of q3_K of" in capsys.readouterr().err


def test_prices_of_a_model_of_other_sizes_are_refused(text: Path, tmp_path: Path) -> None:
    """Models of other widths have units of the same names."""
    space = ChoiceSpace(fetch(str(ASSET)), "gguf", ("q8_0", "f16"))
    row = {unit.name: {"q8_0": 1e-3, "f16": 0.0} for unit in space.units}
    base = Measurements(replace(KEY, weights=7), "other", Prices(row, row))
    base.save(tmp_path / "base.json")
    request = TuningRequest(
        str(ASSET),
        "gguf",
        text,
        size="9bpw",
        output=tmp_path / "r.toml",
        types=("q8_0",),
        start_from=tmp_path / "base.json",
    )
    with pytest.raises(UsageError, match="prices of 7 weights, expected of 6,"):
        run(prepare(request))
    assert [p.name for p in tmp_path.iterdir()] == ["base.json"]
    base.key = replace(KEY, weights=sum(unit.numel for unit in space.units))
    base.save(tmp_path / "base.json")
    assert run(prepare(request)).measured.origin == "other"


def test_a_name_in_measurements_cannot_end_its_line() -> None:
    """The file may be another's, and its notes go to a terminal and into a report."""
    (note,) = price_notes(Measurements(KEY, "own", origin="base\n9.99 GB\x1b[2J"))
    assert note == r"the prices are those of base\n9.99 GB\x1b[2J"


def test_prices_of_a_base_are_not_taken_where_there_are_others(
    text: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The same command again goes on with them; other prices are neither used nor replaced."""
    space = packed_space("nf4")

    def measured(name: str, sample: int = 1) -> str:
        row = {unit.name: {"nf4": 1e-3 * len(name), "plain": 0.0} for unit in space.units}
        weights = sum(unit.numel for unit in space.units)
        key = replace(KEY, format="nf4", weights=weights, sample=sample)
        Measurements(key, name, Prices(row, row)).save(tmp_path / f"{name}.json")
        return str(tmp_path / f"{name}.json")

    kept = tmp_path / "r.json"
    smallest = space.size(space.smallest)
    asked = [
        *("--format", "nf4", "--text", str(text), "--output", str(tmp_path / "r.toml")),
        *("--overwrite", "--size"),
    ]
    assert tune(*asked, str(smallest), "--start-from", measured("base")) == 0
    content = kept.read_bytes()
    capsys.readouterr()
    assert tune(*asked, str(smallest + 600_000), "--start-from", measured("base")) == 0
    assert json.loads(capsys.readouterr().out)["priced_as"] == "base"
    assert tune(*asked, str(smallest), "--start-from", measured("another")) == 2
    said = "--start-from: {} has prices already, those of base; leave --start-from out to use"
    assert said.format(kept) in capsys.readouterr().err
    own = load_measurements(kept)
    own.origin = ""
    own.save(kept)
    assert tune(*asked, str(smallest), "--start-from", measured("base")) == 2
    assert "has prices already, this model's own; leave" in capsys.readouterr().err
    kept.write_bytes(content)
    assert tune(*asked, str(smallest), "--start-from", measured("few", sample=8)) == 2
    assert "types compared on one row in 8; give --sample 8, as it has" in capsys.readouterr().err
    assert kept.read_bytes() == content


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"chunks": 0}, "--chunks: 0, expected a positive number"),
        ({"chunks": -3}, "--chunks: -3, expected a positive number"),
        ({"sample": 0}, "--sample: 0, expected a number from 1 to 64"),
        ({"memory": 0}, "--memory: 0"),
        ({"workers": 0}, "--workers: 0"),
        ({"threads": -1}, "--threads: -1"),
    ],
)
def test_numbers_that_the_command_line_refuses_are_refused_in_python(
    given: dict[str, Any], sentence: str, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"^{sentence}"):
        qwen35.tune(
            ASSET, format="gguf", text=text, output=tmp_path / "r.toml", size="5MB", **given
        )
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_packs_nothing_is_not_written(
    text: Path, tmp_path: Path, capsys: Capture
) -> None:
    """`qwen35 convert` would refuse it."""
    space = packed_space("nf4")
    row = {unit.name: {"nf4": 1e-3, "plain": 0.0} for unit in space.units}
    key = replace(KEY, format="nf4", weights=sum(unit.numel for unit in space.units))
    Measurements(key, "base", Prices(row, row)).save(tmp_path / "base.json")
    asked = ("--start-from", str(tmp_path / "base.json"), "--output", str(tmp_path / "r.toml"))
    assert tune("--format", "nf4", "--text", str(text), *asked, "--max-kld", "1e-9") == 2
    assert "only the whole model is that close" in capsys.readouterr().err
    assert not (tmp_path / "r.toml").exists()


def test_a_text_too_short_is_a_sentence(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "t.txt").write_text("Too short.")
    asked = ("--text", str(tmp_path / "t.txt"), "--output", str(tmp_path / "r.toml"))
    assert tune("--format", "gguf", "--size", "6MB", *asked) == 2
    assert "tokens, expected a chunk of 512" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]


def test_bytes_read_per_token(tmp_path: Path) -> None:
    """Of experts, those that a token reaches; of an embedding that is no head, one row."""
    folder = source(tmp_path, moe=True, tied=False, layers=2)
    space = ChoiceSpace(fetch(str(folder)), "gguf", ("q8_0", "f16"))
    units = {unit.name: unit for unit in space.units}
    down, head = units["mlp.experts.down_proj@0"], units["lm_head"]
    assert space.read_share(down) == Fraction(2, 4)
    assert space.read_share(head) == 1
    assert space.read_share(units["embed_tokens"]) == Fraction(
        1, space.checkpoint.config.dims["vocab"]
    )
    small, large = (dict.fromkeys(units, choice) for choice in ("q8_0", "f16"))
    assert space.active(large) > space.active(small)
    mixed = {**small, down.name: "f16"}
    more = space.active(mixed) - space.active(small)
    assert more == (down.sizes["f16"] - down.sizes["q8_0"]) // 2
    costs = {name: dict.fromkeys(unit.sizes, 0.0) for name, unit in units.items()}
    costs[down.name]["q8_0"] = costs[head.name]["q8_0"] = 1.0
    room = more + head.sizes["f16"] - head.sizes["q8_0"]
    found = {}
    for active in (False, True):
        least = space.active(small) if active else space.size(small)
        budget = TuningBudget(nbytes=least + room, active=active)
        measured = Measurements(KEY, "x")
        found[active] = tune_space(
            space, budget, measured, costs, setting=SETTING, save=lambda _: None
        )
    assert found[True].predicted == 0
    assert found[True].active <= space.active(small) + room
    assert found[False].predicted == 1
    assert found[False].nbytes <= space.size(small) + room


def test_experts_are_told(text: Path, tmp_path: Path, capsys: Capture) -> None:
    """Coverage and price of each in the report; few tokens and sampled rows are said."""
    folder = source(tmp_path, moe=True, layers=2)
    asked = ("--text", str(text), "--context", "32", "--chunks", "2", "--sample", "2", "--active")
    outputs = ("--output", str(tmp_path / "r.toml"), "--report", str(tmp_path / "report"))
    budget = ("--format", "gguf", "--size", "12bpw", "--types", "q4_K,q8_0")
    assert main(["tune", str(folder), *budget, *asked, *outputs, "--quiet"]) == 0
    told = capsys.readouterr().out
    assert "8 of 8 experts saw fewer than 128 tokens" in told
    assert "one row in 2" in told
    used = f"{tmp_path / 'r.toml'} --types Q4_K_M"  # what the rest was planned as
    assert told.rstrip().endswith(f": use it as --recipe {used}")
    bits = re.search(r"read per token, (\d+\.\d{3}) bits per weight of these", told)
    report = json.loads((tmp_path / "report" / "tune.json").read_text())
    assert report["active"]
    assert report["active_bytes"] <= report["front"][-1]["bytes"]
    assert bits is not None
    assert float(bits[1]) == pytest.approx(report["active_bits_per_weight"], abs=5e-4)
    assert 8.5 < report["active_bits_per_weight"] <= 12
    for one in report["experts"]:
        assert sum(one["tokens"]) == 2 * 2 * 31  # two windows, two experts per token
        assert len(one["nats"]) == len(one["tokens"]) == 4
    assert '<h2 id="experts">' in (tmp_path / "report" / "tune.html").read_text()


@pytest.mark.parametrize("value", [np.nan, 3e38])
def test_weights_without_prices_are_named(
    value: float, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    """They are refused where they are found, and no measurements are left that cannot be read."""
    config = tiny_config(text_only=True, mtp=0, layers=2)
    tensors = random_tensors(config)
    tensors["model.layers.0.input_layernorm.weight"][:] = value
    folder = write_checkpoint(tmp_path / "in", config, tensors, sidecars=sidecars())
    asked = ("--text", str(text), "--context", "32", "--chunks", "1", "--types", "q4_K,q8_0")
    outputs = ("--output", str(tmp_path / "r.toml"), "--quiet")
    assert main(["tune", str(folder), "--format", "gguf", "--size", "6bpw", *asked, *outputs]) == 2
    assert "in: head: its prices are NaN or infinite" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


SETTING = ProbeSetting(Path("text"), 512, 1, 1, "cpu")


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


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_tuning_packed(kind: str, text: Path, tmp_path: Path, capsys: Capture) -> None:
    """What stays unpacked buys divergence; the recipe is one of `qwen35 convert`."""
    recipe = tmp_path / "r.toml"
    space = packed_space(kind)
    small = space.size({unit.name: kind for unit in space.units})
    budget = small + 600_000
    arguments = ("--format", kind, "--text", str(text), "--output", str(recipe), "--chunks", "1")
    assert tune(*arguments, "--context", "128", "--size", str(budget)) == 0
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
        (("--format", "gguf", "--size", "1MB"), "too small"),
        (("--format", "gguf", "--size", "1GB"), "hold the whole model"),
        (("--format", "fp8", "--size", "1GB"), "hold the whole model"),
        (("--format", "gguf", "--size", "1MB", "--probes", "-1"), "a number of models"),
        (("--format", "gguf", "--max-kld", "0"), "expected nats"),
        (("--format", "gguf", "--size", "5MB", "--context", "2"), "3 tokens at least"),
        (("--format", "gguf", "--size", "5MB", "--sample", "65"), "a number from 1 to 64"),
        (("--format", "gguf", "--size", "5MB", "--types", "f16"), "--types: only f16; name quant"),
        (("--format", "gguf", "--size", "5MB", "--types", "bf16,q8_0"), "--types: bf16; name"),
        (("--format", "nf4", "--size", "9MB", "--for", "llama.cpp"), "other engines run it"),
        (
            ("--format", "gguf", "--size", "5MB", "--for", "weights", "--probes", "2"),
            "--probes: given with --for weights; llama.cpp measures them",
        ),
        (
            ("--format", "gguf", "--size", "5MB", "--probes", "2", "--memory", "9MB"),
            "--probes: a model and its original take at least 16.71 MB",
        ),
        (
            ("--format", "nf4", "--size", "9MB", "--probes", "2", "--memory", "40MB"),
            "--probes: a model and its original take at least 59.38 MB",
        ),
        (
            ("--format", "gguf", "--size", "5MB", "--measurements", "r.toml"),
            "--measurements: r.toml is the file of --output too",
        ),
        (
            ("--format", "gguf", "--size", "5MB", "--measurements", "no/m.json"),
            "--measurements: no is not a folder",
        ),
        (
            ("--format", "gguf", "--size", "5MB", "--start-from", "b.json", "--workers", "2"),
            "--workers: given with --start-from; leave it out",
        ),
        (
            ("--format", "gguf", "--size", "5MB", "--start-from", "b.json", "--dry-run"),
            "--dry-run: given with --start-from; leave it out",
        ),
        (("--format", "gguf", "--size", "1MB", "--active"), "bytes too small"),
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
    assert told["units"] == 63
    assert told["disk"] > 0 < told["memory"]
    assert told["smallest"] < 5_000_000 < told["exact"]


@pytest.mark.parametrize("kind", ["gguf", "nf4", "fp8"])
def test_dry_run_needs_no_weights(kind: str, text: Path, capsys: Capture) -> None:
    """A published size by name will do: nothing is downloaded to say what would be measured."""
    asked = ["tune", "Qwen3.5-0.8B", "--format", kind, "--size", "14bpw", "--text", str(text)]
    assert main([*asked, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["smallest"] < told["exact"]
    assert told["memory"] > 1_000_000_000 < told["disk"]


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

    assert {"gguf", "nf4", "fp8", "fp8-channel", "nvfp4", "int4", "int4-gptq"} <= set(FORMATS)
    assert all(tunable_of(kind).base(kind) for kind in FORMATS)
