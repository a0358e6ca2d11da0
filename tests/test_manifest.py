"""What a manifest is read for: the source, the recipe, the calibration, the prefix."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from qwen35.checkpoint.header import json_bytes
from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.source import open_folder
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.errors import InputError
from qwen35.planning.containers import CONTAINERS
from qwen35.planning.manifest import (
    manifest_bytes,
    manifest_versions,
    read_manifest,
    recipe_json,
    recipe_of,
    source_json,
    source_of,
    tensor_of,
    work_key,
)
from qwen35.planning.rules import Recipe, Rule
from qwen35.planning.safetensors_files.safetensors_container import SafetensorsContainer
from qwen35.planning.safetensors_files.safetensors_manifest import kept_prefix, scale_choice_of
from qwen35.tensors import TensorSpec
from running import plan_of

MSE = ScaleChoice("mse", grid_size=9)


def test_source_is_a_repository_at_a_commit_or_a_folder() -> None:
    assert source_of({"source": {"repo": "a/b", "revision": "0" * 40}}) == ("a/b", "0" * 40)
    assert source_of({"source": {"folder": "x"}}) == (None, None)
    assert source_of({"source": {"folder": "x", "revision": 3}}) == (None, None)


def test_a_folder_is_told_by_its_name_wherever_one_stands(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(dense)
    assert source_json(open_folder(Path())) == {"folder": dense.name}


def test_recipe_is_the_one_that_was_written() -> None:
    rules = (
        Rule("mlp", "nf4", "why", layers=frozenset({0, 1, 7})),
        Rule("*", "plain", "rest"),
    )
    recipe = Recipe("mine.toml", "nf4", "", rules, CONTAINERS["safetensors"])
    written = json.loads(json.dumps(recipe_json(recipe)))
    assert written == {
        "name": "mine.toml",
        "format": "nf4",
        "rules": [["mlp", "nf4", "why", "0-1, 7"], ["*", "plain", "rest"]],
    }
    assert recipe_of({"recipe": written}, recipe.container) == recipe
    bare = Recipe("x", "nf4", "", (), recipe.container)
    assert recipe_of({"recipe": {"name": "x", "format": "nf4"}}, recipe.container) == bare
    one = recipe_json(bare.preceded([Rule("a", "b", "c")]))
    assert one["rules"] == [["a", "b", "c"]]


@pytest.mark.parametrize(
    ("activations", "sha256"),
    [(None, None), ({}, None), ({"name": "s", "sha256": "ab"}, "ab")],
)
def test_calibration_is_the_one_that_was_written(activations: object, sha256: str | None) -> None:
    written = {**asdict(MSE), "activations": activations}
    assert scale_choice_of({"calibration": written}) == (MSE, sha256)
    assert scale_choice_of({"calibration": asdict(MSE)}) == (MSE, None)
    assert scale_choice_of({"calibration": None}) == scale_choice_of({}) == (None, None)


def test_versions_are_of_all_that_bytes_pass_through() -> None:
    assert manifest_versions().keys() == {"qwen35", "python", "jinja2", "numba", "numpy"}


def test_a_manifest_has_these_keys(dense: Path) -> None:
    plan = plan_of(dense)
    raw = manifest_bytes(plan, {name: "0" * 64 for name, _ in plan.file_sizes()})
    keys = "manifest tool source recipe calibration plan files tensors notes"
    assert list(json.loads(raw)) == keys.split()


def test_a_run_is_known_by_plan_source_and_versions(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(dense)
    checkpoint = plan.checkpoint
    libraries = ("numpy", "no-such-library", "torch")
    monkeypatch.setattr(SafetensorsContainer, "libraries", libraries)
    key = work_key(plan)
    assert key["plan"] == plan.digest
    assert key["tool version"] == {**manifest_versions(), "torch": version("torch")}
    stamps = {name: list(stamp) for name, stamp in checkpoint.stamps.items()}
    assert key["source"] == {"folder": "source", "files": stamps}
    assert "config.json" in stamps
    remote = replace(plan, checkpoint=open_folder(dense, repo="a/b", revision="0" * 40))
    assert work_key(remote)["source"] == {"repo": "a/b", "revision": "0" * 40}


def test_json_is_in_utf8_and_survives_what_is_not() -> None:
    assert json_bytes({"a": "\u00e9", "b": "\udc80"}) == (
        b'{\n  "a": "\xc3\xa9",\n  "b": "\\udc80"\n}\n'
    )


SOURCE, RECIPE, CALIBRATION = "names no source", "names no recipe", "a malformed calibration"
RULES = "a malformed recipe, expected a list of rules"
RULE = "a malformed recipe, expected match, action and reason"
REPO = "a malformed source, expected repo and revision"
LAYERS = 'layers {!r}, expected numbers and ranges such as "0-3, 7"'


@pytest.mark.parametrize(
    ("manifest", "sentence"),
    [
        ({}, SOURCE),
        ({"source": "a/b"}, SOURCE),
        ({"source": {"repo": "a/b"}}, REPO),
        ({"source": {"repo": 1, "revision": "main"}}, REPO),
        ({"source": {"repo": "a/b", "revision": 1}}, REPO),
        ({"source": {"repo": 1, "revision": 1}}, REPO),
    ],
)
def test_malformed_source(manifest: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        source_of(manifest)
    assert str(caught.value) == f"qwen35.json: {sentence}"


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        (None, RECIPE),
        ("nf4", RECIPE),
        ([["name", "format"]], RECIPE),
        ({"name": "x"}, RECIPE),
        ({"format": "nf4"}, RECIPE),
        ({"name": "x", "format": "nf4", "rules": {}}, RULES),
        ({"name": "x", "format": "nf4", "rules": None}, RULES),
        ({"name": "x", "format": "nf4", "rules": ["mlp"]}, RULE),
        ({"name": "x", "format": "nf4", "rules": [["mlp", "nf4"]]}, RULE),
        ({"name": "x", "format": "nf4", "rules": [["a", "b", "c", "1", "d"]]}, RULE),
        ({"name": "x", "format": "nf4", "rules": [["a", "b", "c", "x"]]}, LAYERS.format("x")),
        ({"name": "x", "format": "nf4", "rules": [["a", "b", "c", 3]]}, LAYERS.format(3)),
    ],
)
def test_malformed_recipe(recipe: object, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        recipe_of({"recipe": recipe}, CONTAINERS["safetensors"])
    assert str(caught.value) == f"qwen35.json: {sentence}"


@pytest.mark.parametrize(
    ("scale_choice", "expected"),
    [
        ("mse", ""),
        ([], ""),
        ({"mode": "mse"}, ""),
        ({**asdict(MSE), "mode": []}, ""),
        ({**asdict(MSE), "mode": "best"}, ""),
        ({**asdict(MSE), "mode": "rms", "rms_factor": "x"}, ""),
        ({**asdict(MSE), "mode": "rms", "rms_factor": -1}, ""),
        ({**asdict(MSE), "activations": "s"}, ", expected activations: a table"),
        ({**asdict(MSE), "activations": []}, ", expected activations: a table"),
    ],
)
def test_malformed_calibration(scale_choice: object, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        scale_choice_of({"calibration": scale_choice})
    assert str(caught.value) == f"qwen35.json: {CALIBRATION}{expected}"


def written(folder: Path, manifest: object) -> LocalFolder:
    """Write a manifest."""
    (folder / "qwen35.json").write_text(json.dumps(manifest))
    return LocalFolder(folder)


GOOD: dict[str, Any] = {
    "manifest": 1,
    "files": {"a": {"size": 1, "sha256": "0"}},
    "tensors": {"a": {"x": "BF16 [1]"}},
}
VERSION = "not a manifest of this version of qwen35"
FILES = "malformed files, expected size and sha256 of each"
TENSORS = "malformed tensors, expected a table for each file: type and shape of every tensor"
TOOL = "malformed tool, expected the version of qwen35 and of each library"
NO_TENSORS: tuple[Any, ...] = (
    None,
    1,
    [],
    "",
    "abc",
    "BF16",
    "BF16 1",
    "BF16 [x]",
    "BF16 [-1]",
    "BF16 [1,2]",
    "[1]",
)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"manifest": 2}, VERSION),
        ({"manifest": None}, VERSION),
        ({"files": []}, FILES),
        ({"files": None}, FILES),
        ({"files": {"a": 1}}, FILES),
        ({"files": {"a": {"size": 1}}}, FILES),
        ({"files": {"a": {"sha256": "0"}}}, FILES),
        ({"files": {"a": {"size": True, "sha256": "0"}}}, FILES),
        ({"files": {"a": {"size": "1", "sha256": "0"}}}, FILES),
        ({"files": {"a": {"size": 1, "sha256": 0}}}, FILES),
        ({"files": {**GOOD["files"], "b": {}}}, FILES),
        ({"files": {"a": {"size": -1, "sha256": "0"}}}, FILES),
        ({"files": {"a": {"size": 2**63, "sha256": "0"}}}, FILES),
        *(({"files": {name: GOOD["files"]["a"]}}, FILES) for name in ("", "/x", "b/../../x", "\0")),
        ({"tensors": []}, TENSORS),
        ({"tensors": None}, TENSORS),
        ({"tensors": {"a": {}, "b": []}}, TENSORS),
        *(({"tensors": {"a": {"x": text}}}, TENSORS) for text in NO_TENSORS),
        ({"tool": None}, TOOL),
        ({"tool": {}}, TOOL),
        ({"tool": {"qwen35": 1}}, TOOL),
        ({"tool": {"qwen35": "1", "numpy": None}}, TOOL),
        ({"plan": 1}, "malformed plan, expected a digest"),
        ({"notes": None}, "malformed notes, expected sentences"),
        ({"notes": ["a", 1]}, "malformed notes, expected sentences"),
    ],
)
def test_malformed_manifest(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    assert read_manifest(written(tmp_path, GOOD)) == GOOD
    with pytest.raises(InputError) as caught:
        read_manifest(written(tmp_path, {**GOOD, **change}))
    assert str(caught.value) == f"qwen35.json: {sentence}"


def test_a_tensor_is_read_back_as_it_was_recorded() -> None:
    for spec in (TensorSpec("a", "BF16", (2, 300)), TensorSpec("b", "F32", ())):
        assert tensor_of(spec.name, f"{spec.dtype} {list(spec.shape)}") == spec


def test_a_list_or_nothing_is_no_manifest(tmp_path: Path) -> None:
    assert read_manifest(LocalFolder(tmp_path)) is None
    with pytest.raises(InputError, match=VERSION):
        read_manifest(written(tmp_path, [GOOD]))


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["model.language_model.norm.weight"], True),
        (["model.norm.weight", "lm_head.weight"], False),
        (["model.language_model.norm.weight", "model.visual.pos_embed.weight"], False),
        (["mtp.norm.weight"], False),
        (["x.model.language_model.norm.weight"], False),
    ],
)
def test_prefix_was_kept_if_text_is_alone_under_it(names: list[str], kept: bool) -> None:
    tables = {f"{number}.safetensors": {name: "BF16 [1]"} for number, name in enumerate(names)}
    assert kept_prefix({"tensors": tables}) is kept
