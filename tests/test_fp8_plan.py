"""FP8 plans: what is packed, under which names, and what config.json says of the rest.

Counts, bytes and lists are those of the official checkpoints, as published.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from checkpoints import layout_of, tiny_config
from qwen35.checkpoint.source import Checkpoint, open_published
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.codecs.nf4 import layout as nf4
from qwen35.codecs.registry import group
from qwen35.errors import UsageError
from qwen35.model.model_config import parse_config
from qwen35.model.roles import CheckpointNaming, expected_tensors
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.safetensors_files.safetensors_display import plan_json, plan_text
from qwen35.tensors import StoredTensor, TensorSpec

pytestmark = pytest.mark.sentences

FAMILY = {
    # name: (FP8 weights, tensors, bytes of tensors)
    "Qwen3.5-0.8B": (157, 645, 1_231_570_560),
    "Qwen3.5-2B": (157, 789, 3_124_352_448),
    "Qwen3.5-4B": (207, 945, 5_647_548_736),
    "Qwen3.5-9B": (207, 982, 12_185_157_600),
    "Qwen3.5-27B": (407, 1_606, 30_866_680_160),
    "Qwen3.5-35B-A3B": (31_745, 64_196, 37_454_799_072),
    "Qwen3.5-122B-A10B": (37_939, 76_656, 127_152_313_312),
    "Qwen3.5-397B-A17B": (94_078, 189_042, 406_125_181_280),
}
"""27B and 35B-A3B as the headers of the official FP8 checkpoints have them."""

OFFICIAL = {
    # name: (entries of modules_to_not_convert, SHA-256 of them, of the rest of config.json)
    "Qwen3.5-27B": (
        259,
        "94c67c205c4063b21bf11a6bd2da1754e96444420ff027e78458ce8b19fa6fd5",
        "66dcf8b292054d7d423ea31f45287d33617a97cb4797b4ac3ef7a02a3efa99da",
    ),
    "Qwen3.5-35B-A3B": (
        287,
        "03ff5205f40f3ffff446aab43e53685d2f7563fef52e0c20348abca4f7b6ea15",
        "7997fe12f30ed81b2deeea0caedb8c7526b3fc680ed365b2ebca71907d8f5d85",
    ),
    "Qwen3.5-122B-A10B": (
        321,
        "5741839f26661d8185dc970286ab0aef50b5d3da7817140d583b681aaa29442d",
        "e654aef51e09c2f4cc439a6a3336886ca92d14bea8be1763c08b0c20c6152512",
    ),
    "Qwen3.5-397B-A17B": (
        372,
        "a4fb8c165e7d3b1204e840e23fd0b42d7ecc73a7e099638fe2ce09e4b5be2df9",
        "3ec59557f37a8c09ef2513cfae49c7c5eba5b804a696c02ad8a87a48bc581efe",
    ),
}
"""Digests of the official FP8 config.json: of the sorted list, one name a line; and of the JSON
with sorted keys without that list."""

TEXT = "model.language_model"
TABLE = (
    "*linear_attn.in_proj_qkv.weight",
    "*linear_attn.in_proj_z.weight",
    "*self_attn.q_proj.weight",
    "*self_attn.k_proj.weight",
    "*self_attn.v_proj.weight",
    "*self_attn.o_proj.weight",
    "*mlp.experts.*.down_proj.weight",
    "*mlp.experts.*.gate_proj.weight",
    "*mlp.experts.*.up_proj.weight",
    "*mlp.down_proj.weight",
    "*mlp.gate_proj.weight",
    "*mlp.up_proj.weight",
)
"""What the toolkit before us lists as FP8; the shared experts end in none of these."""


@lru_cache(maxsize=32)
def published(name: str, recipe: str = "fp8") -> Plan:
    return make_plan(open_published(name), load_recipe(recipe))


def made_up(
    config: dict[str, Any],
    layout: CheckpointNaming | None = None,
    *,
    fp8: tuple[str, ...] = (),
    nf4s: tuple[str, ...] = (),
) -> Checkpoint:
    """Return a checkpoint without bytes, some weights of it packed."""
    tensors: dict[str, StoredTensor] = {}
    for spec in expected_tensors(parse_config(config), layout or layout_of(config)):
        parts: tuple[TensorSpec, ...] = (spec,)
        if spec.name.endswith(nf4s) and nf4s:
            parts = nf4.layout(spec)
        elif spec.name.endswith(fp8) and fp8:
            grid = (-(-spec.shape[0] // 128), -(-spec.shape[1] // 128))
            parts = (
                TensorSpec(spec.name, "F8_E4M3", spec.shape),
                TensorSpec(f"{spec.name}_scale_inv", "BF16", grid),
            )
        for part in parts:
            tensors[part.name] = StoredTensor(part, "model.safetensors", 0)
    weights, problems = group(tensors)
    assert not problems
    return Checkpoint("made up", parse_config(config), weights, CheckpointNaming.of(tensors), {})


def planned(
    config: dict[str, Any], recipe: str = "fp8", *keep: str, layout: CheckpointNaming | None = None
) -> Plan:
    return make_plan(made_up(config, layout), load_recipe(recipe).keeping(keep))


def config_of(plan: Plan) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(plan.documents["config.json"])
    return parsed


def listed(plan: Plan) -> list[str]:
    names: list[str] = config_of(plan)["quantization_config"]["modules_to_not_convert"]
    return names


def packed(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the FP8 tensors by name."""
    return {out.name: out.shape for out in plan.outputs if out.dtype == "F8_E4M3"}


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- the official format


@pytest.mark.parametrize("name", FAMILY)
def test_counts_and_bytes_are_those_of_the_family(name: str) -> None:
    plan = published(name)
    outputs = list(plan.outputs)
    found = (len(packed(plan)), len(outputs), sum(out.nbytes for out in outputs))
    assert found == FAMILY[name]
    assert len({out.name for out in outputs}) == len(outputs)


@pytest.mark.parametrize("name", ["Qwen3.5-0.8B", "Qwen3.5-35B-A3B"])
def test_every_fp8_weight_has_a_bf16_scale_for_each_tile(name: str) -> None:
    outputs = {out.name: out for out in published(name).outputs}
    scales = {n for n in outputs if n.endswith("_scale_inv")}
    assert scales == {f"{n}_scale_inv" for n in packed(published(name))}
    for scale in scales:
        rows, columns = outputs[scale.removesuffix("_scale_inv")].shape
        assert outputs[scale].shape == (-(-rows // 128), -(-columns // 128))
        assert outputs[scale].dtype == "BF16"
        assert scale.endswith(".weight_scale_inv")


@pytest.mark.parametrize("name", OFFICIAL)
def test_modules_left_alone_are_the_official_ones_name_for_name(name: str) -> None:
    names = listed(published(name))
    assert len(names) == len(set(names)) == OFFICIAL[name][0]
    assert sha256("\n".join(sorted(names))) == OFFICIAL[name][1]


@pytest.mark.parametrize("name", OFFICIAL)
def test_config_is_the_official_one(name: str) -> None:
    """But for ``fmt``, which came with 3.6."""
    config = config_of(published(name))
    quantization = config["quantization_config"]
    del quantization["modules_to_not_convert"]
    assert quantization.pop("fmt") == "e4m3"
    assert quantization == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_per_tensor": False,
        "act_per_tensor": False,
        "weight_block_size": [128, 128],
    }
    assert sha256(json.dumps(config, sort_keys=True)) == OFFICIAL[name][2]


@pytest.mark.parametrize("name", ["Qwen3.5-0.8B", "Qwen3.5-9B", "Qwen3.5-35B-A3B"])
@pytest.mark.parametrize("recipe", ["fp8", "fp8-conservative", "text-fp8", "text-fp8-conservative"])
def test_the_list_names_exactly_the_matrices_that_stay(name: str, recipe: str) -> None:
    plan = published(name, recipe)
    names = listed(plan)
    plain = {
        out.name.removesuffix(".weight")
        for out in plan.outputs
        if out.dtype != "F8_E4M3" and len(out.shape) > 1 and not out.name.endswith("_scale_inv")
    }
    assert set(names) == plain | {"lm_head"}
    assert not any("*" in entry for entry in names)


# --- fused experts


def test_fused_experts_become_matrices_under_the_official_names() -> None:
    shapes = packed(published("Qwen3.5-35B-A3B"))
    layer = f"{TEXT}.layers.7.mlp.experts"
    assert shapes[f"{layer}.0.gate_proj.weight"] == (512, 2048)
    assert shapes[f"{layer}.255.up_proj.weight"] == (512, 2048)
    assert shapes[f"{layer}.128.down_proj.weight"] == (2048, 512)
    names = {out.name for out in published("Qwen3.5-35B-A3B").outputs}
    assert not any(n.endswith(("experts.gate_up_proj", "experts.down_proj")) for n in names)
    assert sum(".mlp.experts." in n for n in shapes) == 41 * 256 * 3


def test_fused_and_single_mtp_experts_give_the_same_tensors() -> None:
    newer, older = published("Qwen3.6-35B-A3B"), published("Qwen3.5-35B-A3B")

    def tensors(plan: Plan) -> set[tuple[str, str, tuple[int, ...]]]:
        return {(out.name, out.dtype, out.shape) for out in plan.outputs}

    assert tensors(newer) == tensors(older)
    assert config_of(newer)["quantization_config"] == config_of(older)["quantization_config"]
    assert "mtp.layers.0.mlp.experts.255.down_proj.weight" in packed(newer)


def test_per_expert_source_gives_the_same_tensors_as_a_fused_one() -> None:
    config = tiny_config(moe=True, tied=False)
    fused = planned(config)
    single = planned(config, layout=layout_of(config, per_expert=True))
    assert [o for o in fused.outputs if ".experts." in o.name]
    assert set(fused.outputs) == set(single.outputs)
    assert listed(fused) == listed(single)


def test_an_expert_is_the_part_of_the_stack_that_holds_it() -> None:
    plan = planned(tiny_config(moe=True))
    stem = f"{TEXT}.layers.0.mlp.experts"
    begins = {s.spec.name: s.weight.main.begin for s in plan.steps if s.spec.name.startswith(stem)}
    matrix = 128 * 256 * 2  # bytes of a gate, up or down of this size
    for expert in range(4):
        assert begins[f"{stem}.{expert}.gate_proj.weight"] == 2 * expert * matrix
        assert begins[f"{stem}.{expert}.up_proj.weight"] == (2 * expert + 1) * matrix
        assert begins[f"{stem}.{expert}.down_proj.weight"] == expert * matrix


# --- the conservative recipe


@pytest.mark.parametrize("name", ["Qwen3.5-0.8B", "Qwen3.5-9B", "Qwen3.5-35B-A3B"])
def test_conservative_packs_exactly_the_table_of_the_toolkit_before(name: str) -> None:
    def in_table(tensor: str) -> bool:
        return any(fnmatchcase(tensor, row) for row in TABLE) and ".visual." not in tensor

    official, conservative = (packed(published(name, r)) for r in ("fp8", "fp8-conservative"))
    assert set(conservative) == {n for n in official if in_table(n)}
    left = {n.rpartition("layers.")[2].partition(".")[2] for n in set(official) - set(conservative)}
    shared = {f"mlp.shared_expert.{p}_proj.weight" for p in ("gate", "up", "down")}
    assert left == {"linear_attn.out_proj.weight"} | (shared if "A3B" in name else set())
    assert any(n.startswith("mtp.layers.0.") for n in conservative)


@pytest.mark.parametrize("recipe", ["fp8", "fp8-conservative"])
def test_what_is_never_packed(recipe: str) -> None:
    for name in ("Qwen3.5-0.8B", "Qwen3.5-35B-A3B"):
        for tensor in packed(published(name, recipe)):
            for never in ("visual", "embed", "lm_head", "norm", "conv1d", "in_proj_a", "in_proj_b"):
                assert never not in tensor
            assert not tensor.endswith(("mlp.gate.weight", "shared_expert_gate.weight", "mtp.fc"))


# --- text-only


def test_text_only_drops_the_tower_and_renames_the_list_with_the_tensors() -> None:
    plan = published("Qwen3.5-35B-A3B", "text-fp8")
    config = config_of(plan)
    assert config["architectures"] == ["Qwen3_5MoeForCausalLM"]
    assert "vision_config" not in config
    names = listed(plan)
    assert not any("visual" in name or "language_model" in name for name in names)
    assert "model.layers.0.linear_attn.conv1d" in names
    assert "lm_head" in names
    assert all(n.startswith(("model.layers.", "mtp.layers.0.")) for n in packed(plan))
    assert len(packed(plan)) == FAMILY["Qwen3.5-35B-A3B"][0]


def test_prefix_may_be_kept() -> None:
    checkpoint = made_up(tiny_config(moe=True))
    plan = make_plan(checkpoint, load_recipe("text-fp8"), keep_prefix=True)
    assert f"{TEXT}.layers.0.mlp.experts.3.up_proj.weight" in packed(plan)
    assert f"{TEXT}.layers.0.mlp.gate" in listed(plan)
    assert all(name.startswith((TEXT, "mtp.", "lm_head")) for name in listed(plan))


def test_a_text_only_source_keeps_its_names() -> None:
    plan = planned(tiny_config(text_only=True, moe=True, tied=False, mtp=0))
    assert all(
        name.startswith(("model.layers.", "model.embed", "lm_head")) for name in listed(plan)
    )
    assert "model.layers.3.mlp.experts.0.down_proj.weight" in packed(plan)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recipe", ["fp8", "text-fp8"])
def test_head_is_always_listed(tied: bool, recipe: str) -> None:
    assert listed(planned(tiny_config(tied=tied), recipe)).count("lm_head") == 1


# --- shapes that tiles do not fit


def narrow(**text: int) -> dict[str, Any]:
    config = tiny_config(moe="moe_intermediate_size" in text)
    config["text_config"] |= text
    return config


def stays(plan: Plan, *roles: str) -> None:
    """Check that these roles stay in bf16 in every layer, and that the list says so."""
    left = {s.role.name.removeprefix("mtp.layers.") for s in plan.steps if s.packing != "fp8"}
    for role in roles:
        assert role in left
        found = [s for s in plan.steps if s.role.name.removeprefix("mtp.layers.") == role]
        for step in found:
            assert [out.dtype for out in step.outputs] == ["BF16"]
            assert step.outputs[0].name.removesuffix(".weight") in listed(plan)
            assert "128" in step.reason


def test_partial_tiles_stay_and_are_listed() -> None:
    plan = planned(narrow(intermediate_size=192))
    stays(plan, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert len(packed(plan)) == 32 - 5 * 3
    shown = plan_text(plan, 1)
    assert "mlp.down_proj is [256, 192]: not whole tiles of 128 x 128" in shown


def test_a_group_stays_whole_where_one_part_does_not_fit() -> None:
    config = narrow(
        linear_key_head_dim=96,
        linear_num_key_heads=1,
        linear_num_value_heads=1,
        head_dim=64,
    )
    plan = planned(config)
    shapes = {s.role.name: s.spec.shape for s in plan.steps}
    assert shapes["linear_attn.in_proj_qkv"] == (256, 256)  # would fit
    assert shapes["linear_attn.in_proj_z"] == (64, 256)
    assert shapes["self_attn.q_proj"] == (256, 256)  # would fit
    assert shapes["self_attn.k_proj"] == shapes["self_attn.v_proj"] == (64, 256)
    stays(plan, "linear_attn.in_proj_qkv", "linear_attn.in_proj_z")
    stays(plan, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert f"{TEXT}.layers.3.self_attn.o_proj.weight" in packed(plan)


@pytest.mark.parametrize("per_expert", [False, True])
def test_experts_that_do_not_fit_stay_as_they_are_and_are_listed_as_one(per_expert: bool) -> None:
    config = narrow(moe_intermediate_size=192, num_experts=4)
    plan = planned(config, layout=layout_of(config, per_expert=per_expert))
    assert not any(".experts." in name for name in packed(plan))
    experts = {n for n in listed(plan) if ".experts" in n}
    assert experts == {f"{TEXT}.layers.{i}.mlp.experts" for i in range(4)} | {
        "mtp.layers.0.mlp.experts"
    }
    assert any("shared_expert.gate_proj" in name for name in packed(plan))


def test_nothing_fits_and_it_is_said() -> None:
    config = narrow(hidden_size=192)
    config["vision_config"]["out_hidden_size"] = 192
    with pytest.raises(UsageError, match="leaves nothing to be packed as FP8"):
        planned(config)


# --- fused groups


@pytest.mark.parametrize(
    ("keep", "other"),
    [
        ("self_attn.v_proj", "k_proj"),
        ("self_attn.q_proj", "k_proj"),
        ("mlp.up_proj", "gate_proj"),
        ("linear_attn.in_proj_z", "in_proj_qkv"),
        ("linear_attn.in_proj_qkv", "in_proj_z"),
        ("mtp.layers.self_attn.k_proj", "q_proj"),
        ("mtp.layers.mlp.gate_proj", "up_proj"),
    ],
)
def test_keeping_a_part_of_a_group_is_refused_with_both_names(keep: str, other: str) -> None:
    with pytest.raises(UsageError) as caught:
        planned(tiny_config(), "fp8", keep)
    sentence = str(caught.value)
    assert f"{keep.rpartition('.')[2]}.weight" in sentence
    assert f"{other}.weight" in sentence
    assert "engines load them as one matrix" in sentence


@pytest.mark.parametrize(
    "keep",
    ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.shared_expert.up_proj"],
)
def test_keeping_a_part_of_the_experts_is_refused(keep: str) -> None:
    with pytest.raises(UsageError, match="engines load them as one matrix"):
        planned(tiny_config(moe=True), "fp8", keep)


@pytest.mark.parametrize(
    "keep",
    [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("self_attn.o_proj", "mlp.down_proj"),
        ("mlp",),
        ("mtp",),
    ],
)
def test_a_whole_group_may_be_kept_and_is_listed(keep: tuple[str, ...]) -> None:
    plan = planned(tiny_config(), "fp8", *keep)
    for step in plan.steps:
        if any(step.role.name.startswith(role) for role in keep) and len(step.spec.shape) == 2:
            assert step.packing is None
            assert step.outputs[0].name.removesuffix(".weight") in listed(plan)


def test_kept_experts_stay_fused_and_are_listed_as_one_module() -> None:
    plan = planned(tiny_config(moe=True), "fp8", "mlp.experts")
    names = {out.name for out in plan.outputs}
    assert f"{TEXT}.layers.0.mlp.experts.gate_up_proj" in names
    assert f"{TEXT}.layers.0.mlp.experts" in listed(plan)
    assert f"{TEXT}.layers.0.mlp.experts.gate_up_proj" not in listed(plan)


def toml(folder: Path, *rules: tuple[str, str], base: str = 'base = "fp8"\n') -> str:
    text = f'format = "fp8"\n{base}'
    for match, action in rules:
        text += f'[[rules]]\nmatch = "{match}"\naction = "{action}"\n'
    path = folder / "own.toml"
    path.write_text(text)
    return str(path)


def test_a_recipe_of_ones_own_cannot_split_a_group(tmp_path: Path) -> None:
    recipe = toml(tmp_path, ("self_attn.k_proj", "plain"))
    with pytest.raises(UsageError, match=r"q_proj\.weight as FP8, but not .*k_proj\.weight"):
        planned(tiny_config(), recipe)
    both = toml(tmp_path, ("self_attn", "plain"))
    assert not any("self_attn" in n for n in packed(planned(tiny_config(mtp=0), both)))


def test_the_gates_of_linear_attention_are_a_group_too(tmp_path: Path) -> None:
    config = narrow(linear_num_value_heads=128, linear_value_head_dim=2, linear_num_key_heads=128)
    config["text_config"] |= {"linear_key_head_dim": 2}
    recipe = toml(tmp_path, ("linear_attn.in_proj_a", "fp8"))
    with pytest.raises(UsageError, match=r"in_proj_a\.weight as FP8, but not .*in_proj_b\.weight"):
        planned(config, recipe)
    both = toml(tmp_path, ("linear_attn.in_proj_a", "fp8"), ("linear_attn.in_proj_b", "fp8"))
    assert f"{TEXT}.layers.0.linear_attn.in_proj_b.weight" in packed(planned(config, both))


@pytest.mark.parametrize("role", ["embed_tokens", "mlp.gate", "linear_attn.conv1d", "norm"])
def test_what_is_no_matrix_of_a_layer_cannot_be_packed(role: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected linear layers or experts"):
        planned(tiny_config(moe=True), toml(tmp_path, (role, "fp8")))


# --- packed sources


MLP = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")


def packed_config(method: str) -> dict[str, Any]:
    return tiny_config() | {"quantization_config": {"quant_method": method}}


def test_fp8_weights_of_the_source_are_copied() -> None:
    plan = make_plan(made_up(packed_config("fp8"), fp8=MLP), load_recipe("fp8"))
    ops = Counter((s.weight.storage, s.op) for s in plan.steps if s.packing == "fp8")
    assert ops == {("fp8", "copy"): 15, ("plain", "fp8"): 17}
    assert {out.name for out in plan.outputs} == {
        out.name for out in planned(tiny_config()).outputs
    }
    assert config_of(plan) == config_of(planned(tiny_config()))


def test_a_source_that_is_fp8_throughout_needs_no_calibration() -> None:
    names = tuple(packed(planned(tiny_config())))
    checkpoint = made_up(packed_config("fp8"), fp8=names)
    plan = make_plan(checkpoint, load_recipe("fp8"))
    assert {s.op for s in plan.steps} == {"copy"}
    assert plan.settings is None
    with pytest.raises(UsageError, match="--calib-mode"):
        make_plan(checkpoint, load_recipe("fp8"), scale_choice=ScaleChoice("max"))


def test_bf16_recipe_decodes_every_fp8_weight_and_forgets_the_config() -> None:
    plan = make_plan(made_up(packed_config("fp8"), fp8=MLP), load_recipe("bf16"))
    assert Counter(s.op for s in plan.steps if s.weight.storage == "fp8") == {"decode": 15}
    assert "quantization_config" not in config_of(plan)
    assert {out.dtype for out in plan.outputs} == {"BF16", "F32"}


def test_conservative_recipe_restores_what_it_keeps() -> None:
    source = made_up(packed_config("fp8"), fp8=("linear_attn.out_proj.weight",))
    plan = make_plan(source, load_recipe("fp8-conservative"))
    assert Counter(s.op for s in plan.steps if s.weight.storage == "fp8") == {"decode": 3}
    assert f"{TEXT}.layers.0.linear_attn.out_proj" in listed(plan)


def test_nf4_source_becomes_fp8() -> None:
    plan = make_plan(made_up(packed_config("bitsandbytes"), nf4s=MLP), load_recipe("fp8"))
    assert Counter((s.weight.storage, s.op) for s in plan.steps if s.packing == "fp8") == {
        ("nf4", "fp8"): 15,
        ("plain", "fp8"): 17,
    }
    assert packed(plan) == packed(planned(tiny_config()))
    assert config_of(plan)["quantization_config"]["quant_method"] == "fp8"


def test_fp8_and_nf4_in_one_output_are_refused(tmp_path: Path) -> None:
    source = made_up(packed_config("bitsandbytes"), nf4s=("self_attn.o_proj.weight",))
    with pytest.raises(UsageError, match="NF4 and FP8"):
        make_plan(source, load_recipe(toml(tmp_path, ("self_attn.o_proj", "keep"))))


def test_a_source_group_half_packed_is_completed() -> None:
    part = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")
    plan = make_plan(made_up(packed_config("fp8"), fp8=part), load_recipe("fp8"))
    ops = {s.role.name: s.op for s in plan.steps}
    assert (ops["self_attn.q_proj"], ops["self_attn.v_proj"]) == ("copy", "fp8")


def test_a_kept_half_of_a_group_is_refused(tmp_path: Path) -> None:
    """`keep` leaves what is packed packed: half a group would stay."""
    source = made_up(packed_config("fp8"), fp8=("self_attn.q_proj.weight",))
    recipe = toml(tmp_path, ("self_attn", "keep"), ("mtp.layers.self_attn", "keep"))
    with pytest.raises(UsageError, match="engines load them as one matrix"):
        make_plan(source, load_recipe(recipe))


# --- calibration in the plan


def test_the_default_is_search_and_the_plan_says_so() -> None:
    plan = planned(tiny_config())
    assert plan.settings == ScaleChoice("search")
    assert "FP8 scales: search" in plan_text(plan, 1)
    scale_choice = plan_json(plan, 1)["calibration"]
    assert (scale_choice["mode"], scale_choice["activations"]) == ("search", None)


def test_the_digest_depends_on_how_scales_are_chosen() -> None:
    checkpoint, recipe = made_up(tiny_config()), load_recipe("fp8")
    digests = {
        make_plan(checkpoint, recipe, scale_choice=scale_choice).digest
        for scale_choice in (
            ScaleChoice("max"),
            ScaleChoice("search"),
            ScaleChoice("rms"),
            ScaleChoice("rms", rms_factor=3.5),
            ScaleChoice("percentile"),
            ScaleChoice("percentile", percentile=99.0),
            ScaleChoice("mse"),
            ScaleChoice("mse", grid_size=49),
        )
    }
    assert len(digests) == 8
    same = [make_plan(checkpoint, recipe, scale_choice=c).digest for c in (None, ScaleChoice())]
    assert same[0] == same[1]


@pytest.mark.parametrize("recipe", ["nf4", "text", "bf16"])
def test_a_calibration_without_fp8_is_refused(recipe: str) -> None:
    with pytest.raises(UsageError, match="no scales are chosen here"):
        make_plan(made_up(tiny_config()), load_recipe(recipe), scale_choice=ScaleChoice("max"))
