"""The files of a plan: what lies where, how full they are, and what stands beside them."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import layout_of, tiny_config
from golden_plan import SIZES
from plans import made_up, published_plan
from qwen35.checkpoint.header import parse_header
from qwen35.checkpoint.source import INDEX_NAME, open_folder, open_published
from qwen35.errors import UsageError
from qwen35.model.model_config import parse_config
from qwen35.model.roles import expected_tensors, role_of
from qwen35.planning.manifest import manifest_bytes, manifest_size
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import built_in, load_recipe
from qwen35.planning.safetensors_files import safetensors_options as plan_options
from qwen35.planning.safetensors_files.safetensors_options import MAX_SHARD_BYTES

pytestmark = pytest.mark.sentences


def check_files(plan: Plan) -> None:
    """Hold the files of a plan against its steps."""
    names = [out.name for out in plan.outputs]
    assert len(set(names)) == len(names)
    placed = [name for file in plan.files for name in file.offsets]
    assert sorted(placed) == sorted(names)
    for file in plan.files:
        header = parse_header(file.head[8:], file.nbytes, file.name)
        assert struct.unpack("<Q", file.head[:8])[0] == len(file.head) - 8
        outputs = {out.name: out for step in file.steps for out in step.outputs}
        described = {spec.name: spec for spec in file.head_tensors}
        assert {name: spec for name, (spec, _, _) in header.tensors.items()} == described
        begins = {name: begin for name, (_, begin, _) in header.tensors.items()}
        if file.described:  # in a dialect: stacks begin where a tensor does, and none overlap
            assert {*begins.values()} <= {*file.offsets.values()}
            spans = sorted((begin, outputs[name].nbytes) for name, begin in file.offsets.items())
            assert all(a + size == b for (a, size), (b, _) in itertools.pairwise(spans))
        else:
            assert described == outputs
            assert begins == file.offsets
        assert file.nbytes == len(file.head) + sum(out.nbytes for out in outputs.values())
    documents = sum(map(len, plan.documents.values())) + sum(plan.copied.values())
    heads = sum(len(file.head) for file in plan.files)
    assert plan.nbytes == heads + sum(out.nbytes for out in plan.outputs) + documents
    assert plan.nbytes == sum(size for _, size in plan.file_sizes())


SERVED = (
    *("nvfp4", "nvfp4-mixed", "nvfp4-experts", "int4", "fp8-channel"),
    *("mlx-4bit", "mlx-8bit", "mlx-mxfp4", "mlx-nvfp4"),
)
RECIPES = sorted({*built_in("safetensors")} - {*SERVED})


def sized(size: str, recipe: str) -> Any:
    """Return a case; most of the largest model take many seconds."""
    heavy = size == "Qwen3.8-2.4T-A95B" and recipe != "nf4"
    return pytest.param(size, recipe, marks=[pytest.mark.heavy] if heavy else [])


@pytest.mark.parametrize(
    ("size", "recipe"),
    [
        *(sized(*pair) for pair in itertools.product(SIZES, RECIPES)),
        *itertools.product(["Qwen3.5-35B-A3B"], SERVED[:6]),
        *itertools.product(["Qwen3.5-0.8B"], [name for name in SERVED if "experts" not in name]),
    ],
)
def test_files_of_a_published_size_hold_its_tensors(size: str, recipe: str) -> None:
    check_files(published_plan(size, recipe))


@pytest.mark.parametrize("size", ["Qwen3.5-9B", "Qwen3.5-397B-A17B"])
def test_shards_are_full_but_never_over_unless_one_weight_is(size: str) -> None:
    plan = published_plan(size, "nf4")
    sizes = [[step.nbytes for step in file.steps] for file in plan.files]
    for i, shard in enumerate(sizes):
        assert sum(shard) <= MAX_SHARD_BYTES or len(shard) == 1
        if i + 1 < len(sizes):
            assert sum(shard) + sizes[i + 1][0] > MAX_SHARD_BYTES
    count = len(plan.files)
    assert [file.name for file in plan.files] == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]


def test_index_lists_every_tensor_once() -> None:
    plan = published_plan("Qwen3.5-27B", "nf4")
    index = json.loads(plan.documents[INDEX_NAME])
    expected = {name: file.name for file in plan.files for name in file.offsets}
    assert index["weight_map"] == expected
    assert list(index["weight_map"]) == sorted(expected)
    assert index["metadata"] == {"total_size": sum(step.nbytes for step in plan.steps)}


def test_single_file_has_no_index_and_the_plain_name() -> None:
    plan = published_plan("Qwen3.5-0.8B", "nf4")
    assert [file.name for file in plan.files] == ["model.safetensors"]
    assert list(plan.documents) == ["config.json"]


def test_weight_and_its_companions_share_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_options, "MAX_SHARD_BYTES", 100_000)
    plan = make_plan(made_up(tiny_config()), load_recipe("nf4"))
    assert len(plan.files) > 10
    check_files(plan)
    for step in plan.steps:
        homes = {
            file.name for file in plan.files for out in step.outputs if out.name in file.offsets
        }
        assert len(homes) <= 1


def test_sidecars_travel_with_what_they_serve() -> None:
    sizes = {"tokenizer.json": 10, "preprocessor_config.json": 20, "LICENSE": 30}
    checkpoint = replace(made_up(tiny_config()), sidecars=sizes)
    assert make_plan(checkpoint, load_recipe("nf4")).copied == sizes
    assert make_plan(checkpoint, load_recipe("text-nf4")).copied == {
        "tokenizer.json": 10,
        "LICENSE": 30,
    }
    text = replace(made_up(tiny_config(text_only=True)), sidecars=sizes)
    assert "preprocessor_config.json" not in make_plan(text, load_recipe("nf4")).copied


GROUPS = sorted(
    {
        ".".join(role_of(spec.name).name.split(".")[:count])
        for spec in expected_tensors(parse_config(tiny_config()), layout_of(tiny_config()))
        for count in (1, 2, 3)
    }
)


@settings(max_examples=60)
@given(
    st.sampled_from(["nf4", "text-nf4"]),
    st.lists(st.sampled_from(GROUPS), max_size=4),
    st.booleans(),
    st.integers(1_000, 10**7),
)
def test_any_keep_accounts_for_every_weight_and_byte(
    name: str, keep: list[str], drop_mtp: bool, shard: int
) -> None:
    checkpoint = made_up(tiny_config())
    recipe = load_recipe(name).keeping(tuple(keep))
    if drop_mtp:
        recipe = recipe.dropping_mtp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_options, "MAX_SHARD_BYTES", shard)
        try:
            plan = make_plan(checkpoint, recipe)
        except UsageError:  # a group asked for twice, or a part of the tower kept and the rest not
            return
    assert sorted(step.weight.name for step in plan.steps) == sorted(
        weight.name for weight in checkpoint.weights
    )
    check_files(plan)
    for step in plan.steps:
        kept = recipe.rule_for(step.role).reason == "asked for by --keep"
        assert not (kept and step.op == "nf4")
        assert bool(step.outputs) is (step.op != "drop")


@pytest.mark.parametrize("recipe", ["nf4", "text"])
def test_files_are_filled_in_order_as_full_as_they_may_be(recipe: str, dense: Path) -> None:
    checkpoint = open_folder(dense)
    steps = [s for s in make_plan(checkpoint, load_recipe(recipe)).steps if s.outputs]
    sums = list(itertools.accumulate(step.nbytes for step in steps))
    for most in (sums[4], sums[4] - 1, sums[9], sums[9] - sums[4], sums[-1], sums[-1] - 1):
        files: list[list[str]] = [[]]
        left = most
        for step in steps:
            if step.nbytes > left and files[-1]:
                files.append([])
                left = most
            files[-1].append(step.spec.name)
            left -= step.nbytes
        planned = make_plan(checkpoint, load_recipe(recipe), shard_bytes=most).files
        assert [[step.spec.name for step in file.steps] for file in planned] == files


def test_manifest_size_is_exact_whatever_the_hashes() -> None:
    plan = published_plan("Qwen3.5-0.8B", "nf4")
    hashes = {n: hashlib.sha256(n.encode()).hexdigest() for n, _ in plan.file_sizes()}
    manifest = manifest_bytes(plan, hashes)
    assert len(manifest) == manifest_size(plan)
    parsed = json.loads(manifest)
    assert parsed["plan"] == plan.digest
    assert parsed["source"] == {"folder": "Qwen3.5-0.8B"}
    assert parsed["files"]["config.json"]["sha256"] == hashes["config.json"]
    assert {file: dict.keys(table) for file, table in parsed["tensors"].items()} == {
        file.name: file.offsets.keys() for file in plan.files
    }


def test_manifest_names_repository_and_commit_but_no_path() -> None:
    checkpoint = open_published("Qwen3.5-0.8B")
    local = replace(checkpoint, name="/home/someone/secret/model")
    remote = replace(checkpoint, repo="owner/name", revision="a" * 40)
    for source, expected in (
        (local, {"folder": "model"}),
        (remote, {"repo": "owner/name", "revision": "a" * 40}),
    ):
        plan = make_plan(source, load_recipe("text"))
        raw = manifest_bytes(plan, {name: "0" * 64 for name, _ in plan.file_sizes()})
        assert json.loads(raw)["source"] == expected
        assert b"secret" not in raw
