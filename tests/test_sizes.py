"""The published family: counts of tensors, of parameters and of bytes."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from checkpoints import tiny_config
from qwen35.checkpoint.inventory import inventory
from qwen35.checkpoint.source import Checkpoint, is_published, open_published
from qwen35.codecs.registry import group
from qwen35.model.model_config import parse_config
from qwen35.model.roles import CheckpointNaming, expected_tensors
from qwen35.model.sizes import FUSED_MTP_EXPERTS, PUBLISHED, published_config
from qwen35.tensors import StoredTensor

FAMILY = {
    # name: (tensors, parameters, bytes of tensors)
    "Qwen3.5-0.8B": (488, 873_438_784, 1_746_882_752),
    "Qwen3.5-2B": (632, 2_274_069_824, 4_548_144_832),
    "Qwen3.5-4B": (738, 4_659_865_088, 9_319_737_856),
    "Qwen3.5-9B": (775, 9_653_104_368, 19_306_216_416),
    "Qwen3.5-27B": (1_199, 27_781_427_952, 55_562_872_800),
    "Qwen3.5-35B-A3B": (1_811, 35_951_822_704, 71_903_655_008),
    "Qwen3.5-122B-A10B": (1_949, 125_086_497_008, 250_173_007_840),
    "Qwen3.5-397B-A17B": (2_924, 403_397_928_944, 806_795_875_168),
    "Qwen3.6-27B": (1_199, 27_781_427_952, 55_562_872_800),
    "Qwen3.6-35B-A3B": (1_045, 35_951_822_704, 71_903_655_008),
    "Qwen3.8-27B": (1_199, 27_781_427_952, 55_562_872_800),
    "Qwen3.8-2.4T-A95B": (1_609, 2_446_182_725_504, 4_892_365_486_336),
}
"""Parameters as published; bytes are two a parameter and two more for each that is F32."""


def test_every_published_name_is_held_to_numbers() -> None:
    assert set(FAMILY) == {name for name in PUBLISHED if not name.endswith("-Base")}


@pytest.mark.parametrize("name", FAMILY)
def test_counts_are_those_published(name: str) -> None:
    checkpoint = open_published(name)
    specs = [weight.main.spec for weight in checkpoint.weights]
    counts = (len(specs), sum(spec.numel for spec in specs), checkpoint.nbytes)
    assert counts == FAMILY[name]
    in_float32 = sum(spec.numel for spec in specs if spec.dtype == "F32")
    assert checkpoint.nbytes == 2 * counts[1] + 2 * in_float32


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.endswith("-Base")])
def test_base_model_has_the_layout_of_the_other(name: str) -> None:
    base, other = open_published(name), open_published(name.removesuffix("-Base"))
    assert base.weights == other.weights
    assert base.name == name


def test_parts_of_the_smallest() -> None:
    roles = Counter(item.role.scope for item in inventory(open_published("Qwen3.5-0.8B")))
    assert roles == {"text": 320, "visual": 153, "mtp": 15}


def test_parts_of_a_mixture() -> None:
    items = inventory(open_published("Qwen3.5-35B-A3B"))
    assert Counter(item.role.scope for item in items) == {"text": 693, "visual": 333, "mtp": 785}
    # an MTP layer: four of its own, 2 norms, 6 of attention, router, shared expert 3 + 1, experts
    assert 785 == 4 + 2 + 6 + 1 + 4 + 256 * 3
    shapes = {item.spec.name: item.spec.shape for item in items}
    layer = "model.language_model.layers.39.mlp"
    assert shapes[f"{layer}.experts.gate_up_proj"] == (256, 1024, 2048)
    assert shapes[f"{layer}.experts.down_proj"] == (256, 2048, 512)
    assert shapes[f"{layer}.gate.weight"] == (256, 2048)
    assert shapes[f"{layer}.shared_expert_gate.weight"] == (1, 2048)
    assert shapes["mtp.layers.0.mlp.experts.255.up_proj.weight"] == (512, 2048)


def test_3_6_stacks_its_mtp_experts_and_nothing_else_differs() -> None:
    assert FUSED_MTP_EXPERTS == ("Qwen3.6-35B-A3B", "Qwen3.8-2.4T-A95B")
    newer = {weight.name for weight in open_published("Qwen3.6-35B-A3B").weights}
    older = {weight.name for weight in open_published("Qwen3.5-35B-A3B").weights}
    assert newer - older == {f"mtp.layers.0.mlp.experts.{p}_proj" for p in ("down", "gate_up")}
    single = re.compile(r"mtp\.layers\.0\.mlp\.experts\.\d+\.(down|gate|up)_proj\.weight")
    assert all(single.fullmatch(name) for name in older - newer)


def test_parts_of_the_largest_and_what_is_inferred() -> None:
    largest = open_published("Qwen3.8-2.4T-A95B")
    assert largest.config.architecture.class_name == "Qwen3_5MoeForCausalLM"
    items = inventory(largest)
    assert Counter(item.role.scope for item in items) == {"text": 1_590, "mtp": 19}
    assert Counter(largest.config.layer_types) == {"linear_attention": 69, "full_attention": 23}
    assert {item.spec.name.partition("layers.")[0] for item in items if item.role.layer} == {
        "model."
    }
    (note,) = largest.notes
    assert "16 key and 128 value heads" in note
    assert "a shared expert of 2048" in note
    assert not list(open_published("Qwen3.5-397B-A17B").notes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_head_is_stored_when_it_is_not_tied(name: str) -> None:
    checkpoint = open_published(name)
    stored = any(weight.name == "lm_head.weight" for weight in checkpoint.weights)
    assert stored is not checkpoint.config.tied


def test_published_names_are_exact() -> None:
    assert is_published("Qwen3.5-27B")
    assert not is_published("qwen3.5-27b")
    assert not is_published("Qwen/Qwen3.5-27B")
    assert not is_published("")


def test_configs_are_made_anew_each_time() -> None:
    first = published_config("Qwen3.5-9B")
    first["text_config"]["hidden_size"] = 1
    assert published_config("Qwen3.5-9B")["text_config"]["hidden_size"] == 4096


def test_text_only_mixture_of_a_later_release_is_understood() -> None:
    raw = tiny_config(moe=True, text_only=True, tied=False, mtp=0)
    raw |= {"num_hidden_layers": 92, "hidden_size": 8192, "num_experts": 384}
    raw["layer_types"] = [
        "linear_attention" if (i + 1) % 4 else "full_attention" for i in range(92)
    ]
    config = parse_config(raw)
    assert raw["architectures"] == ["Qwen3_5MoeForCausalLM"]
    specs = list(expected_tensors(config, CheckpointNaming.published(config)))
    tensors = {spec.name: StoredTensor(spec, "model.safetensors", 0) for spec in specs}
    weights, problems = group(tensors)
    assert not problems
    items = inventory(Checkpoint("later", config, weights, CheckpointNaming.of(tensors), {}))
    assert {item.role.scope for item in items} == {"text"}
    assert all(item.spec.name.startswith(("model.layers.", "model.", "lm_head.")) for item in items)
    # head, embedding, norm; 2 norms and 7 of mixture a layer; 9 of linear or 6 of full attention
    assert len(items) == 3 + 92 * 9 + 69 * 9 + 23 * 6
    assert items[0].spec.shape == (512, 8192)
