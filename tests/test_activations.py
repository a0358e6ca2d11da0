"""Statistics of activations: whose they are, what they weigh, and how a large file is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen35.checkpoint.inventory import inventory
from qwen35.checkpoint.source import open_folder
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.errors import InputError, UsageError
from qwen35.model.roles import role_of
from qwen35.planning import activations
from qwen35.planning.activations import Activations, load_activations, other_geometry
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe

LAYER = "model.language_model.layers"
UP, DOWN = f"{LAYER}.1.mlp.up_proj.weight", f"{LAYER}.1.mlp.down_proj.weight"
MALFORMED = "stats.json: malformed, expected a table of weights"


def table(*names: str, columns: int = 2, **more: Any) -> dict[str, Any]:
    """Return statistics of some weights."""
    return {name: {"input_channel_max": [1.0] * columns, **more} for name in names}


def by_line(made: object, entries: dict[str, Any], end: str = "\n}\n") -> str:
    """Return statistics as `qwen35 calibrate` writes them: a weight a line."""
    rows = {"__metadata__": made, **entries}
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in rows.items()]
    return "{\n" + ",\n".join(lines) + end


def stats(folder: Path, text: str) -> Path:
    """Write a file of statistics."""
    path = folder / "stats.json"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str) -> str:
    """Return the sentence that refuses a file."""
    with pytest.raises(InputError) as caught:
        load_activations(stats(folder, text))
    return str(caught.value)


# --- whose they are


@pytest.mark.parametrize("geometry", [None, "small", [["layers", 4]], {"layers": 4, "hidden": 8}])
def test_geometry_that_is_the_same_or_not_said_is_fine(geometry: object) -> None:
    assert other_geometry({"geometry": geometry}, {"layers": 4, "hidden": 8}) is None
    assert other_geometry({}, {"layers": 4}) is None


def test_another_geometry_is_told_by_what_differs() -> None:
    theirs = {"layers": 4, "hidden": 16, "experts": 8}
    assert other_geometry({"geometry": theirs}, {"layers": 4, "hidden": 8, "heads": 2}) == (
        "of a model with hidden 16, experts 8, heads None",
        "hidden 8, experts None, heads 2",
    )
    many = {f"size{number}": number for number in range(9)}
    assert other_geometry({"geometry": many}, {}) == (
        "of a model with size0 0, size1 1, size2 2",
        "size0 None, size1 None, size2 None",
    )
    found = other_geometry({"geometry": {"x" * 300: 1}}, {})
    assert found is not None
    assert len(found[0]) == 200


def test_statistics_that_name_another_geometry_are_refused(dense: Path, tmp_path: Path) -> None:
    checkpoint = open_folder(dense)
    made = {"geometry": {**checkpoint.config.geometry, "ffn": 99}}
    file = stats(tmp_path, by_line(made, table(DOWN, columns=512)))
    with pytest.raises(InputError) as caught:
        make_plan(checkpoint, load_recipe("fp8"), activations=load_activations(file))
    assert str(caught.value) == (
        "stats.json: of a model with ffn 99, expected ffn 512; these are statistics of another "
        "model: collect them from this one"
    )


@pytest.mark.parametrize(
    ("name", "columns", "sentence"),
    [
        (f"{LAYER}.4.mlp.up_proj.weight", 256, "has 4.mlp.up_proj, which this model lacks"),
        ("mtp.layers.1.mlp.up_proj.weight", 256, "has 1.mtp.layers.mlp.up_proj, which this"),
        (f"{LAYER}.0.mlp.experts.2.up_proj.weight", 256, "has 0.mlp.experts.up_proj, which this"),
        (DOWN, 511, "511 columns for 1.mlp.down_proj, expected 512"),
        (f"{LAYER}.3.self_attn.o_proj.weight", 512, "512 columns for 3.self_attn.o_proj, expected"),
    ],
)
def test_statistics_of_weights_that_are_not_there_are_refused(
    name: str, columns: int, sentence: str, dense: Path, tmp_path: Path
) -> None:
    file = stats(tmp_path, json.dumps(table(name, columns=columns)))
    with pytest.raises(InputError) as caught:
        make_plan(open_folder(dense), load_recipe("fp8"), activations=load_activations(file))
    assert str(caught.value).startswith(f"stats.json: {sentence}")
    assert str(caught.value).endswith(f"; {activations.ANOTHER_MODEL}")


# --- what they weigh


def test_search_weighs_by_mean_squares_where_there_are_any(tmp_path: Path) -> None:
    entries = table(UP) | table(DOWN, input_channel_mean_square=[2.0, 3.0])
    found = load_activations(stats(tmp_path, json.dumps(entries)))
    assert found.path == tmp_path / "stats.json"
    for name, mode, weights in (
        (UP, "search", [1, 1]),
        (DOWN, "search", [2, 3]),
        (DOWN, "mse", [1, 1]),
    ):
        columns = found.weights(role_of(name), mode)
        assert columns is not None
        assert columns.dtype == np.float32
        assert columns.tolist() == weights
    assert found.weights(role_of(f"{LAYER}.2.mlp.up_proj.weight"), "search") is None


@pytest.mark.parametrize(
    ("made", "notes"),
    [
        ({}, ()),
        ({"experts_below_floor": 0, "floor": 9}, ()),
        (
            {"experts_below_floor": 3, "floor": 9},
            (
                "s saw fewer than 9 tokens for 3 experts, which were filled up from the average "
                "of their layer",
            ),
        ),
    ],
)
def test_experts_that_saw_little_are_noted(made: dict[str, int], notes: tuple[str, ...]) -> None:
    assert Activations("s", "0", {}, provenance=made).notes() == notes


def test_weights_without_statistics_are_counted_in_a_note(dense: Path, tmp_path: Path) -> None:
    file = stats(tmp_path, json.dumps(table(DOWN, columns=512)))
    plan = make_plan(open_folder(dense), load_recipe("fp8"), activations=load_activations(file))
    count = sum(step.op == "fp8" for step in plan.steps)
    without = f"{count - 1} of {count} FP8 weights have no statistics: their columns weigh alike"
    assert plan.notes == (without,)
    whole = {s.spec.name: s.spec.shape[1] for s in plan.steps if s.op == "fp8"}
    entries = [table(name, columns=columns) for name, columns in whole.items()]
    every = {name: entry for one in entries for name, entry in one.items()}
    known = load_activations(stats(tmp_path, json.dumps(every)))
    assert make_plan(open_folder(dense), load_recipe("fp8"), activations=known).notes == ()
    ignored = make_plan(
        open_folder(dense), load_recipe("fp8"), activations=known, scale_choice=ScaleChoice("max")
    )
    assert ignored.notes == ("stats.json is ignored: mode max weighs no columns",)
    with pytest.raises(UsageError) as caught:
        make_plan(open_folder(dense), load_recipe("nf4"), activations=known)
    assert str(caught.value) == ("--activation-stats: no scales are chosen here; leave it out")


# --- reading


@pytest.mark.parametrize("name", [UP, DOWN.replace("language_model.", "")])
def test_both_forms_of_a_file_are_read(name: str, tmp_path: Path) -> None:
    entries = table(name) | table(f"{LAYER}.2.mlp.up_proj.weight")
    made = {"tokens": 7}
    ours = load_activations(stats(tmp_path, by_line(made, entries)))
    assert ours.provenance == made
    others = load_activations(stats(tmp_path, json.dumps({**entries, "__metadata__": made})))
    assert others.provenance == made
    assert {k: v.tolist() for k, v in ours.columns.items()} == {
        k: v.tolist() for k, v in others.columns.items()
    }
    assert ours.sha256 != others.sha256


def test_a_file_of_ours_is_read_by_line_whatever_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = by_line({}, table(UP, DOWN))
    longest = max(map(len, text.splitlines()))
    monkeypatch.setattr(activations, "MAX_BYTES", 10)
    monkeypatch.setattr(activations, "MAX_LINE", longest + 1)
    assert len(load_activations(stats(tmp_path, text)).columns) == 2
    monkeypatch.setattr(activations, "MAX_LINE", longest - 1)
    with pytest.raises(InputError):
        load_activations(stats(tmp_path, text))


def test_a_file_of_others_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps(table(UP))
    monkeypatch.setattr(activations, "MAX_BYTES", len(text))
    assert load_activations(stats(tmp_path, text)).columns
    path = tmp_path / "stats.json"
    assert refusal(tmp_path, f"{text} ") == (
        f"{path}: too large for a statistics file, expected at most 1 GiB"
    )


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        by_line({}, {}),
        by_line([], table(UP)),
        by_line({}, table(UP), end=",\n}\n"),
        by_line({}, table(UP), end="\n}\n}"),
        by_line({}, table(UP)).replace(",\n", "\n"),
        by_line({}, table(UP)).replace(",\n", ",\n\n"),
        by_line({}, table(UP)).replace(",\n", ', "x": 1,\n'),
    ],
)
def test_what_is_not_a_table_of_weights_is_malformed(text: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, text) == MALFORMED


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        by_line({}, table(UP), end=""),
        by_line({}, {})[:-3],
        by_line({}, table(UP, DOWN)).replace("[1.0", "[1.0.0"),
    ],
)
def test_what_is_not_json_is_refused(text: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, text).startswith("stats.json: ")


NUMBER = "a number per column"
OVERFLOWED = "a forward pass that overflowed made it: collect the statistics in bf16 or f32"


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ([], f"{UP} is malformed, expected input_channel_max: {NUMBER}"),
        ({"input_channel_max": []}, f"{UP} is malformed, expected input_channel_max: {NUMBER}"),
        ({"input_channel_max": [True]}, f"{UP} holds a value that is not a number"),
        ({"input_channel_max": [1, "1"]}, f"{UP} holds a value that is not a number"),
        (
            {"input_channel_max": [1, -1]},
            f"{UP} holds a negative or infinite number, or NaN; {OVERFLOWED}",
        ),
        (
            {"input_channel_max": [10**300]},
            f"{UP} holds a negative or infinite number, or NaN; {OVERFLOWED}",
        ),
        (
            {"input_channel_max": [1, 2], "input_channel_mean_square": 3},
            f"{UP} is malformed, expected input_channel_mean_square: {NUMBER}",
        ),
        (
            {"input_channel_max": [1, 2], "input_channel_mean_square": [3]},
            f"1 mean squares for {UP}, expected 2",
        ),
    ],
)
def test_malformed_entries_are_named(entry: object, sentence: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, json.dumps({UP: entry})) == f"stats.json: {sentence}"
    assert refusal(tmp_path, by_line({}, {UP: entry})) == f"stats.json: {sentence}"


def test_names_that_are_no_weights_or_twice_the_same_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, json.dumps(table("lm_head.bias"))) == (
        "stats.json: names 'lm_head.bias', expected weights of Qwen3.5"
    )
    twice = UP.replace("language_model.", "")
    assert refusal(tmp_path, json.dumps(table(UP, twice))) == (
        f"stats.json: names {twice} twice; under two prefixes"
    )


def test_a_folder_or_nothing_is_refused(tmp_path: Path) -> None:
    for path, sentence in (
        (tmp_path, "not a file"),
        (tmp_path / "none.json", "cannot be read (No such file or directory)"),
    ):
        with pytest.raises(InputError) as caught:
            load_activations(path)
        assert str(caught.value) == f"{path}: {sentence}"


def test_numbers_beyond_float64_are_rounded_once(tmp_path: Path) -> None:
    """Through float64, as any reader of JSON does: 2**24 + 1 lies between two float32."""
    entry = {UP: {"input_channel_max": [2**24 + 1, 2**53 + 1, 0, 1e-46, 3.4e38]}}
    (columns,) = load_activations(stats(tmp_path, json.dumps(entry))).columns.values()
    assert columns.tolist() == [2**24, 2**53, 0.0, 0.0, float(np.float32(3.4e38))]
    whole = {UP: {"input_channel_max": [2**54 + 2**30 + 1]}}  # float64 cannot tell it from a tie
    (columns,) = load_activations(stats(tmp_path, json.dumps(whole))).columns.values()
    assert columns.tolist() == [2**54]


def test_columns_of_fused_experts_are_those_of_one(moe: Path, tmp_path: Path) -> None:
    """[experts, hidden, intermediate]: the last is what an input has."""
    for columns, fits in ((128, True), (256, False)):
        table_of_all = table(f"{LAYER}.0.mlp.experts.down_proj", columns=columns)
        file = load_activations(stats(tmp_path, json.dumps(table_of_all)))
        checkpoint = open_folder(moe)
        if fits:
            file.check(inventory(checkpoint), checkpoint.config.geometry)
            continue
        with pytest.raises(InputError, match=r"256 columns for 0\.mlp\..*, expected 128"):
            file.check(inventory(checkpoint), checkpoint.config.geometry)
