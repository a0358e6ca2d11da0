"""Plans of the family: golden numbers, and those that a formula gives."""

from __future__ import annotations

import pytest

from golden_plan import CASES, GOLDEN, SIZES, golden
from plans import config_of, nf4_bytes, published_plan

pytestmark = pytest.mark.sentences

TEXT = "model.language_model"


def test_golden_table_is_complete() -> None:
    assert [(size, recipe) for size, rows in GOLDEN.items() for recipe in rows] == CASES


@pytest.mark.parametrize(("size", "recipe"), CASES)
def test_plan_of_a_published_size_is_golden(size: str, recipe: str) -> None:
    assert golden(published_plan(size, recipe)) == GOLDEN[size][recipe]


@pytest.mark.parametrize("size", SIZES)
def test_tensor_bytes_are_those_of_the_formula(size: str) -> None:
    plan = published_plan(size, "nf4")
    written = 0
    for item in plan.steps:
        spec = item.spec
        two_d = item.role.info.kind == "linear" and item.role.scope == "text"
        assert (item.op == "nf4") is two_d
        wide = 4 if spec.dtype == "F32" else 2
        written += nf4_bytes(spec.numel, spec.shape) if two_d else wide * spec.numel
    assert sum(step.nbytes for step in plan.steps) == written
    assert sum(file.nbytes - len(file.head) for file in plan.files) == written


def test_smallest_replaces_186_layers_keeps_153_visual_tensors_and_accounts_for_488() -> None:
    plan = published_plan("Qwen3.5-0.8B", "nf4")
    assert len(plan.steps) == 488
    assert sum(step.op == "nf4" for step in plan.steps) == 186 == 18 * (5 + 3) + 6 * (4 + 3)
    visual = [step for step in plan.steps if step.role.scope == "visual"]
    assert len(visual) == 153
    assert {step.op for step in visual} == {"copy"}
    written = [out.name for out in plan.outputs]
    assert len(written) == 488 + 5 * 186
    assert plan.read_bytes == 1_746_882_752


def test_one_layer_in_bytes() -> None:
    plan = published_plan("Qwen3.5-0.8B", "nf4")
    name = f"{TEXT}.layers.0.mlp.up_proj.weight"
    step = next(step for step in plan.steps if step.spec.name == name)
    assert [(out.name.removeprefix(name), out.dtype, out.nbytes) for out in step.outputs] == [
        ("", "U8", 1_835_008),
        (".absmax", "U8", 57_344),
        (".quant_map", "F32", 64),
        (".nested_absmax", "F32", 896),
        (".nested_quant_map", "F32", 1_024),
        (".quant_state.bitsandbytes__nf4", "U8", 184),
    ]
    assert nf4_bytes(3584 * 1024, (3584, 1024)) == step.nbytes


def test_text_recipe_copies_every_byte_of_the_text_model() -> None:
    plan = published_plan("Qwen3.5-9B", "text")
    visual = sum(step.weight.nbytes for step in plan.steps if step.role.scope == "visual")
    assert sum(step.nbytes for step in plan.steps) == 19_306_216_416 - visual
    assert {step.op for step in plan.steps} == {"copy", "drop"}
    assert not config_of(plan).get("quantization_config")


def test_vision_may_be_dropped_and_the_rest_packed_at_once() -> None:
    both, nf4_only = (published_plan("Qwen3.5-9B", name) for name in ("text-nf4", "nf4"))
    packed = [step.spec for step in nf4_only.steps if step.op == "nf4"]
    assert [step.spec for step in both.steps if step.op == "nf4"] == packed
    assert sum(step.op == "drop" for step in both.steps) == 333


def test_mixture_says_how_much_of_it_stays_as_it_is() -> None:
    plan = published_plan("Qwen3.5-35B-A3B", "nf4")
    experts = 41 * 3 * 256 * 512 * 2048  # 40 layers and MTP, three matrices each
    share = f"{experts / 35_951_822_704:.1%}"
    assert share == "91.8%"
    assert plan.notes == (
        f"experts stay in BF16: {share} of all parameters, because transformers cannot load them "
        "packed",
    )
    assert published_plan("Qwen3.5-9B", "nf4").notes == ()
    assert published_plan("Qwen3.5-35B-A3B", "text").notes == ()
