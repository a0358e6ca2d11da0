"""The work order: plain JSON from which a worker elsewhere makes the same plan, or refuses."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen35.checkpoint.source import open_folder
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.errors import InputError
from qwen35.planning.activations import Activations, Key, load_activations
from qwen35.planning.key_differences import key_differences
from qwen35.planning.manifest import recipe_json
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.safetensors_files.safetensors_options import (
    MAX_SHARD_BYTES,
    SafetensorsOptions,
)
from qwen35.planning.work_order import order_of, plan_from
from running import plan_of

DOWN = "model.language_model.layers.1.mlp.down_proj.weight"


def copied(source: Path, folder: Path) -> Path:
    """Return a checkpoint of its own, to be changed."""
    return Path(shutil.copytree(source, folder))


def asked(plan: Plan) -> SafetensorsOptions:
    """Return what a plan was asked for beside its recipe."""
    assert isinstance(plan.options, SafetensorsOptions)
    return plan.options


def chooses_scales(source: Path, folder: Path) -> Plan:
    """Plan FP8 with everything that can be asked for."""
    file = folder / "stats.json"
    file.write_text(json.dumps({DOWN: {"input_channel_max": [1.0] * 512}}))
    return make_plan(
        open_folder(source),
        load_recipe("text-fp8"),
        keep_prefix=True,
        scale_choice=ScaleChoice("mse", grid_size=7),
        activations=load_activations(file),
        shard_bytes=1_000_000,
    )


def test_an_order_says_all_that_decides(dense: Path, tmp_path: Path) -> None:
    plan = chooses_scales(dense, tmp_path)
    statistics = asked(plan).activations
    assert statistics is not None
    order = order_of(plan, 5, slices=3)
    assert order == {
        "root": str(dense),
        "repo": None,
        "revision": None,
        "recipe": {
            **recipe_json(plan.recipe),
            "keep_prefix": True,
            "shard_bytes": 1_000_000,
            "keep_shards": False,
        },
        "calibration": {
            "mode": "mse",
            "rms_factor": 3.0,
            "percentile": 99.9,
            "grid_size": 7,
            "activations": {"name": "stats.json", "sha256": statistics.sha256},
        },
        "inputs": {"activations": str(tmp_path / "stats.json")},
        "task_bytes": 5,
        "key": order["key"],
        "slices": 3,
    }
    again = plan_from(json.loads(json.dumps(order)))
    assert again.digest == plan.digest
    assert [file.head for file in again.files] == [file.head for file in plan.files]
    assert len(again.files) > 2
    assert (again.settings, asked(again).keep_prefix) == (plan.settings, True)
    assert asked(again).shard_bytes == asked(plan).shard_bytes == 1_000_000
    assert asked(plan_of(dense)).shard_bytes == MAX_SHARD_BYTES
    there = asked(again).activations
    assert there is not None
    assert there.path == tmp_path / "stats.json"


def test_paths_of_an_order_hold_from_any_folder(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(dense, tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    order = order_of(chooses_scales(Path("source"), Path()), 5)
    assert order["root"] == str(tmp_path / "source")
    assert order["inputs"] == {"activations": str(tmp_path / "stats.json")}
    monkeypatch.chdir("/")
    assert plan_from(order).steps


@pytest.mark.parametrize(("repo", "revision"), [("", ""), ("a/b", "0" * 40)])
def test_a_source_keeps_its_repository_and_commit(repo: str, revision: str, dense: Path) -> None:
    plan = make_plan(open_folder(dense, repo=repo, revision=revision), load_recipe("text"))
    order = order_of(plan, 5)
    assert (order["repo"], order["revision"]) == (repo or None, revision or None)
    again = plan_from(order).checkpoint
    assert (again.repo, again.revision) == (plan.checkpoint.repo, plan.checkpoint.revision)


def test_statistics_of_no_file_cannot_be_ordered(dense: Path) -> None:
    import numpy as np

    columns: dict[Key, Any] = {("mlp.down_proj", 1, None): np.ones(512, np.float32)}
    given = Activations("by hand", "0", columns)
    plan = make_plan(open_folder(dense), load_recipe("fp8"), activations=given)
    with pytest.raises(InputError) as caught:
        order_of(plan, 5)
    assert str(caught.value) == "by hand: workers cannot read it, expected a file"


def refusal(order: dict[str, Any]) -> str:
    """Return the sentence of a worker that refuses."""
    with pytest.raises(InputError) as caught:
        plan_from(order)
    return str(caught.value)


def test_a_source_that_is_not_seen_is_refused(dense: Path, tmp_path: Path) -> None:
    source = copied(dense, tmp_path / "source")
    order = order_of(plan_of(source), 5)
    shutil.rmtree(source)
    assert refusal(order) == (
        f"{source}: not there on {platform.node()}; workers need the source and the output on a "
        "file system that all of them see"
    )


KEY = {"plan": "1", "source": "2", "tool version": {"numpy": "3", "numba": "4"}}


def test_all_that_differs_is_told(dense: Path) -> None:
    order = order_of(plan_of(dense), 5)
    key = order["key"]
    tools = {**key["tool version"], "numpy": "0"}
    changed = {**order, "key": {"plan": "0", "source": "0", "tool version": tools}}
    numpy = f"numpy (0, here {key['tool version']['numpy']})"
    assert refusal(changed) == (
        f"{dense}: {platform.node()} has a different plan, source, {numpy}, "
        "expected what the run started with; use the same files and the same versions everywhere"
    )


@pytest.mark.parametrize(
    ("then", "names"),
    [
        (KEY, []),
        ({**KEY, "plan": "x"}, ["plan"]),
        ({**KEY, "plan": "x", "source": None}, ["plan", "source"]),
        ({**KEY, "tool version": {"numpy": "3", "numba": "5"}}, ["numba (5, here 4)"]),
        ({**KEY, "tool version": {"numpy": "3"}}, ["numba (None, here 4)"]),
        ({}, ["plan", "source", "numpy (None, here 3)", "numba (None, here 4)"]),
    ],
)
def test_what_differs_is_named(then: dict[str, Any], names: list[str]) -> None:
    assert key_differences(then, KEY) == names


def test_a_key_without_tools_differs_in_the_rest_alone() -> None:
    assert key_differences({"plan": "x"}, {"plan": "1"}) == ["plan"]


FILES = {"a": [5, 1], "b": [5, 1], "c": [5, 1]}


@pytest.mark.parametrize(
    ("then", "named"),
    [
        ({**FILES, "a": [5, 2]}, "source (a has another time)"),
        ({**FILES, "a": [4, 1], "b": [4, 2]}, "source (a has another size, b has another size)"),
        ({"a": [5, 1], "b": [5, 1], "d": [5, 1]}, "source (c is new, d is gone)"),
        ({}, "source (a is new, b is new, c is new)"),
        ({"w": 1, "x": [], "a": {}}, "source (a has another size, b is new, c is new and 2 more)"),
        ([], "source"),
        (None, "source"),
    ],
    ids=str,
)
def test_files_of_a_source_that_differ_are_named(then: Any, named: str) -> None:
    now = {"source": {"folder": "m", "files": FILES}}
    assert key_differences({"source": {"folder": "m", "files": then}}, now) == [named]
    assert key_differences({"source": {"folder": "n", "files": then}}, now) == ["source"]
