"""A plan, its manifest, and the plan made of that again are the same, whatever was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from checkpoints import ASSET, random_tensors, tiny_config, write_checkpoint
from gguf_models import make_variant, sidecars
from qwen35.checkpoint.source import Checkpoint, open_folder
from qwen35.codecs.fp8.layout import ScaleChoice, ScaleMode
from qwen35.codecs.ggml.types import ENCODABLE, NEEDS_IMATRIX
from qwen35.errors import Qwen35Error
from qwen35.model.roles import ROLES
from qwen35.planning.activations import load_activations
from qwen35.planning.container import ContainerInputs
from qwen35.planning.gguf_files.gguf_plan import files_of
from qwen35.planning.gguf_files.imatrix import read_imatrix
from qwen35.planning.gguf_files.mixes import FILE_TYPES, quantizable
from qwen35.planning.gguf_files.type_patterns import pattern_rules
from qwen35.planning.manifest import manifest_bytes
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import built_in, load_recipe
from qwen35.planning.work_order import order_of, plan_again, plan_from

ROLE_NAMES = sorted({path.removesuffix(".weight") for path in ROLES})
GROUPS = sorted({name.rpartition(".")[0] for name in ROLE_NAMES} - {""})
MATCHES = st.sampled_from([*ROLE_NAMES, *GROUPS, "kind:linear", "kind:experts", "*"])
LAYERS = st.sampled_from(["0", "1-3", "0, 2", "0-1, 3", "9"])
REASONS = st.text(min_size=1, max_size=20).filter(lambda text: '"' not in text and "\\" not in text)

Sources = Mapping[str, Path]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    root = tmp_path_factory.mktemp("again")
    found = {name: make_variant(root, name) for name in ("dense", "moe")}
    for name, options in {
        "text": {"text_only": True},
        "experts": {"moe": True},
        "half": {"dtype": "float16", "tied": False},
    }.items():
        config = tiny_config(**options)  # type: ignore[arg-type]
        tensors = random_tensors(config)
        found[name] = write_checkpoint(root / name, config, tensors, shards=2, sidecars=sidecars())
    found["asset"] = ASSET
    return found


@st.composite
def rules(draw: st.DrawFn, actions: st.SearchStrategy[str]) -> str:
    """Draw rows of a recipe as TOML."""
    text = ""
    for _ in range(draw(st.integers(0, 3))):
        row = {"match": draw(MATCHES), "action": draw(actions)}
        if draw(st.booleans()):
            row["layers"] = draw(LAYERS)
        if draw(st.booleans()):
            row["reason"] = draw(REASONS)
        lines = [f"{key} = {json.dumps(value)}" for key, value in row.items()]
        text += "\n".join(["[[rules]]", *lines, "\n"])
    return text


def own_recipe(folder: Path, base: str, kind: str, rows: str) -> str:
    path = folder / "mine.toml"
    text = f'format = "{kind}"\nbase = "{base}"\ndescription = "mine"\n\n{rows}'
    path.write_text(text, "utf-8")
    return str(path)


def manifest_of(plan: Plan) -> dict[str, Any]:
    hashes = {name: f"{i:064x}" for i, (name, _) in enumerate(plan.file_sizes())}
    parsed: dict[str, Any] = json.loads(manifest_bytes(plan, hashes))
    return parsed


def assert_same(plan: Plan, again: Plan) -> None:
    assert again.digest == plan.digest
    assert again.steps == plan.steps
    assert again.files == plan.files
    assert again.documents == plan.documents
    assert again.copied == plan.copied
    assert again.notes == plan.notes
    assert again.comparison == plan.comparison
    assert again.nbytes == plan.nbytes
    assert manifest_of(again) == manifest_of(plan)
    assert again.recipe.name == plan.recipe.name
    assert [(r.match, r.action, r.reason, r.layers) for r in again.recipe.rules] == [
        (r.match, r.action, r.reason, r.layers) for r in plan.recipe.rules
    ]


def follow(plan: Plan, inputs: ContainerInputs | None = None) -> None:
    """Make a plan again from its manifest, and from the order that workers get."""
    assert_same(plan, plan_again(plan.checkpoint, manifest_of(plan), inputs or ContainerInputs()))
    order = json.loads(json.dumps(order_of(plan, 10**6)))
    assert_same(plan, plan_from(order))


def opened(sources: Sources, name: str) -> Checkpoint:
    return open_folder(sources[name])


MANY = settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@MANY
@given(data=st.data())
def test_safetensors_outputs(sources: Sources, tmp_path: Path, data: st.DataObject) -> None:
    base = data.draw(st.sampled_from(built_in("safetensors")))
    kind = load_recipe(base).format
    actions = st.sampled_from(["drop", "keep", "plain", kind if kind != "stored" else "plain"])
    name = own_recipe(tmp_path, base, kind, data.draw(rules(actions)))
    options: dict[str, Any] = {
        "keep_prefix": data.draw(st.booleans()),
        "keep_shards": data.draw(st.booleans()),
    }
    if data.draw(st.booleans()):
        options["shard_bytes"] = data.draw(st.integers(10_000, 10**6))
    if kind == "fp8" and data.draw(st.booleans()):
        mode = data.draw(st.sampled_from(get_args(ScaleMode)))
        options["scale_choice"] = ScaleChoice(mode, rms_factor=data.draw(st.floats(1, 100)))
    try:
        recipe = load_recipe(data.draw(st.sampled_from([base, name])))
        recipe = recipe.keeping(tuple(data.draw(st.lists(st.sampled_from(ROLE_NAMES), max_size=2))))
        recipe = recipe.dropping_mtp() if data.draw(st.booleans()) else recipe
        checkpoint = opened(sources, data.draw(st.sampled_from(sorted(sources))))
        plan = make_plan(checkpoint, recipe, **options)
    except Qwen35Error:
        reject()
    follow(plan)


TYPES = sorted(
    name
    for name, row in FILE_TYPES.items()
    if name != "IQ3_XS" and not row.needs_imatrix and row.base not in NEEDS_IMATRIX
)
"""The file types that need no importance matrix."""


@MANY
@given(data=st.data())
def test_gguf_outputs(sources: Sources, tmp_path: Path, data: st.DataObject) -> None:
    base = data.draw(st.sampled_from(built_in("gguf")))
    actions = st.sampled_from(["mix", *ENCODABLE])
    name = own_recipe(tmp_path, base, "gguf", data.draw(rules(actions)))
    lines = data.draw(
        st.lists(
            st.sampled_from(
                ["attn_v=q8_0", r"blk\.[13]\.ffn_.*=Q6_K", "ssm_out|attn_qkv=f16", "FFN_DOWN=q5_0"]
            ),
            max_size=2,
        )
    )
    options: dict[str, Any] = {
        "types": tuple(data.draw(st.lists(st.sampled_from(TYPES), min_size=1, max_size=3))),
        "drop_mtp": data.draw(st.booleans()),
        "upstream_counters": data.draw(st.booleans()),
        "projector": data.draw(st.sampled_from([None, "F16", "F32", "BF16"])),
        "split_max_size": data.draw(st.sampled_from([None, None, 10**6])),
    }
    options["types"] = tuple(dict.fromkeys(options["types"]))
    try:
        recipe = load_recipe(data.draw(st.sampled_from([base, name])), "gguf")
        recipe = recipe.preceded(pattern_rules(lines, []))
        checkpoint = opened(sources, data.draw(st.sampled_from(["dense", "moe", "asset"])))
        plan = make_plan(checkpoint, recipe, **options)
    except Qwen35Error:
        reject()
    follow(plan)


def write_imatrix(plan: Plan, path: Path) -> Path:
    """Write an importance matrix that knows half of the tensors of a plan of GGUF files."""
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    generator = np.random.default_rng(0)
    known = [t for t in files_of(plan)[0].tensors if quantizable(t.name, t.shape)][::2]
    for tensor in known:
        slices = len(tensor.rows.slabs)
        writer.add_tensor(
            f"{tensor.name}.in_sum2", generator.random((slices, tensor.row), np.float32) + 1
        )
        writer.add_tensor(f"{tensor.name}.counts", np.ones((slices, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("source", ["dense", "moe"])
def test_gguf_outputs_with_an_importance_matrix(
    sources: Sources, source: str, tmp_path: Path
) -> None:
    checkpoint, recipe = opened(sources, source), load_recipe("q8-gates", "gguf")
    types = ("Q4_K_M", "Q8_0")
    path = write_imatrix(make_plan(checkpoint, recipe, types=types), tmp_path / "i.gguf")
    plan = make_plan(checkpoint, recipe, types=types, imatrix=read_imatrix(path, name="of mine"))
    assert_same(plan, plan_again(checkpoint, manifest_of(plan), ContainerInputs(imatrix=path)))


def test_fp8_outputs_with_statistics(sources: Sources, tmp_path: Path) -> None:
    checkpoint = opened(sources, "half")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    path = tmp_path / "stats.json"
    path.write_text(json.dumps({name: {"input_channel_max": [1.0 + i for i in range(256)]}}))
    for scale_choice in (None, ScaleChoice("rms", rms_factor=5)):
        plan = make_plan(
            checkpoint,
            load_recipe("text-fp8"),
            keep_prefix=True,
            scale_choice=scale_choice,
            activations=load_activations(path),
        )
        assert_same(
            plan, plan_again(checkpoint, manifest_of(plan), ContainerInputs(activations=path))
        )
