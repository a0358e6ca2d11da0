"""Weights matched with config.json: missing, extra, of another shape or dtype."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import layout_of, tiny_config
from qwen35.checkpoint.inventory import inventory, match
from qwen35.checkpoint.source import Checkpoint, open_published
from qwen35.codecs.nf4 import layout as nf4
from qwen35.codecs.registry import group
from qwen35.errors import TensorError
from qwen35.model.model_config import parse_config
from qwen35.model.roles import CheckpointNaming, expected_tensors
from qwen35.tensors import StoredTensor, TensorSpec

TEXT = "model.language_model"
UP = f"{TEXT}.layers.0.mlp.up_proj.weight"
Specs = dict[str, TensorSpec]


def specs_of(config: dict[str, Any], layout: CheckpointNaming | None = None) -> Specs:
    """Return the tensors that a checkpoint of `config` has."""
    expected = expected_tensors(parse_config(config), layout or layout_of(config))
    return {spec.name: spec for spec in expected}


def checkpoint_of(config: dict[str, Any], specs: Specs) -> Checkpoint:
    """Return a checkpoint that holds `specs` and nothing else."""
    tensors = {name: StoredTensor(spec, "f.safetensors", 0) for name, spec in specs.items()}
    weights, problems = group(tensors)
    assert not problems
    return Checkpoint("made up", parse_config(config), weights, CheckpointNaming.of(tensors), {})


def refusal(config: dict[str, Any], specs: Specs) -> str:
    """Return the sentence that refuses a checkpoint."""
    with pytest.raises(TensorError) as caught:
        inventory(checkpoint_of(config, specs))
    return str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tied": False},
        {"mtp": 0},
        {"moe": True},
        {"text_only": True},
        {"text_only": True, "moe": True, "tied": False},
        {"dtype": "float16"},
        {"dtype": "float32"},
    ],
    ids=str,
)
def test_complete_checkpoint_is_matched_in_the_order_of_its_config(options: Any) -> None:
    config = tiny_config(**options)
    specs = specs_of(config)
    items = inventory(checkpoint_of(config, dict(reversed(specs.items()))))
    assert [item.spec for item in items] == list(specs.values())
    assert all(item.weight.name == item.spec.name for item in items)


def test_per_expert_layout_is_read_off_the_names() -> None:
    config = tiny_config(moe=True)
    specs = specs_of(config, layout_of(config, per_expert=True))
    items = inventory(checkpoint_of(config, specs))
    assert len(items) == len(specs)
    experts = [item.role for item in items if item.role.expert is not None]
    assert len(experts) == (4 + 1) * 4 * 3  # decoder layers and MTP, experts, projections


def test_missing_tensor_is_named_with_what_it_should_be() -> None:
    config = tiny_config()
    specs = specs_of(config)
    del specs[UP]
    assert refusal(config, specs) == (
        f"{UP}: missing, expected BF16 [512, 256] by config.json; "
        "it was saved without: start from a complete checkpoint"
    )


def test_unknown_tensor_is_named() -> None:
    config = tiny_config()
    name = f"{TEXT}.layers.0.mlp.up_proj.lora_A.weight"
    specs = specs_of(config) | {name: TensorSpec(name, "BF16", (4, 4))}
    assert refusal(config, specs).startswith(f"{name}: part of an adapter that is not merged")
    name = name.replace("lora_A", "extra")
    specs = specs_of(config) | {name: TensorSpec(name, "BF16", (4, 4))}
    assert refusal(config, specs).startswith(f"{name}: not a tensor of Qwen3.5; if another tool")


@pytest.mark.parametrize(
    "name",
    [
        f"{TEXT}.layers.4.mlp.up_proj.weight",
        f"{TEXT}.layers.0.self_attn.q_proj.weight",
        f"{TEXT}.layers.0.mlp.gate.weight",
        "model.visual.blocks.2.norm1.weight",
        "mtp.layers.1.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    ],
)
def test_tensor_without_a_place_in_the_config_is_named(name: str) -> None:
    config = tiny_config()
    specs = specs_of(config) | {name: TensorSpec(name, "BF16", (4, 4))}
    assert refusal(config, specs) == (
        f"{name}: config.json has no place for it, expected a tensor of qwen3_5 with its sizes; "
        "config.json and weights belong to different models"
    )


def test_wrong_shape_is_told_with_both_shapes() -> None:
    config = tiny_config()
    specs = specs_of(config) | {UP: TensorSpec(UP, "BF16", (256, 512))}
    assert refusal(config, specs) == (f"{UP}: shape [256, 512], expected [512, 256] by config.json")


@pytest.mark.parametrize("dtype", ["I8", "F64", "F8_E5M2", "BOOL", "I32"])
def test_wrong_dtype_is_told(dtype: str) -> None:
    config = tiny_config()
    specs = specs_of(config) | {UP: TensorSpec(UP, dtype, (512, 256))}
    assert refusal(config, specs) == f"{UP}: dtype {dtype}, expected BF16 or F16 or F32"


def test_floats_of_another_width_than_the_config_says_are_fine() -> None:
    config = tiny_config()
    specs = specs_of(config) | {UP: TensorSpec(UP, "F16", (512, 256))}
    items = inventory(checkpoint_of(config, specs))
    assert next(item.spec.dtype for item in items if item.spec.name == UP) == "F16"


@pytest.mark.parametrize("count", [2, 3, 10])
def test_further_problems_are_counted(count: int) -> None:
    config = tiny_config()
    specs = specs_of(config)
    gone = [name for name in specs if name.endswith(("norm.weight", "proj.weight"))][:count]
    for name in gone:
        del specs[name]
    sentence = refusal(config, specs)
    assert sentence.startswith(f"{gone[0]}: missing")
    assert f"(and {count - 1} more tensors do not fit)" in sentence


def test_further_problems_are_counted_when_the_first_has_no_hint() -> None:
    config = tiny_config()
    other = UP.replace("up_proj", "gate_proj")
    wrong = {name: TensorSpec(name, "BF16", (1, 1)) for name in (UP, other)}
    assert refusal(config, specs_of(config) | wrong).endswith("; and 1 more tensors do not fit")


def test_moe_config_with_dense_weights_is_told_as_such() -> None:
    specs = specs_of(tiny_config())
    sentence = refusal(tiny_config(moe=True), specs)
    assert "missing, and the weights are those of a dense model" in sentence
    assert "expected the experts that model_type 'qwen3_5_moe' has" in sentence
    assert "config.json and weights belong to different models" in sentence


def test_dense_config_with_moe_weights_is_refused() -> None:
    sentence = refusal(tiny_config(), specs_of(tiny_config(moe=True)))
    assert sentence.startswith(f"{TEXT}.layers.0.mlp.down_proj.weight: missing")
    assert "more tensors do not fit" in sentence


def test_untied_head_must_be_there() -> None:
    specs = specs_of(tiny_config(tied=False))
    del specs["lm_head.weight"]
    sentence = refusal(tiny_config(tied=False), specs)
    assert sentence.startswith("lm_head.weight: missing, expected BF16 [512, 256] by config.json")


def test_tied_checkpoint_may_store_its_head_all_the_same() -> None:
    config = tiny_config()
    head = TensorSpec("lm_head.weight", "BF16", (512, 256))
    items = inventory(checkpoint_of(config, specs_of(config) | {head.name: head}))
    assert items[0].spec == head


def test_vision_tensors_must_be_there_under_a_vision_config() -> None:
    config = tiny_config()
    specs = {name: spec for name, spec in specs_of(config).items() if ".visual." not in name}
    sentence = refusal(config, specs)
    assert sentence.startswith("config.json: it describes a vision tower, but the checkpoint has")
    assert "expected 33 tensors" in sentence  # 9 at the root, 12 in each of 2 blocks


def test_text_prefix_under_a_vision_config_is_refused() -> None:
    text = specs_of(tiny_config(text_only=True))
    sentence = refusal(tiny_config(), text)
    assert "begins with 'model.', like" in sentence
    assert "expected 'model.language_model.' in its place" in sentence


def test_partial_mtp_is_refused() -> None:
    config = tiny_config()
    specs = specs_of(config)
    del specs["mtp.layers.0.self_attn.k_norm.weight"]
    assert refusal(config, specs).startswith("mtp.layers.0.self_attn.k_norm.weight: missing")


def test_absent_mtp_is_fine() -> None:
    config = tiny_config()
    specs = {name: spec for name, spec in specs_of(config).items() if not name.startswith("mtp.")}
    assert len(inventory(checkpoint_of(config, specs))) == len(specs_of(config)) - 15


def test_one_expert_missing_is_named() -> None:
    config = tiny_config(moe=True)
    specs = specs_of(config, layout_of(config, per_expert=True))
    gone = f"{TEXT}.layers.2.mlp.experts.3.up_proj.weight"
    del specs[gone]
    assert refusal(config, specs).startswith(f"{gone}: missing, expected BF16 [128, 256]")


@pytest.mark.parametrize("name", ["x{}", f"{TEXT}.layers.0.mlp.experts.{{}}.up_proj.weight"])
def test_many_strange_names_take_time_by_their_number(name: str) -> None:
    config = tiny_config(moe=True)
    expected = len(specs_of(config))
    times = []
    for count in (4000, 16_000):
        config["text_config"]["num_hidden_layers"] = layers = count // 16
        config["text_config"]["layer_types"] = ["full_attention"] * layers
        strange = (f"{'a.' * 60}{name.format(i)}" for i in range(count))
        made = checkpoint_of(config, {text: TensorSpec(text, "F32", (0,)) for text in strange})
        start = time.process_time()
        _, problems = match(made)
        times.append(time.process_time() - start)
        assert len(problems) > count + expected
    assert times[1] < 10 * times[0]


def test_one_expert_too_many_is_named() -> None:
    config = tiny_config(moe=True)
    specs = specs_of(config, layout_of(config, per_expert=True))
    name = f"{TEXT}.layers.2.mlp.experts.4.up_proj.weight"
    sentence = refusal(config, specs | {name: TensorSpec(name, "BF16", (128, 256))})
    assert sentence.startswith(f"{name}: config.json has no place for it")


@pytest.mark.parametrize(
    "name",
    ["", ".", "mlp.experts.", "model.layers.0.mlp.experts.", "mtp.layers.0.mlp.experts.", "é", "²"],
)
def test_strange_name_is_an_unknown_tensor(name: str) -> None:
    config = tiny_config()
    specs = specs_of(config) | {name: TensorSpec(name, "BF16", (1,))}
    assert refusal(config, specs).startswith(f"{name}: not a tensor of Qwen3.5")


@settings(max_examples=200)
@given(st.text(max_size=30) | st.from_regex(r"(model|mtp|layers|\d|mlp|experts|\.|weight){1,9}"))
def test_layout_is_read_off_any_names(name: str) -> None:
    CheckpointNaming.of([name])


def packed(spec: TensorSpec) -> Specs:
    """Return the NF4 form of a tensor."""
    return {part.name: part for part in nf4.layout(spec)}


def test_nf4_weight_has_the_shape_of_the_config_and_its_dtype() -> None:
    config = tiny_config()
    specs = specs_of(config)
    items = inventory(checkpoint_of(config, specs | packed(specs[UP])))
    item = next(item for item in items if item.spec.name == UP)
    assert item.spec == TensorSpec(UP, "BF16", (512, 256))
    assert item.weight.storage == "nf4"
    assert len(item.weight.parts) == 6


def test_nf4_weight_of_another_size_is_refused() -> None:
    config = tiny_config()
    wrong = packed(TensorSpec(UP, "BF16", (512, 128)))
    assert refusal(config, specs_of(config) | wrong) == (
        f"{UP}: 32768 packed bytes, expected 65536 for shape [512, 256]"
    )


def fp8(shape: tuple[int, ...], scale: tuple[int, ...], dtype: str = "BF16") -> Specs:
    """Return an FP8 weight."""
    name = f"{UP}_scale_inv"
    return {UP: TensorSpec(UP, "F8_E4M3", shape), name: TensorSpec(name, dtype, scale)}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_fp8_weight_with_its_scale_is_matched(dtype: str) -> None:
    config = tiny_config()
    items = inventory(checkpoint_of(config, specs_of(config) | fp8((512, 256), (4, 2), dtype)))
    item = next(item for item in items if item.spec.name == UP)
    assert (item.spec.dtype, item.weight.storage) == ("BF16", "fp8")


@pytest.mark.parametrize(("scale", "fits"), [((1, 2), True), ((0, 2), False), ((4, 2), False)])
def test_fp8_blocks_at_the_edge_have_a_scale_too(scale: tuple[int, ...], fits: bool) -> None:
    config = tiny_config()
    name = f"{TEXT}.layers.0.linear_attn.in_proj_a.weight"
    part = TensorSpec(f"{name}_scale_inv", "BF16", scale)
    specs = specs_of(config) | {name: TensorSpec(name, "F8_E4M3", (4, 256)), part.name: part}
    if fits:
        assert len(inventory(checkpoint_of(config, specs))) == len(specs) - 1
    else:
        assert "expected [1, 2], blocks of 128x128" in refusal(config, specs)


@pytest.mark.parametrize("scale", [(2, 4), (4,), (1, 1), (4, 3), (512, 256)])
def test_fp8_scale_of_another_shape_is_refused(scale: tuple[int, ...]) -> None:
    config = tiny_config()
    assert refusal(config, specs_of(config) | fp8((512, 256), scale)) == (
        f"{UP}_scale_inv: shape {list(scale)}, expected [4, 2], blocks of 128x128"
    )


def test_fp8_scale_of_another_dtype_is_refused() -> None:
    config = tiny_config()
    sentence = refusal(config, specs_of(config) | fp8((512, 256), (4, 2), "I32"))
    assert sentence == f"{UP}_scale_inv: dtype I32, expected BF16 or F32"


def test_published_size_of_3_6_has_stacked_mtp_experts() -> None:
    names = {item.spec.name for item in inventory(open_published("Qwen3.6-35B-A3B"))}
    assert "mtp.layers.0.mlp.experts.gate_up_proj" in names
    older = {item.spec.name for item in inventory(open_published("Qwen3.5-35B-A3B"))}
    assert "mtp.layers.0.mlp.experts.255.gate_proj.weight" in older
    assert len(older - names) == 256 * 3
    assert len(names - older) == 2


@settings(max_examples=30)
@given(st.data())
def test_any_damage_is_refused(data: st.DataObject) -> None:
    config = tiny_config()
    specs = specs_of(config)
    name = data.draw(st.sampled_from(sorted(specs)))
    damage = data.draw(st.sampled_from(["drop", "rename", "reshape"]))
    spec = specs.pop(name)
    if damage == "rename":
        specs[name + "x"] = replace(spec, name=name + "x")
    elif damage == "reshape":
        specs[name] = replace(spec, shape=(*spec.shape, 1))
    assert name.partition(".weight")[0] in refusal(config, specs)
